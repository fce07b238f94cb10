import resource
import signal
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from t2i.checkpoint_writer import CheckpointWriter, check_space, in_memory


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
    held = in_memory({"a": [flat[1:], (flat,)], "name": "x"})
    flat.zero_()
    assert held["a"][0].tolist() == [1, 2, 3]
    assert held["a"][1][0].tolist() == [0, 1, 2, 3]
    assert held["a"][0].untyped_storage().nbytes() == 12


def test_too_little_space_is_named(tmp_path: Path) -> None:
    check_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"MiB left and a checkpoint takes 1,048,576,000,000 MiB; make room"):
        check_space(tmp_path, 2**60 // 1_048_576 * 1_000_000)
