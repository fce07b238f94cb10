"""What a judge sees in a picture: one `Detection` per object, whoever the judge is."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Box", "Detection", "Image"]

Image = NDArray[np.uint8]
"""A picture, uint8 [height, width, 3], RGB."""

Box = tuple[float, float, float, float]
"""A box (x0, y0, x1, y1) in pixels, y growing downwards."""


@dataclass(frozen=True, eq=False)
class Detection:
    """One object found in a picture.

    Attributes:
        class_name: Its class, in the prompts' vocabulary.
        box: Its extent (x0, y0, x1, y1) in pixels.
        score: The detector's confidence, 0 to 1.
        mask: Its pixels, bool [height, width]; None where only boxes are known.
        color: Its colour, where the detector already tells it.
    """

    class_name: str
    box: Box
    score: float
    mask: NDArray[np.bool_] | None = None
    color: str | None = None
