"""From pictures to the lines of results.jsonl: detector, colours and rules over any number of pictures, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image as PillowImage
from PIL import UnidentifiedImageError
from tqdm import tqdm

from eval.generate import sample_path
from eval.geneval.detections import Image
from eval.geneval.detectors import Detector
from eval.geneval.prompts import Metadata
from eval.geneval.scoring import judge_picture, result_row, unreadable_row

__all__ = ["Picture", "batched", "judge_pictures", "pictures_of"]

Item = TypeVar("Item")


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture to judge, or the reason why it cannot be read.

    Attributes:
        filename: What results.jsonl calls it.
        metadata: GenEval's entry of its prompt.
        image: uint8 [height, width, 3]; None where it cannot be read.
        problem: Why it cannot be read.
    """

    filename: str
    metadata: Metadata
    image: Image | None
    problem: str = ""


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` successive items, the last one perhaps shorter."""
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def pictures_of(
    folder: Path, prompts: Sequence[Metadata], images_per_prompt: int, relative_to: Path
) -> Iterator[Picture]:
    """The first `images_per_prompt` pictures of each prompt in a folder of the published layout, read one by one.

    Filenames are relative to `relative_to`. A missing or damaged file is a picture with a `problem`.
    """
    for index, metadata in enumerate(prompts):
        for number in range(images_per_prompt):
            path = sample_path(folder, index, number)
            name = path.relative_to(relative_to).as_posix()
            try:
                with PillowImage.open(path) as image:
                    yield Picture(name, metadata, np.asarray(image.convert("RGB")))
            except (OSError, SyntaxError, UnidentifiedImageError) as error:  # Pillow's PNG reader raises SyntaxError
                yield Picture(name, metadata, None, type(error).__name__)


def judge_pictures(
    detector: Detector,
    pictures: Iterable[Picture],
    total: int,
    batch_size: int = 64,
    what: str = "judge",
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Judge pictures and give one results.jsonl line for each, in order; see `eval.geneval.scoring.result_row`.

    Args:
        detector: Finds the objects; its `scoring` holds the thresholds.
        pictures: Read as they are needed, so that only a batch is in memory.
        total: How many there are, for the progress bar.
        batch_size: Pictures that the detector gets at once.
        what: Name of the progress bar.
        progress: Show it.
    """
    rows: list[dict[str, Any]] = []
    with tqdm(total=total, desc=what, unit="picture", disable=not progress) as bar:
        for batch in batched(pictures, batch_size):
            found = iter(detector.detect([picture.image for picture in batch if picture.image is not None]))
            for picture in batch:
                if picture.image is None:
                    rows.append(unreadable_row(picture.filename, picture.metadata, picture.problem))
                else:
                    verdict = judge_picture(next(found), picture.metadata, detector.scoring)
                    rows.append(result_row(picture.filename, picture.metadata, verdict))
            bar.update(len(batch))
    assert len(rows) == total, (len(rows), total)
    return rows
