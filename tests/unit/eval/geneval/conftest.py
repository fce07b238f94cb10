"""A real export with a small random model, for tests that run the whole evaluation, and judged pictures for reports."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_pages import LOSSES, written

from data_pipeline.shapes import evaluation_metadata
from eval.files import write_jsonl
from eval.geneval.ceiling import ground_truth_pictures
from eval.geneval.detectors import load_detector
from eval.geneval.judging import judge_pictures
from eval.geneval.results import Results, Source, read_results
from eval.geneval.statistics import summarize
from t2i.config import ModelConfig, SampleConfig
from t2i.model import NAR
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.text_encoder import TextEncoder, TextEncoderConfig, train_sentencepiece
from t2i.vq import load_vq

SOURCE = Source("tiny", 1200, "0123456789abcdef" * 4, "shapes", "2026-03-01T12:30:00+00:00")
IMAGES = 2
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


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Results]:
    """Two models, two prompts a task: correct pictures, some of which (more of the second) are of another prompt."""
    prompts = evaluation_metadata(per_task=2)
    pictures = list(ground_truth_pictures(prompts, IMAGES))
    made = []
    for name, every in (("first", 4), ("second", 2)):
        root = tmp_path_factory.mktemp(name)
        shown = [
            replace(picture, image=pictures[(place + 7 * (place % every == 1)) % len(pictures)].image)
            for place, picture in enumerate(pictures)
        ]
        for picture in shown:
            assert picture.image is not None
            file = root / f"{picture.filename}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture.image).save(file)
        rows = judge_pictures(load_detector("shapes"), shown, len(shown), progress=False)
        assert 0 < sum(row["correct"] for row in rows) < len(rows)
        write_jsonl(root / "results.jsonl", [{**row, "filename": f"{row['filename']}.png"} for row in rows])
        made.append(read_results(f"{name}={root}"))
    assert sum(one.correct for one in made[0].pictures) > sum(one.correct for one in made[1].pictures)
    ceilings = {
        "ground truth": summarize(made[0].rows),
        "colors only": summarize([r for r in made[0].rows if r["tag"] == "colors"]),
    }
    return [replace(made[0], ceilings=ceilings, source=SOURCE), made[1]]


@pytest.fixture(scope="session")
def page(models: list[Results], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the first model alone."""
    return written(models[:1], tmp_path_factory.mktemp("page"), LOSSES)


@pytest.fixture(scope="session")
def both(models: list[Results], tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of the two side by side."""
    return written(models, tmp_path_factory.mktemp("both"))
