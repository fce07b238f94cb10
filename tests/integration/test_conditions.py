"""The other two kinds of conditions, in one process without the launcher: classes, and stored states of a frozen T5."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t2i.checkpoint import checkpoints
from t2i.config import EvalConfig
from t2i.encoding import encode
from t2i.export import export, merged_weights
from t2i.pipeline import TextToImagePipeline
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece

from .conftest import VALIDATION, results, small_recipe, train_alone

pytestmark = pytest.mark.slow


def assert_average_of_two_steps(run_dir: Path) -> None:
    """The average starts at the weights of step 1; step 2 moves it by 1 - (1 + 2) / (10 + 2) of the way."""
    first, second = checkpoints(run_dir)
    raw = [merged_weights(one) for one in (first, second)]
    average = merged_weights(second, averaged=True)
    assert not all(torch.equal(raw[0][name], raw[1][name]) for name in average)
    for name, tensor in average.items():
        torch.testing.assert_close(tensor, 0.25 * raw[0][name] + 0.75 * raw[1][name], rtol=1e-6, atol=1e-7)


def test_classes_in_bf16_under_zero_3(data: Path, tmp_path: Path) -> None:
    small = small_recipe(data)
    recipe = replace(
        small,
        model=replace(small.model, condition="class", num_classes=8, condition_dropout=0.0),
        text_encoder=None,
        eval=EvalConfig(),
        train=replace(
            small.train,
            steps=2,
            sample_prompts=("0", "7"),
            sample_every=2,
            save_every=1,
            head_init="codebook",
        ),
        run_dir=tmp_path / "run",
    )
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    run_dir = train_alone(recipe, config, tmp_path)
    assert (run_dir / "samples" / "step-00000002.png").is_file()
    assert all(0 < row.get("loss", 1) < 8 for row in results(run_dir))
    assert_average_of_two_steps(run_dir)
    export(run_dir, tmp_path / "export")
    pipe = TextToImagePipeline.from_pretrained(tmp_path / "export")
    assert {p.dtype for p in pipe.model.parameters()} == {torch.float32}
    assert len(pipe([0, 7], seed=0)) == 2


def test_stored_states_of_a_frozen_encoder(data: Path, tmp_path: Path) -> None:
    train_sentencepiece(["a photo of a red circle", "two blue stars"], 280, tmp_path / "spiece.model")
    config = TextEncoderConfig(vocab_size=280, dim=32, n_layer=1, n_head=2, ffn_dim=16, max_length=48)
    TextEncoder.from_config(config, tmp_path / "spiece.model").save_pretrained(tmp_path / "t5")
    encode(
        data.parent / "raw",
        tmp_path / "encoded",
        tokenizer="shapes",
        image_size=64,
        text_encoder=str(tmp_path / "t5"),
        device="cpu",
    )
    small = small_recipe(tmp_path / "encoded")
    recipe = replace(
        small,
        # Shorter than some captions, and with the published way to drop them.
        model=replace(small.model, max_condition=16, uncond_tokens=16, uncond_mask="caption", prefix_rotary="zero"),
        text_encoder=None,
        frozen_text_encoder=str(tmp_path / "t5"),
        train=replace(
            small.train, steps=2, sample_prompts=(), sample_every=2, save_every=1, activation_checkpointing=True
        ),
        run_dir=tmp_path / "run",
    )
    assert recipe.data.validation == VALIDATION
    run_dir = train_alone(recipe, {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 1}}, tmp_path)
    assert (run_dir / "samples" / "step-00000002.png").is_file()
    assert_average_of_two_steps(run_dir)
    export(run_dir, tmp_path / "export")
    # The encoder is in the export: the folder that it came from is no longer needed.
    (tmp_path / "t5").rename(tmp_path / "elsewhere")
    assert len(TextToImagePipeline.from_pretrained(tmp_path / "export")("a photo of a red circle", seed=0)) == 1
