"""A real export with a small random model, for tests that run the whole evaluation."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from data_pipeline.shapes import evaluation_metadata
from t2i.config import ModelConfig, SampleConfig
from t2i.model import NAR
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece
from t2i.vq import load_vq

MakeExport = Callable[..., Path]


@pytest.fixture(scope="session")
def make_export(tmp_path_factory: pytest.TempPathFactory) -> MakeExport:
    """make_export(seed=0, step=30) -> folder of a text-to-image model with random weights and the shipped tokenizer."""
    vocabulary = tmp_path_factory.mktemp("vocabulary") / "spiece.model"
    train_sentencepiece([entry["prompt"] for entry in evaluation_metadata(20)], 310, vocabulary)

    def make(folder: Path | None = None, seed: int = 0, step: int = 30) -> Path:
        torch.manual_seed(seed)
        folder = folder or tmp_path_factory.mktemp("export")
        config = ModelConfig(
            grid=(8, 8), vocab_size=512, n_layer=1, n_head=2, width=16, condition_dim=16, max_condition=32, dropout=0.0
        )
        text_encoder = TextEncoder.from_config(
            TextEncoderConfig(vocab_size=310, dim=16, n_layer=1, n_head=2, ffn_dim=16, max_length=32), vocabulary
        )
        pipe = TextToImagePipeline(
            NAR(config), load_vq("shapes"), text_encoder, SampleConfig(guidance_scale=1.0), 64,
            Provenance("tiny <test>", step),
        )  # fmt: skip
        pipe.save_pretrained(folder)
        return folder

    return make
