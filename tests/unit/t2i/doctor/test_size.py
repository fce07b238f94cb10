from pathlib import Path

import pytest

from t2i.doctor.size import count_parameters
from t2i.objective import build_model
from t2i.recipes import nar_xl_256, shapes_classes, shapes_small, shapes_tiny
from t2i.text_encoder import train_sentencepiece


@pytest.mark.parametrize("make", [shapes_tiny, shapes_small, shapes_classes])
def test_as_many_as_the_model_has(make: object, tmp_path: Path) -> None:
    recipe = make()  # type: ignore[operator]
    vocabulary = None
    if recipe.text_encoder is not None:
        captions = [
            f"a photo of {n} {color} {kind}s"
            for n in range(40)
            for color in ("red", "blue")
            for kind in ("star", "ring")
        ]
        train_sentencepiece(captions, 290, tmp_path / "spiece.model", lower_case=False)
        vocabulary = (tmp_path / "spiece.model").read_bytes()
    model = build_model(recipe, vocabulary)
    assert count_parameters(recipe) == sum(parameter.numel() for parameter in model.parameters())


def test_of_a_large_model_without_making_it() -> None:
    assert 815e6 < count_parameters(nar_xl_256()) < 825e6
