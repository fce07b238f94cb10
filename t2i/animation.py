"""Clips side by side, as one animation or as film strips in one picture, and animations of samples coming into being.

Shape of arguments: clips are lists of frames, all of one length and size.
"""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from torch import Tensor

from data_pipeline.atomic import write_bytes
from data_pipeline.images import animation
from t2i.pipeline import TextToImagePipeline, picture_grid

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


PASS_MS, LAST_PASSES = 80, 20  # how long a pass is shown, and for how many of them the finished samples


class Recording:
    """Samples coming into being: given to a pipeline as `watch`, it keeps a page for each pass."""

    def __init__(self, pipe: TextToImagePipeline, columns: int) -> None:
        """`columns` pictures, or film strips of clips, in a row."""
        self._pipe, self._columns = pipe, columns
        self.pages: list[Image.Image] = []

    def __call__(self, number: int, tokens: Tensor) -> None:
        pixels = self._pipe.unfinished(tokens)
        if pixels.ndim == 5:
            clips = [[Image.fromarray(frame) for frame in clip] for clip in pixels]
            self.pages.append(film_strips(clips, self._columns))
        else:
            self.pages.append(picture_grid([Image.fromarray(picture) for picture in pixels], self._columns))

    def save(self, path: Path) -> None:
        """Write the animation, to a name in `.webp` or `.gif`."""
        path.parent.mkdir(parents=True, exist_ok=True)
        pages = self.pages + self.pages[-1:] * LAST_PASSES
        write_bytes(path, animation(pages, ANIMATED[path.suffix.lower()], PASS_MS))
