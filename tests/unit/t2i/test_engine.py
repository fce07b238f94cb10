import json
from pathlib import Path
from typing import Any

import pytest

from t2i.engine import read_deepspeed_config
from t2i.recipes import RECIPES

CONFIGS = sorted((Path(__file__).parents[3] / "deepspeed_configs").glob("*.json"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_configurations_that_come_along_are_accepted(path: Path) -> None:
    assert read_deepspeed_config(path)["zero_optimization"]["stage"] in (1, 2, 3)


def test_the_quickstarts_batch_divides_into_its_lanes() -> None:
    config = read_deepspeed_config(next(path for path in CONFIGS if path.stem == "cpu"))
    batch = 2 * config["train_micro_batch_size_per_gpu"] * config.get("gradient_accumulation_steps", 1)
    for name in ("shapes-tiny", "shapes-small", "shapes-classes", "shapes-clips"):
        assert batch % RECIPES[name]().data.lanes == 0


GOOD: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GOOD | {"optimizer": {"type": "AdamW"}}, "'optimizer' section, which the recipe owns"),
        (GOOD | {"scheduler": {}}, "'scheduler' section"),
        ({"zero_optimization": {"stage": 2}}, "needs 'train_micro_batch_size_per_gpu' as a whole number"),
        (GOOD | {"train_micro_batch_size_per_gpu": "auto"}, "train_micro_batch_size_per_gpu"),
        (GOOD | {"train_batch_size": 8}, "'train_batch_size', which follows from"),
        (
            GOOD | {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}},
            "zero_optimization.reduce_bucket_size",
        ),
        (GOOD | {"zero_optimization": {}}, "sets ZeRO stage 0; use 1, 2 or 3"),
        (GOOD | {"fp16": {"enabled": True}}, "enables fp16, which processors do not train in"),
        (
            GOOD | {"bf16": {"enabled": True, "check_grad_overflow": False}},
            "check_grad_overflow false, with which a step",
        ),
        (
            GOOD | {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
            "grad_accum_dtype fp32 at ZeRO stage 1",
        ),
        ([1, 2], "is not a JSON object"),
        (GOOD | {"gradient_cliping": 1.0}, "has 'gradient_cliping'; did you mean 'gradient_clipping'"),
        (GOOD | {"gradient_accumulation_steps": "2"}, "'gradient_accumulation_steps' '2'; write a whole number"),
        ({"train_micro_batch_size_per_gpu": 4, "zero_optimization": 2}, "'zero_optimization' 2; write an object"),
    ],
)
def test_a_configuration_that_would_fail_later_is_refused(tmp_path: Path, config: Any, message: str) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        read_deepspeed_config(path)


def test_a_configuration_that_is_no_file_or_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read"):
        read_deepspeed_config(tmp_path / "none.json")
    (tmp_path / "broken.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_deepspeed_config(tmp_path / "broken.json")
