"""Clips side by side: as one animation, or as film strips in one picture.

Shape of arguments: clips are lists of frames, all of one length and size.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from data_pipeline.atomic import write_bytes
from data_pipeline.images import animation
from t2i.pipeline import picture_grid

ANIMATED = {".webp": "WEBP", ".gif": "GIF"}
"""Suffixes of file names that hold animations, and their formats."""

Clips = Sequence[Sequence[Image.Image]]


def film_strips(clips: Clips, columns: int = 1) -> Image.Image:
    """One picture of clips, the frames of each side by side from left to right, `columns` clips in a row."""
    strips = [picture_grid(frames, columns=len(frames)) for frames in clips]
    return picture_grid(strips, columns, gap=8)


def save_clips(clips: Clips, path: Path, columns: int, frame_ms: int) -> None:
    """Write clips to one file, `columns` in a row.

    A name in `.webp` (lossless) or `.gif` (256 colours) gives an animation in which all play at once, over and over, each
    frame for `frame_ms` milliseconds (at least 10, the finest step of a GIF); any other picture format gives film strips.
    """
    assert frame_ms >= 10, frame_ms
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = ANIMATED.get(path.suffix.lower())
    if kind is None:
        film_strips(clips, columns).save(path)
    else:
        pages = [picture_grid(frames, columns) for frames in zip(*clips, strict=True)]
        write_bytes(path, animation(pages, kind, frame_ms))
