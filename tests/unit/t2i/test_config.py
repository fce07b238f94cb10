import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.config import DataConfig, ModelConfig, Recipe, SampleConfig, TrainConfig, from_json, to_json
from t2i.recipes import RECIPES
from t2i.text_encoder import TextEncoderConfig

MODEL = ModelConfig(grid=(4, 4), width=64, n_head=4, condition_dim=32, max_condition=8)
TEXT = TextEncoderConfig(vocab_size=300, dim=32, max_length=8)


def recipe(**changes: Any) -> Recipe:
    fields: dict[str, Any] = {
        "name": "r", "model": MODEL, "tokenizer": "shapes", "image_size": 32, "text_encoder": TEXT,
    }  # fmt: skip
    return Recipe(**fields | changes)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    made = RECIPES[name]()
    text = to_json(made)
    assert from_json(Recipe, text) == made
    assert from_json(Recipe, text.encode()) == made
    assert json.loads(text)["model"]["grid"] == list(made.model.grid)


@given(
    steps=st.integers(1, 10**7),
    lr=st.floats(1e-8, 1.0),
    prompts=st.lists(st.text(max_size=20), max_size=3),
    path=st.text("abc/é _", min_size=1, max_size=10),
    top_p=st.floats(0.01, 1.0),
)
def test_json_round_trip_keeps_numbers_and_text(
    steps: int, lr: float, prompts: list[str], path: str, top_p: float
) -> None:
    made = recipe(
        train=TrainConfig(steps=steps, lr=lr, sample_prompts=tuple(prompts)),
        data=DataConfig(path=Path(path)),
        sample=SampleConfig(top_p=top_p),
    )
    assert from_json(Recipe, to_json(made)) == made


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        (ModelConfig, {"grid": ()}, "one to three axes"),
        (ModelConfig, {"grid": (2, 2, 2, 2)}, "one to three axes"),
        (ModelConfig, {"grid": (4, 0)}, "each at least 1"),
        (ModelConfig, {"n_layer": 0}, "n_layer is 0"),
        (ModelConfig, {"vocab_size": 0}, "vocab_size is 0"),
        (ModelConfig, {"dropout": 1.0}, r"dropout is 1.0; it must be in \[0, 1\)"),
        (ModelConfig, {"condition_dropout": -0.1}, "condition_dropout is -0.1"),
        (ModelConfig, {"width": 770}, "width 770 is not divisible by n_head 12"),
        (ModelConfig, {"width": 72, "n_head": 12}, "head dimension divisible by 4"),
        (ModelConfig, {"grid": (4, 8, 8)}, "use positions 'learned'"),
        (ModelConfig, {"init_std": 0.0}, "init_std is 0.0; it must be above 0"),
        (ModelConfig, {"uncond_tokens": 0}, "uncond_tokens is 0"),
        (ModelConfig, {"uncond_tokens": 121}, r"must be in 1..max_condition \(120\)"),
        (ModelConfig, {"uncond_mask": "caption"}, "needs uncond_tokens 120"),
        (ModelConfig, {"n_kv_head": 5}, "n_kv_head 5 does not divide n_head 12"),
        (ModelConfig, {"n_kv_head": 0}, "n_kv_head 0"),
        (DataConfig, {"lanes": 0}, "lanes is 0"),
        (DataConfig, {"workers": 0}, "workers is 0"),
        (DataConfig, {"validation": -1}, "validation is -1"),
        (TrainConfig, {"steps": 0}, "steps is 0"),
        (TrainConfig, {"keep_last": 0}, "keep_last is 0"),
        (TrainConfig, {"lr": 0.0}, "lr > 0"),
        (TrainConfig, {"lr": 1e-4, "min_lr": 1e-3}, "min_lr 0.001"),
        (TrainConfig, {"beta2": 1.0}, "beta2 is 1.0"),
        (TrainConfig, {"sample_every": -1}, "sample_every is -1"),
        (TrainConfig, {"watchdog_seconds": -1.0}, "watchdog_seconds is -1.0"),
        (TrainConfig, {"watchdog_seconds": 2.0}, "watchdog_seconds is 2.0, .* use 3 or more, or 0 to wait for ever"),
        (SampleConfig, {"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        (SampleConfig, {"temperature": -1.0}, "temperature is -1.0"),
        (SampleConfig, {"top_k": -1}, "top_k is -1"),
    ],
)
def test_a_wrong_number_is_named_with_its_bounds(kind: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


CLASSES = dataclasses.replace(MODEL, condition="class")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": CLASSES}, "class-conditional model takes no text encoder"),
        ({"model": CLASSES, "text_encoder": None, "frozen_text_encoder": "t5"}, "takes no text encoder"),
        (
            {"model": CLASSES, "text_encoder": None, "train": TrainConfig(sample_prompts=("1", "a cat"))},
            "have to be class numbers",
        ),
        ({"text_encoder": dataclasses.replace(TEXT, dim=64)}, "64 channels and the model takes 32"),
        ({"text_encoder": dataclasses.replace(TEXT, max_length=9)}, "captions of 9 tokens do not fit"),
        ({"text_encoder": None}, "one of text_encoder and frozen_text_encoder"),
        ({"frozen_text_encoder": "t5"}, "one of text_encoder and frozen_text_encoder"),
    ],
)
def test_parts_of_a_recipe_have_to_fit_each_other(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r["train"].update(stepz=3), "stepz"),
        (lambda r: r["model"].pop("grid") and r.pop("image_size"), "image_size"),
        (lambda r: r["train"].update(steps="many"), "steps"),
        (lambda r: r["train"].update(steps=0), "steps is 0"),
    ],
)
def test_json_that_is_no_recipe_is_refused_by_field(change: Any, message: str) -> None:
    fields = json.loads(to_json(recipe()))
    change(fields)
    with pytest.raises(ValueError, match=message):
        from_json(Recipe, json.dumps(fields))


def test_everything_wrong_with_json_is_one_line() -> None:
    fields = json.loads(to_json(recipe()))
    del fields["image_size"]
    fields["train"].update(stepz=3, steps="many", lr=-1)
    fields["modle"] = fields.pop("model")
    with pytest.raises(ValueError, match="is no Recipe") as caught:
        from_json(Recipe, json.dumps(fields), "runs/a/recipe.json")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("runs/a/recipe.json is no Recipe: ")
    for problem in (
        "image_size is missing",
        "model is missing",
        "modle is no field of it",
        "train.stepz is no field of it",
        "train.steps is 'many' (input should be a valid integer, unable to parse string as an integer)",
    ):
        assert problem in message.split(": ", 1)[1].split("; ")
    with pytest.raises(ValueError, match=r"^JSON is no Recipe: Invalid JSON: [^\n]*$"):
        from_json(Recipe, '{"name": \n')


def test_derived_sizes() -> None:
    assert MODEL.n_axes == 2
    assert (MODEL.prefix, CLASSES.prefix) == (8, 1)
    assert MODEL.hidden == 256
    assert ModelConfig(width=1280, n_head=20).hidden == 3584  # int(8 * 1280 / 3) = 3413
    assert ModelConfig(width=128, n_head=4, ffn_multiple=32).hidden == 352  # int(8 * 128 / 3) = 341


def test_configurations_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MODEL.width = 3  # type: ignore[misc]
