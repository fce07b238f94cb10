import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t2i import train
from t2i.config import Recipe
from t2i.engine import read_deepspeed_config
from t2i.recipes import RECIPES, shapes_tiny
from t2i.training import Trainer, _mix

CONFIGS = sorted((Path(__file__).parents[3] / "deepspeed_configs").glob("*.json"))


@pytest.fixture
def recipe(encoded_shapes: Path, tmp_path: Path) -> Recipe:
    tiny = shapes_tiny()
    return replace(tiny, data=replace(tiny.data, path=encoded_shapes, validation=16), run_dir=tmp_path / "run")


# Randomness


def trainer_of(recipe: Recipe, rank: int, ranks: int, batch: int) -> Trainer:
    """Only what the random choices depend on: no engine, no process group."""
    trainer = Trainer.__new__(Trainer)
    trainer.recipe = recipe
    trainer.runtime = SimpleNamespace(rank=rank, ranks=ranks)  # type: ignore[assignment]
    trainer.engine = SimpleNamespace(global_batch=batch)  # type: ignore[assignment]
    return trainer


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dropped_conditions_do_not_depend_on_the_number_of_ranks(recipe: Recipe, ranks: int) -> None:
    for step in (0, 1, 777):
        parts = [trainer_of(recipe, rank, ranks, 48)._unconditional(step) for rank in range(ranks)]
        whole = trainer_of(recipe, 0, 1, 48)._unconditional(step)
        assert whole is not None
        assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)


def test_conditions_are_dropped_as_often_as_asked(recipe: Recipe) -> None:
    trainer = trainer_of(recipe, 0, 1, 1000)
    drops = [trainer._unconditional(step) for step in range(20)]
    share = torch.stack([d for d in drops if d is not None]).float().mean()
    assert 0.09 < float(share) < 0.11
    assert len({tuple(d.tolist()) for d in drops if d is not None}) == 20
    never = replace(recipe, model=replace(recipe.model, condition_dropout=0.0))
    assert trainer_of(never, 0, 1, 1000)._unconditional(0) is None


def test_mixed_seeds_differ_and_stay_in_range() -> None:
    seeds = {_mix(seed, step, kind) for seed in range(5) for step in range(50) for kind in range(5)}
    assert len(seeds) == 5 * 50 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert _mix(1, 2, 3) == _mix(1, 2, 3)


# DeepSpeed's configuration


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


# The command line of t2i/train.py, up to where the process group starts


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--local_rank=0"], "usage: deepspeed t2i/train.py RECIPE"),
        (["--local_rank=0", "shapes-huge"], "error: no recipe or file 'shapes-huge'; recipes are "),
        (["shapes-tiny"], "error: no --deepspeed_config; give one of the files in deepspeed_configs/"),
        (
            ["shapes-tiny", "--deepspeed_config", "nowhere.json"],
            "error: DeepSpeed configuration nowhere.json cannot be read",
        ),
        (["shapes-tiny", "--train.lr", "0.1", "--deepspeed_config", "nowhere.json"], "nowhere.json cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["t2i/train.py", *arguments])
    assert train.main() == 2
    assert message in capsys.readouterr().err


def test_a_value_out_of_range_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["t2i/train.py", "shapes-tiny", "--train.steps", "0"])
    try:
        code: Any = train.main()
    except SystemExit as exit:
        code = exit.code
    assert code == 2
    assert "steps is 0; it must be at least 1" in capsys.readouterr().err


def test_help_lists_the_fields_of_a_recipe(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["t2i/train.py", "shapes-tiny", "--help"])
    with pytest.raises(SystemExit) as exit:
        train.main()
    assert exit.value.code == 0
    out = capsys.readouterr().out
    for option in ("--train.steps", "--model.width", "--run-dir", "--text-encoder.dim", "--data.lanes"):
        assert option in out
