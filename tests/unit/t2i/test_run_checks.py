import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.index import ShardSet
from t2i.checkpoint import CheckpointInfo, Inputs, newest
from t2i.config import DataConfig, Recipe, to_json
from t2i.encoding import encode
from t2i.recipes import shapes_clips, shapes_tiny
from t2i.run_checks import check_data, check_resumable, inputs_of, vocabulary_of
from t2i.text_encoder import TextEncoder
from t2i.vq import VQConfig, VQModel


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
    info = CheckpointInfo(
        step=4, ranks=2, stage=2, global_batch=16, layout="", averaged=False, inspected=True, unreadable=0, inputs=INPUTS
    )  # fmt: skip
    (folder / "checkpoint.json").write_text(json.dumps(asdict(info)))
    return folder


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
    encoder = TextEncoder.from_config(recipe.text_encoder, vocabulary_of(recipe, ShardSet(recipe.data.path), None))
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
    mark_checkpoint(recipe)
    found = newest(recipe.run_dir)
    assert found is not None
    with pytest.raises(ValueError, match=f"holds a run with another {name}; go on with what is in"):
        check_resumable(changed, INPUTS, found)
    # A longer schedule, other logging or another place of the data are no other run.
    longer = replace(recipe.train, steps=9999, log_every=7)
    elsewhere = replace(recipe.data, workers=3, path=Path("moved"))
    check_resumable(replace(recipe, train=longer, data=elsewhere), INPUTS, found)


@pytest.mark.parametrize(
    ("given", "name"),
    [("data", "data.path"), ("tokenizer", "tokenizer"), ("text_encoder", "frozen_text_encoder")],
)
def test_a_run_goes_on_with_nothing_else_at_the_same_place(recipe: Recipe, given: str, name: str) -> None:
    mark_checkpoint(recipe)
    found = newest(recipe.run_dir)
    assert found is not None
    with pytest.raises(ValueError, match=f"holds a run with another {name}; go on"):
        check_resumable(recipe, replace(INPUTS, **{given: "other"}), found)


def test_a_checkpoint_of_another_version_is_named(recipe: Recipe) -> None:
    marker = mark_checkpoint(recipe) / "checkpoint.json"
    marker.write_text(json.dumps({"step": 4, "ranks": 2, "stage": 2, "global_batch": 16}))
    with pytest.raises(ValueError, match=r"checkpoint.json is not of this version"):
        newest(recipe.run_dir)


def test_the_vocabulary_of_a_run_is_made_once(recipe: Recipe) -> None:
    shards = ShardSet(recipe.data.path)
    first = vocabulary_of(recipe, shards, None)
    assert (recipe.run_dir / "spiece.model").read_bytes() == first
    (recipe.run_dir / "spiece.model").write_bytes(b"the run's own")
    assert vocabulary_of(recipe, shards, None) == b"the run's own"
    saved = mark_checkpoint(recipe) / "spiece.model"
    with pytest.raises(ValueError, match=r"has lost its spiece.model; copy it from another checkpoint"):
        vocabulary_of(recipe, shards, newest(recipe.run_dir))
    saved.write_bytes(b"the checkpoint's")
    assert vocabulary_of(recipe, shards, newest(recipe.run_dir)) == b"the checkpoint's"


def test_a_lower_casing_text_encoder_has_a_lower_case_vocabulary(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = ShardSet(recipe.data.path)
    read = shards.read_encoded
    shout = lambda i, suffixes: replace(read(i, suffixes), caption=read(i, suffixes).caption.upper())  # noqa: E731
    monkeypatch.setattr(shards, "read_encoded", shout)
    assert recipe.text_encoder is not None
    config = replace(recipe.text_encoder, lower_case=True)
    encoder = TextEncoder.from_config(config, vocabulary_of(replace(recipe, text_encoder=config), shards, None))
    ids, _ = encoder.tokenize(["A PHOTO OF A STAR"])
    assert ids.shape[1] <= 7  # words, not letters
    assert torch.equal(ids, encoder.tokenize(["a photo of a star"])[0])
