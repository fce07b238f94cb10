import resource
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from t2i.checkpoint_writer import CheckpointWriter, check_space, plain


@pytest.fixture
def full_disk() -> Iterator[None]:
    """Files cannot grow beyond 100 kB, as on a disk that is full."""
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("background", [True, False])
def test_what_is_saved_is_what_was_there_when_it_was_saved(background: bool, tmp_path: Path) -> None:
    writer = CheckpointWriter(background)
    flat = torch.arange(1000.0)
    state = {"step": 3, "part": flat[10:20], "groups": [flat[:5], OrderedDict(a=flat[5:7])], "shape": (1, 2)}
    writer.save(state, str(tmp_path / "file.pt"))
    if background:
        flat.zero_()  # training goes on
    writer.wait()
    assert not writer.busy
    assert writer.take_error() is None
    loaded = writer.load(str(tmp_path / "file.pt"))
    assert loaded["part"].tolist() == [*range(10, 20)]
    assert loaded["groups"][1]["a"].tolist() == [5, 6]
    assert (loaded["step"], loaded["shape"]) == (3, (1, 2))
    if background:  # no view drags along what it is a view of
        assert (tmp_path / "file.pt").stat().st_size < 4000


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_leaves_nothing(background: bool, tmp_path: Path, full_disk: None) -> None:
    writer = CheckpointWriter(background)
    writer.save({"weights": torch.zeros(100_000)}, str(tmp_path / "large.pt"))
    writer.save({"weights": torch.zeros(10)}, str(tmp_path / "small.pt"))
    writer.wait()
    assert writer.failed
    error = writer.take_error()
    assert isinstance(error, OSError)
    assert "too large" in str(error)  # the system's own words
    assert list(tmp_path.iterdir()) == []  # and nothing was written after it
    writer.save({"weights": torch.zeros(10)}, str(tmp_path / "small.pt"))
    writer.wait()
    assert not writer.failed
    assert (tmp_path / "small.pt").is_file()


def test_copies_share_nothing_with_what_they_are_copies_of() -> None:
    flat = torch.arange(4.0)
    held = plain({"a": [flat[1:], (flat,)], "name": "x"}, copied=True)
    flat.zero_()
    assert held["a"][0].tolist() == [1, 2, 3]
    assert held["a"][1][0].tolist() == [0, 1, 2, 3]
    assert held["a"][0].untyped_storage().nbytes() == 12


@pytest.mark.parametrize("background", [True, False])
def test_members_of_enumerations_are_written_as_their_values(background: bool, tmp_path: Path) -> None:
    """Some versions of Python pickle them as a call of getattr, which is not read back."""
    writer = CheckpointWriter(background)
    writer.save({"stage": [ZeroStageEnum.gradients]}, str(tmp_path / "state.pt"))
    writer.wait()
    assert torch.serialization.get_unsafe_globals_in_checkpoint(tmp_path / "state.pt") == []
    assert writer.load(str(tmp_path / "state.pt")) == {"stage": [2]}


def test_what_changes_while_it_is_written_is_copied() -> None:
    """As the scale of an fp16 loss does."""
    scaler = DynamicLossScaler(2**16, 2, 1000, 1, 1, False)
    held = plain({"loss_scaler": scaler}, copied=True)
    scaler.cur_scale /= 2
    assert (held["loss_scaler"].cur_scale, scaler.cur_scale) == (2**16, 2**15)


def test_a_foreign_object_is_not_loaded(tmp_path: Path) -> None:
    torch.save({"path": tmp_path}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"state.pt holds pathlib.*, which no run of this program saves"):
        CheckpointWriter(False).load(str(tmp_path / "state.pt"))


def test_too_little_space_is_named(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"MiB left and a checkpoint takes 1,048,576,000,000 MiB; make room"):
        check_space(tmp_path, 2**60 // 1_048_576 * 1_000_000)
