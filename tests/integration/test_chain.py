"""The commands of the quick start, one after the other, on a small scale."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from data_pipeline.index import load_manifest

from .conftest import SAMPLES, t2i

pytestmark = pytest.mark.slow


def test_from_pictures_to_a_score(data: Path, trained: Callable[[int], Path], tmp_path: Path) -> None:
    raw, encoded = load_manifest(data.parent / "raw"), load_manifest(data)
    assert (raw.samples, raw.read, raw.quarantined) == (SAMPLES, SAMPLES, {})
    assert (encoded.samples, encoded.kind) == (SAMPLES, "encoded")
    run, export = trained(2), tmp_path / "export"

    done = t2i("export", run, "--out", export)
    assert done.returncode == 0, done.stderr
    assert f"step 8 of small exported to {export}" in done.stdout
    assert {path.name for path in export.iterdir()} == {"config.json", "model.safetensors", "text_encoder", "tokenizer"}

    picture = tmp_path / "new" / "grid.png"
    prompts = ("a photo of a red circle left of a blue star", "a photo of two hearts")
    done = t2i("sample", export, *prompts, "--out", picture, "--images", "3", "--seed", "4")
    assert done.returncode == 0, done.stderr
    assert Image.open(picture).size == (3 * 66 - 2, 2 * 66 - 2)

    done = t2i("geneval", "run", export, "--per-task", "2", "--images-per-prompt", "1", "--run-dir", run)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (export / "geneval" / "results.jsonl").read_text().splitlines()]
    assert len(results) == 6 * 2
    for task in ("single_object", "two_object", "counting", "colors", "position", "color_attr", "overall"):
        assert re.search(task.replace("_", "[ _]"), done.stdout, re.IGNORECASE), done.stdout
    assert "report.html" in done.stdout.replace("\n", "")
    assert (export / "geneval" / "report.html").stat().st_size > 10_000
