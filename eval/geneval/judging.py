"""From pictures to the lines of results.jsonl: detector, colours and rules over any number of pictures, in batches."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tqdm import tqdm

from data_pipeline.images import read_rgb
from eval.ahead import done_ahead
from eval.geneval.detections import Detection, Image
from eval.geneval.detectors import ColorClassifier, Detector
from eval.geneval.prompts import Metadata
from eval.geneval.scoring import color_candidates, judge_picture, keep_detections, result_row, unreadable_row

__all__ = ["Picture", "batched", "judge_pictures", "judged", "read_picture", "read_pictures"]

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


def read_picture(path: Path, filename: str, metadata: Metadata) -> Picture:
    """A picture from its file, as `data_pipeline.images.open_rgb` decodes it; with a `problem` where it cannot be read."""
    try:
        return Picture(filename, metadata, np.asarray(read_rgb(path)))
    except ValueError as error:
        return Picture(filename, metadata, None, str(error))


def read_pictures(files: Iterable[tuple[Path, str, Metadata]], ahead: int = 32) -> Iterator[Picture]:
    """Pictures of (path, filename, metadata) in order, at most `ahead` of them decoded before they are asked for."""
    return done_ahead(lambda file: read_picture(*file), files, ahead)


def judged(
    detector: Detector,
    pictures: Iterable[Picture],
    batch_size: int = 64,
    colors: ColorClassifier | None = None,
) -> Iterator[dict[str, Any]]:
    """One results.jsonl line for each picture, in order; see `eval.geneval.scoring.result_row`.

    Args:
        detector: Finds the objects; its `scoring` holds the thresholds.
        pictures: Taken a batch at a time.
        batch_size: Pictures that the detector gets at once.
        colors: Tells the colours of a batch's objects at once, of those that prompts ask about; None where the detector
            tells them.
    """
    for batch in batched(pictures, batch_size):
        readable = [picture for picture in batch if picture.image is not None]
        found = detector.detect([picture.image for picture in readable if picture.image is not None])
        if colors is not None:
            found = _colored(readable, found, detector, colors)
        detections = iter(found)
        for picture in batch:
            if picture.image is None:
                yield unreadable_row(picture.filename, picture.metadata, picture.problem)
            else:
                verdict = judge_picture(next(detections), picture.metadata, detector.scoring)
                yield result_row(picture.filename, picture.metadata, verdict)


def _colored(
    pictures: Sequence[Picture], found: Sequence[list[Detection]], detector: Detector, classifier: ColorClassifier
) -> list[list[Detection]]:
    """The detections of each picture, those with their colours whose colours its prompt asks for."""
    asked: list[tuple[Image, Detection]] = []
    for picture, detections in zip(pictures, found, strict=True):
        kept = keep_detections(detections, picture.metadata["tag"], detector.scoring)
        assert picture.image is not None
        asked += [(picture.image, detection) for detection in color_candidates(kept, picture.metadata)]
    names = classifier.classify(asked) if asked else []
    colors = {id(detection): name for (_, detection), name in zip(asked, names, strict=True)}
    return [
        [replace(one, color=colors[id(one)]) if id(one) in colors else one for one in detections]
        for detections in found
    ]


def judge_pictures(
    detector: Detector,
    pictures: Iterable[Picture],
    total: int,
    batch_size: int = 64,
    what: str = "judge",
    progress: bool = True,
    colors: ColorClassifier | None = None,
) -> list[dict[str, Any]]:
    """What `judged` gives, with a progress bar called `what` over `total` pictures."""
    rows = list(
        tqdm(
            judged(detector, pictures, batch_size, colors), total=total, desc=what, unit="picture",
            disable=not progress,
        )
    )  # fmt: skip
    assert len(rows) == total, (len(rows), total)
    return rows
