"""The interfaces that every judge implements; `eval.geneval.judges` has the judges by name.

A `Detector` finds objects; a `ColorClassifier` tells the colours of those that a prompt asks about. The shapes
judge does both at once and leaves its colours in the detections. Scoring and reports know only these interfaces.
"""

from collections.abc import Sequence
from typing import Protocol

from eval.geneval.detections import Box, Detection, Image
from eval.geneval.scoring import ScoringOptions

__all__ = ["Box", "ColorClassifier", "Detection", "Detector", "Image"]


class Detector(Protocol):
    """Finds objects in pictures."""

    @property
    def scoring(self) -> ScoringOptions:
        """The thresholds that fit this detector's scores."""
        ...

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        """All objects of each picture (uint8 [height, width, 3], sizes may differ), in any order."""
        ...


class ColorClassifier(Protocol):
    """Tells the colours of detected objects, many at once."""

    def classify(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        """The colour of each object, given the picture it was found in, in order."""
        ...
