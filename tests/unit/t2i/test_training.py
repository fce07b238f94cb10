import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.index import ShardSet
from t2i import train
from t2i.checkpoint import CheckpointInfo, Inputs
from t2i.config import DataConfig, Recipe, TrainConfig, to_json
from t2i.encoding import encode
from t2i.engine import read_deepspeed_config
from t2i.recipes import RECIPES, shapes_clips, shapes_tiny
from t2i.text_encoder import TextEncoder
from t2i.training import Trainer, _mix, _Window, check_data, check_resumable, inputs_of, lr_at, vocabulary_of
from t2i.vq import VQConfig, VQModel

CONFIGS = sorted((Path(__file__).parents[3] / "deepspeed_configs").glob("*.json"))


@pytest.fixture
def recipe(encoded_shapes: Path, tmp_path: Path) -> Recipe:
    tiny = shapes_tiny()
    return replace(tiny, data=replace(tiny.data, path=encoded_shapes, validation=16), run_dir=tmp_path / "run")


INPUTS = Inputs("data", "tokenizer", None)


def mark_checkpoint(recipe: Recipe) -> Path:
    """What the last steps of a save at step 4 write; returns the checkpoint's folder."""
    folder = recipe.run_dir / "checkpoints" / "step-00000004"
    folder.mkdir(parents=True)
    (folder / "recipe.json").write_text(to_json(recipe))
    info = CheckpointInfo(step=4, ranks=2, stage=2, global_batch=16, averaged=False, inputs=INPUTS)
    (folder / "checkpoint.json").write_text(json.dumps(asdict(info)))
    return folder


# Schedule


@given(
    steps=st.integers(1, 500), warmup=st.integers(0, 50), lr=st.floats(1e-6, 1.0), floor=st.floats(0, 1)
)  # fmt: skip
def test_learning_rate_rises_to_lr_and_falls_to_min_lr(steps: int, warmup: int, lr: float, floor: float) -> None:
    config = TrainConfig(steps=steps, warmup_steps=warmup, lr=lr, min_lr=lr * floor)
    rates = [lr_at(config, step) for step in range(steps)]
    up, down = rates[:warmup], rates[warmup:]
    assert up == pytest.approx([lr * (step + 1) / warmup for step in range(len(up))])
    assert all(later <= earlier * (1 + 1e-12) for earlier, later in pairwise(down))
    assert all(config.min_lr * (1 - 1e-9) <= rate <= lr * (1 + 1e-9) for rate in down)
    if down:
        assert down[0] == pytest.approx(lr)
    assert lr_at(config, max(steps, warmup + 1)) == pytest.approx(config.min_lr, abs=1e-12)


# Data


def check(recipe: Recipe) -> None:
    shards = ShardSet(recipe.data.path)
    check_data(recipe, shards, inputs_of(recipe, shards))


def test_shards_that_fit_the_recipe_pass(recipe: Recipe) -> None:
    check(recipe)


def test_raw_shards_are_refused(recipe: Recipe, raw_shapes: Path) -> None:
    with pytest.raises(ValueError, match=r"holds raw pictures; encode it first: t2i encode"):
        check(replace(recipe, data=replace(recipe.data, path=raw_shapes)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"grid": (4, 4)}}, r"encoded with grid \[8, 8\] and recipe shapes-tiny needs \[4, 4\]"),
        ({"model": {"vocab_size": 1024}}, "encoded with codebook_size 512 and recipe shapes-tiny needs 1024"),
        ({"image_size": 32}, "encoded with image_size 64 and recipe shapes-tiny needs 32"),
        ({"data": {"validation": 81}}, "too few for 16 lanes"),
        ({"data": {"lanes": 128}}, "has 96 samples, 16 of them for validation, too few for 128 lanes"),
    ],
)
def test_shards_that_do_not_fit_the_recipe_are_refused(recipe: Recipe, changes: dict[str, Any], message: str) -> None:
    for name, value in changes.items():
        new = replace(getattr(recipe, name), **value) if isinstance(value, dict) else value
        recipe = replace(recipe, **{name: new})
    with pytest.raises(ValueError, match=message):
        check(recipe)


def test_pictures_and_clips_are_not_taken_for_each_other(
    recipe: Recipe, encoded_shapes: Path, encoded_clips: Path
) -> None:
    small = DataConfig(path=encoded_clips, lanes=8, validation=8)
    check(replace(shapes_clips(), data=small))
    with pytest.raises(ValueError, match=r"encoded with grid \[4, 8, 8\] and recipe shapes-tiny needs \[8, 8\]"):
        check(replace(recipe, data=small))
    with pytest.raises(ValueError, match=r"encoded with grid \[8, 8\] and recipe shapes-clips needs \[4, 8, 8\]"):
        check(replace(shapes_clips(), data=replace(small, path=encoded_shapes)))


def test_shards_of_another_tokenizer_are_refused(recipe: Recipe, tmp_path: Path) -> None:
    VQModel(VQConfig(base_channels=32, channel_multipliers=(1,), codebook_size=512)).save(tmp_path / "vq")
    with pytest.raises(ValueError, match=r"encoded with tokenizer_sha256 .*; encode it for this recipe"):
        check(replace(recipe, tokenizer=str(tmp_path / "vq")))


@pytest.fixture
def frozen(recipe: Recipe, tmp_path: Path) -> Recipe:
    """The recipe with a frozen text encoder, which has states of 128 channels."""
    assert recipe.text_encoder is not None
    encoder = TextEncoder.from_config(recipe.text_encoder, vocabulary_of(recipe, ShardSet(recipe.data.path)))
    encoder.save_pretrained(tmp_path / "t5")
    return replace(recipe, text_encoder=None, frozen_text_encoder=str(tmp_path / "t5"))


@pytest.fixture
def stored(frozen: Recipe, raw_shapes: Path, tmp_path: Path) -> Recipe:
    """The recipe with a set that holds the states of its frozen text encoder."""
    threads = torch.get_num_threads()
    encode(raw_shapes, tmp_path / "stored", tokenizer="shapes", image_size=64, text_encoder=frozen.frozen_text_encoder)
    torch.set_num_threads(threads)
    return replace(frozen, data=replace(frozen.data, path=tmp_path / "stored"))


def test_shards_without_the_recipes_text_states_are_refused(frozen: Recipe) -> None:
    message = f"stored text states, and 96 of 96 samples in .* `t2i encode --text-encoder {frozen.frozen_text_encoder}`"
    with pytest.raises(ValueError, match=message):
        check(frozen)


def test_shards_of_another_text_encoder_are_refused(stored: Recipe) -> None:
    shards = ShardSet(stored.data.path)
    inputs = inputs_of(stored, shards)
    check_data(stored, shards, inputs)
    encoding = {**(shards.manifest.encoding or {}), "text_encoder_sha256": "9" * 64}
    shards.manifest = replace(shards.manifest, encoding=encoding)
    with pytest.raises(ValueError, match=r"encoded with text_encoder_sha256 999.* and recipe shapes-tiny needs"):
        check_data(stored, shards, inputs)


def test_text_states_of_another_width_are_refused(stored: Recipe) -> None:
    wide = replace(stored, model=replace(stored.model, condition_dim=256))
    with pytest.raises(
        ValueError, match=r"128 channels and recipe .* takes 256; set model\.condition_dim to 128, the width"
    ):
        check(wide)


def test_a_class_conditional_recipe_needs_a_class_in_every_sample(recipe: Recipe) -> None:
    classes = replace(
        recipe, model=replace(recipe.model, condition="class"), text_encoder=None,
        train=replace(recipe.train, sample_prompts=()),
    )  # fmt: skip
    shards = ShardSet(recipe.data.path)
    inputs = inputs_of(recipe, shards)
    check_data(classes, shards, inputs)
    shards.manifest = replace(shards.manifest, members={**shards.manifest.members, "cls": 95})
    with pytest.raises(
        ValueError, match=r"class-conditional, and 1 of 96 samples in .* have no \.cls member; give each"
    ):
        check_data(classes, shards, inputs)
    check_data(recipe, shards, inputs)  # a text model asks for no classes


@pytest.mark.parametrize(
    ("part", "change", "name"),
    [
        ("model", {"width": 64}, "model"),
        ("text_encoder", {"n_layer": 1}, "text_encoder"),
        ("data", {"lanes": 8}, "data.lanes"),
        ("data", {"validation": 32}, "data.validation"),
        ("train", {"seed": 1}, "train.seed"),
    ],
)
def test_a_run_folder_with_another_run_is_refused(recipe: Recipe, part: str, change: dict[str, Any], name: str) -> None:
    changed = replace(recipe, **{part: replace(getattr(recipe, part), **change)})
    check_resumable(changed, INPUTS)  # nothing has been saved yet, so there is nothing to go on from
    mark_checkpoint(recipe)
    with pytest.raises(ValueError, match=f"holds a run with another {name}; go on with what is in"):
        check_resumable(changed, INPUTS)
    # A longer schedule, other logging or another place of the data are no other run.
    longer = replace(recipe.train, steps=9999, log_every=7)
    check_resumable(replace(recipe, train=longer, data=replace(recipe.data, workers=3, path=Path("moved"))), INPUTS)


@pytest.mark.parametrize(
    ("given", "name"),
    [("data", "data.path"), ("tokenizer", "tokenizer"), ("text_encoder", "frozen_text_encoder")],
)
def test_a_run_goes_on_with_nothing_else_at_the_same_place(recipe: Recipe, given: str, name: str) -> None:
    mark_checkpoint(recipe)
    with pytest.raises(ValueError, match=f"holds a run with another {name}; go on"):
        check_resumable(recipe, replace(INPUTS, **{given: "other"}))


def test_a_checkpoint_of_another_version_is_named(recipe: Recipe) -> None:
    marker = mark_checkpoint(recipe) / "checkpoint.json"
    marker.write_text(json.dumps({"step": 4, "ranks": 2, "stage": 2, "global_batch": 16}))
    with pytest.raises(ValueError, match=r"checkpoint.json is not of this version"):
        check_resumable(recipe, INPUTS)


def test_the_vocabulary_of_a_run_is_made_once(recipe: Recipe) -> None:
    shards = ShardSet(recipe.data.path)
    first = vocabulary_of(recipe, shards)
    assert (recipe.run_dir / "spiece.model").read_bytes() == first
    (recipe.run_dir / "spiece.model").write_bytes(b"the run's own")
    assert vocabulary_of(recipe, shards) == b"the run's own"
    saved = mark_checkpoint(recipe) / "spiece.model"
    with pytest.raises(ValueError, match=r"has lost its spiece.model; copy it from another checkpoint"):
        vocabulary_of(recipe, shards)
    saved.write_bytes(b"the checkpoint's")
    assert vocabulary_of(recipe, shards) == b"the checkpoint's"


def test_a_lower_casing_text_encoder_has_a_lower_case_vocabulary(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(recipe.data.path)
    read = shards.read_encoded
    shout = lambda i, suffixes: replace(read(i, suffixes), caption=read(i, suffixes).caption.upper())  # noqa: E731
    monkeypatch.setattr(shards, "read_encoded", shout)
    assert recipe.text_encoder is not None
    config = replace(recipe.text_encoder, lower_case=True)
    encoder = TextEncoder.from_config(config, vocabulary_of(replace(recipe, text_encoder=config), shards))
    ids, _ = encoder.tokenize(["A PHOTO OF A STAR"])
    assert ids.shape[1] <= 7  # words, not letters
    assert torch.equal(ids, encoder.tokenize(["a photo of a star"])[0])


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


# Reporting


def test_what_happens_between_steps_is_left_out_of_the_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    window = _Window(SimpleNamespace(wait_seconds=0.0))  # type: ignore[arg-type]
    window.losses.append(torch.tensor(1.0))
    now[0] += 2
    with window.paused():
        now[0] += 50
    now[0] += 3
    assert window.seconds() == 5
