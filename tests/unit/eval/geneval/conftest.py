"""Pictures to be judged, and judged ones for reports."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from judged_folders import PROMPTS, SHAPES_PROMPTS, MakeJudge, make_images
from PIL import Image
from report_pages import LOSSES, written

from data_pipeline import shapes
from data_pipeline.shapes import evaluation_metadata
from eval.files import write_jsonl
from eval.geneval.ceiling import ground_truth_pictures
from eval.geneval.judges import Judge, load_judge
from eval.geneval.judging import judge_pictures
from eval.geneval.options import JudgeOptions
from eval.geneval.results import Results, Source, read_results
from eval.geneval.shapes_judge import ShapesJudge
from eval.geneval.statistics import summarize

SOURCE = Source("tiny", 1200, "0123456789abcdef" * 4, "shapes", "2026-03-01T12:30:00+00:00")
IMAGES = 2


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
        rows = judge_pictures(ShapesJudge(), shown, len(shown), progress=False)
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


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_images(tmp_path_factory.mktemp("made") / "images", PROMPTS)


@pytest.fixture(scope="module")
def neural(small_detector: Path, small_clip: Path) -> MakeJudge:
    """neural(**options) -> the judge with the small models, which sees much."""

    def make(needs_colors: bool = True, **options: Any) -> Judge:
        defaults = {
            "detector": str(small_detector), "detector_size": (64, 96), "clip": f"local-dir:{small_clip}",
            "threshold": 0.02, "counting_threshold": 0.03,
        }  # fmt: skip
        return load_judge("mask2former", JudgeOptions(**{**defaults, **options}), needs_colors)

    return make


@pytest.fixture
def drawn(tmp_path: Path) -> Path:
    """Correct pictures of shapes prompts, three of each."""
    folder = make_images(tmp_path / "images", SHAPES_PROMPTS, pictures=0)
    for number, metadata in enumerate(SHAPES_PROMPTS):
        for picture in range(3):
            image = shapes.ground_truth(metadata, 3 * number + picture).image
            Image.fromarray(image).save(folder / f"{number:05d}/samples/{picture:04d}.png")
    return folder
