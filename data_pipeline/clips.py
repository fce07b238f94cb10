"""Clips of the embedded data set: one coloured shape that moves in one of four directions.

    t2i data shapes --frames 4 --out data/clips

A clip is a function of (seed, index), frames of 64x64 pixels over a background that stands still. Its class says which
shape moves in which direction (`clip_class`); where it starts, its colour and the background are left open.

A shape moves by whole tokens, so every frame is a picture that the shapes tokenizer knows. It rests for one frame and then
moves one token a frame. A NAR model draws all tokens of one level t + h + w together, without seeing each other
(arXiv 2503.10696): a shape that moved left or up from the start would stand at one level in all frames, and each frame
would have to guess for itself where it is. After the rest, the first frame's shape is drawn before any other frame's.

Shape suffixes: T frames.
"""

from dataclasses import dataclass

import numpy as np

from data_pipeline import shapes
from data_pipeline.shapes import CENTERS, COLORS, IMAGE_SIZE, RADIUS, SHAPES, PlacedShape

DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Names and unit steps (x right, y down)."""
CLASSES = len(SHAPES) * len(DIRECTIONS)
STEP = 8
"""Pixels that a shape moves in a frame: one token."""
MIN_FRAMES = 3
MAX_FRAMES = 1 + len(CENTERS)
"""Frames of the longest clip, in which the shape crosses the picture."""


@dataclass(frozen=True)
class ClipSample:
    """A clip: frames uint8 [T, 64, 64, 3], caption, class, and the shape as it stands in each frame."""

    frames: np.ndarray
    caption: str
    label: int
    objects: tuple[PlacedShape, ...]


def clip_class(shape: str, direction: str) -> int:
    """The class of a shape (of `SHAPES`) that moves in a direction (of `DIRECTIONS`): 0 to 31, shapes first."""
    return SHAPES.index(shape) * len(DIRECTIONS) + list(DIRECTIONS).index(direction)


def clip_meaning(label: int) -> tuple[str, str]:
    """Shape and direction of a class; the inverse of `clip_class`. Raises ValueError for a number that is none."""
    if not 0 <= label < CLASSES:
        raise ValueError(f"{label} is no class of the clips; classes are 0 to {CLASSES - 1}")
    return SHAPES[label // len(DIRECTIONS)], list(DIRECTIONS)[label % len(DIRECTIONS)]


def check_frames(frames: int) -> None:
    """Raise ValueError unless clips of that many frames can be made."""
    if not MIN_FRAMES <= frames <= MAX_FRAMES:
        raise ValueError(
            f"clips of {frames} frames cannot be made: a shape rests for one frame and then moves {STEP} pixels a frame, "
            f"so give {MIN_FRAMES} to {MAX_FRAMES}"
        )


def clip_of_class(label: int, frames: int, rng: np.random.Generator) -> ClipSample:
    """A random clip of a class. Raises ValueError for numbers of classes or frames that there are not."""
    check_frames(frames)
    shape, direction = clip_meaning(label)
    dx, dy = DIRECTIONS[direction]
    color = str(rng.choice(list(COLORS)))
    moved_T = STEP * np.maximum(np.arange(frames) - 1, 0)
    low, high = int(CENTERS[0]), int(CENTERS[-1])
    # Along the motion it starts where it stays inside to the end, across it anywhere.
    starts = []
    for step in (dx, dy):
        end = int(moved_T[-1]) * step
        starts.append(int(rng.choice(CENTERS[(low <= CENTERS + end) & (CENTERS + end <= high)])))
    objects = tuple(
        PlacedShape(shape, color, float(starts[0] + dx * moved), float(starts[1] + dy * moved), RADIUS)
        for moved in moved_T.tolist()
    )
    canvas = shapes.background(rng)
    pictures = np.stack([shapes.draw((placed,), canvas) for placed in objects])
    assert pictures.shape == (frames, IMAGE_SIZE, IMAGE_SIZE, 3)
    return ClipSample(pictures, f"a {color} {shape} moving {direction}", label, objects)


def clip_sample(seed: int, index: int, frames: int) -> ClipSample:
    """Sample `index` of the set of clips `seed`: always the same clip, whatever else is made."""
    rng = np.random.default_rng([seed, index, 4])
    return clip_of_class(int(rng.integers(CLASSES)), frames, rng)
