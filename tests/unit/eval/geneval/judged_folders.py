"""Folders of pictures in the published layout, and judges to score them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline import shapes
from eval.geneval.detectors import Detector
from eval.geneval.judges import Judge, load_judge
from eval.geneval.options import JudgeOptions
from eval.geneval.prompts import coco_prompts, shapes_prompts

PROMPTS = [entry for tag in shapes.TASKS for entry in [e for e in coco_prompts(per_task=2) if e["tag"] == tag][:2]]


def make_images(folder: Path, prompts: list[dict[str, Any]], pictures: int = 2, size: int = 48) -> Path:
    """A folder in the published layout, of noise in blocks."""
    rng = np.random.default_rng(0)
    for number, metadata in enumerate(prompts):
        samples = folder / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        for picture in range(pictures):
            blocks = rng.integers(0, 256, (size // 8, size // 8, 3), dtype=np.uint8)
            Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(samples / f"{picture:04d}.png")
        Image.new("RGB", (4, 4)).save(samples.parent / "grid.png")
    return folder


MakeJudge = Callable[..., Judge]


class Counting:
    """A judge's detector, and how many pictures it was given."""

    def __init__(self, detector: Detector, stop_after: int | None = None) -> None:
        self._detector, self.scoring, self._stop_after = detector, detector.scoring, stop_after
        self.pictures = 0

    def detect(self, images: Any) -> Any:
        if self._stop_after is not None and self.pictures >= self._stop_after:
            raise KeyboardInterrupt
        self.pictures += len(images)
        return self._detector.detect(images)


def counting(judge: Judge, stop_after: int | None = None) -> Counting:
    detector = Counting(judge.detector, stop_after)
    judge.__dict__["detector"] = detector  # where the cached property keeps it
    return detector


SHAPES_PROMPTS = shapes_prompts(per_task=2)


def shapes_judge(**options: Any) -> Judge:
    return load_judge("shapes", JudgeOptions(**options))
