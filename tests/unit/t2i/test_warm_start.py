from pathlib import Path

import pytest
import torch
from small_models import small_config

from t2i.config import SampleConfig
from t2i.model import NAR
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.warm_start import match, read_weights, vocabulary_in


@pytest.fixture
def exported(tmp_path: Path) -> Path:
    """An export of a class-conditional model, without a tokenizer."""
    torch.manual_seed(0)
    model = NAR(small_config((3, 4), condition="class"))
    TextToImagePipeline(model, None, None, SampleConfig(), 32, Provenance("small", 1)).save_pretrained(
        tmp_path / "export"
    )
    return tmp_path / "export"


def shapes_of(grid: tuple[int, ...], **changes: object) -> dict[str, torch.Size]:
    model = NAR(small_config(grid, condition="class", **changes))  # type: ignore[arg-type]
    return {f"nar.{name}": p.shape for name, p in model.named_parameters()}


def test_a_larger_grid_takes_every_parameter(exported: Path) -> None:
    weights = read_weights(exported)
    report = match(shapes_of((6, 8)), weights, exported)
    assert set(report.taken) == set(shapes_of((3, 4)))
    assert not report.fresh
    assert vocabulary_in(exported) is None
    assert str(report).startswith(f"{len(report.taken)} parameters taken")


def test_what_is_new_and_what_is_unused_is_told(exported: Path) -> None:
    weights = read_weights(exported) | {"nar.more": torch.zeros(1)}
    deeper = shapes_of((3, 4), n_layer=small_config((3, 4)).n_layer + 1)
    report = match(deeper, weights, exported)
    assert report.unused == ("nar.more",)
    assert report.fresh
    assert f"{len(report.fresh)} start anew ({report.fresh[0]}" in str(report)
    assert "1 of it unused (nar.more)" in str(report)


def test_other_shapes_are_refused_and_listed(exported: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot start from .*nar\.tokens\.weight is \(\d+, \d+\) there and"):
        match(shapes_of((3, 4), vocab_size=7), read_weights(exported), exported)


def test_what_has_nothing_of_the_model_is_refused(exported: Path) -> None:
    with pytest.raises(ValueError, match=r"it has no parameter of this model; give another train\.init_from"):
        match({"other": torch.Size([1])}, read_weights(exported), exported)


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is no export: it has no config\.json"):
        read_weights(tmp_path)
