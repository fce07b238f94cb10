"""Batches, counts and unreadable files on the way from pictures to results."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from eval.generate import sample_path
from eval.geneval.ceiling import ground_truth_pictures, reconstructed_pictures
from eval.geneval.detections import Detection, Image
from eval.geneval.judging import Picture, batched, judge_pictures, pictures_of
from eval.geneval.prompts import shapes_prompts
from eval.geneval.scoring import ScoringOptions

METADATA = {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"}


class BrightnessDetector:
    """Sees a star in a bright picture; remembers the sizes of its batches."""

    scoring = ScoringOptions()

    def __init__(self) -> None:
        self.batches: list[int] = []

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        self.batches.append(len(images))
        return [[Detection("star", (0, 0, 1, 1), 0.9)] if image.mean() > 100 else [] for image in images]


def gray(value: int) -> Image:
    return np.full((2, 2, 3), value, dtype=np.uint8)


@given(st.lists(st.integers()), st.integers(1, 7))
def test_batches_hold_everything_in_order(items: list[int], size: int) -> None:
    batches = list(batched(items, size))
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(batches)


def test_verdicts_meet_their_pictures_around_unreadable_ones() -> None:
    values = [200, None, 0, 200, None, 0, 200]
    pictures = [Picture(f"{i}", METADATA, None if v is None else gray(v), "gone") for i, v in enumerate(values)]
    detector = BrightnessDetector()
    rows = judge_pictures(detector, pictures, len(pictures), batch_size=3, progress=False)
    assert [row["filename"] for row in rows] == [f"{i}" for i in range(7)]
    assert [row["correct"] for row in rows] == [value == 200 for value in values]
    assert [row.get("unreadable", False) for row in rows] == [value is None for value in values]
    assert "gone" in rows[1]["reason"]
    assert detector.batches == [2, 2, 1]


def test_no_more_than_a_batch_is_read_ahead() -> None:
    read = 0

    def pictures() -> Iterator[Picture]:
        nonlocal read
        for number in range(10):
            read += 1
            yield Picture(f"{number}", METADATA, gray(0))

    class Watching(BrightnessDetector):
        def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
            assert read <= 4 * (len(self.batches) + 1)
            return super().detect(images)

    judge_pictures(Watching(), pictures(), 10, batch_size=4, progress=False)


def test_folders_are_read_in_order_and_damage_is_kept(tmp_path: Path) -> None:
    for index in range(2):
        for number in range(2):
            path = sample_path(tmp_path, index, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            PillowImage.fromarray(gray(100 * index + number)).save(path)
    sample_path(tmp_path, 0, 1).write_bytes(b"not a picture")
    sample_path(tmp_path, 1, 0).unlink()
    pictures = list(pictures_of(tmp_path, [METADATA, METADATA], 2, tmp_path))
    assert [picture.filename for picture in pictures] == [
        "00000/samples/0000.png", "00000/samples/0001.png", "00001/samples/0000.png", "00001/samples/0001.png",
    ]  # fmt: skip
    assert [picture.problem for picture in pictures] == ["", "UnidentifiedImageError", "FileNotFoundError", ""]
    assert pictures[3].image is not None
    assert (pictures[3].image == 101).all()


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_reconstructions_meet_their_prompts(batch_size: int) -> None:
    prompts = shapes_prompts(2)
    sizes = []

    def inverted(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return 255 - images

    correct = list(ground_truth_pictures(prompts, 2))
    rebuilt = list(reconstructed_pictures(prompts, 2, inverted, batch_size))
    assert len(correct) == len(rebuilt) == 24
    assert max(sizes) <= batch_size
    for one, other in zip(correct, rebuilt, strict=True):
        assert one.metadata is other.metadata
        assert one.image is not None
        np.testing.assert_array_equal(255 - one.image, other.image)
