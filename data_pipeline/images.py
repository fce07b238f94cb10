"""Pictures as bytes to 8-bit RGB, the same way wherever a picture is decoded.

Verification, encoding and evaluation all decode through `open_rgb`, so what the index accepted is what the
tokenizer sees. Shape suffixes: S side in pixels, C channels.
"""

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, UnidentifiedImageError

IMAGE_SUFFIXES: Final = ("jpg", "jpeg", "png", "webp")
CROP_POLICY: Final = "center-square-bicubic-v1"
"""Name of what `center_crop_resize` does, recorded with everything encoded from its output."""

_FORMATS: Final = ("JPEG", "PNG", "WEBP")
# A JPEG of several pictures is a still in two qualities or from two eyes, not an animation.
_ANIMATED: Final = ("PNG", "WEBP")
_EXIF_ORIENTATION: Final = 0x0112
_TURNS: Final = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture upright, by its EXIF orientation; with any other it is upright."""
_WHITE: Final = (255, 255, 255)


def open_rgb(data: bytes) -> Image.Image:
    """Decode one JPEG, PNG or WebP file to an 8-bit RGB picture.

    - Transparency of any kind (RGBA, LA, a palette entry, a colour key) is laid over white.
    - 16-bit grey is scaled by 257, not clipped; 16-bit colour keeps its high byte.
    - CMYK and YCCK JPEGs are converted (naively: colour profiles are ignored in every format).
    - The EXIF orientation is applied, so width and height are those that a viewer shows.
    - Of an animation, the first frame (`open_frames` gives them all).

    The format is read from the bytes, so a PNG named `.jpg` opens. The whole picture is decoded, so a
    truncated file is an error here. Raises ValueError with the decoder's reason when the bytes are no
    readable picture, or unpack to more pixels than Pillow's decompression-bomb limit.
    """
    return next(_frames(data))[0]


def read_rgb(path: Path) -> Image.Image:
    """The picture in a file, as `open_rgb` decodes it.

    Raises ValueError with the reason, which does not name the file, where that is missing, may not be read or is no picture.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
    return open_rgb(data)


def open_frames(data: bytes) -> list[Image.Image]:
    """Decode all frames of an animated PNG or WebP file, each as `open_rgb` does; a still picture is one frame.

    Frames follow each other at the pace of the one that is shown most briefly; one that is shown k times as long (rounded)
    stands there k times, and one without a time stands there once. Frames cannot just be counted: of frames that are equal
    to the one before, encoders leave nothing but its longer duration. Raises ValueError as `open_rgb` does, for any frame.
    """
    shown = list(_frames(data))
    briefest = min((duration for _, duration in shown if duration > 0), default=1)
    return [image for image, duration in shown for _ in range(max(1, round(duration / briefest)))]


def verify_frames(data: bytes) -> tuple[int, int]:
    """Decode every frame of a picture, one in memory at a time; returns (width, height). Raises ValueError as `open_rgb`."""
    for image, _ in _frames(data):
        size = image.size
    return size


def animation(frames: Sequence[Image.Image], kind: str, frame_ms: int) -> bytes:
    """RGB frames of one size as an animation that runs for ever, each shown for `frame_ms` milliseconds.

    `kind` "WEBP" is lossless; "GIF" has 256 colours a frame and times in steps of 10 ms.
    """
    assert kind in ("WEBP", "GIF"), kind
    stream = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    frames[0].save(stream, kind, save_all=True, append_images=frames[1:], duration=frame_ms, loop=0, **options)
    return stream.getvalue()


def _frames(data: bytes) -> Iterator[tuple[Image.Image, int]]:
    """Each frame of a picture as RGB, and for how many milliseconds it is shown (0 where nothing is said)."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        count = getattr(image, "n_frames", 1) if image.format in _ANIMATED else 1
        for number in range(count):
            image.seek(number)
            image.load()
            frame = _over_white(_upright(image))
            # The next frame is decoded into the same picture.
            yield frame.copy() if count > 1 else frame, round(image.info.get("duration", 0))
    # Decoders raise OSError, SyntaxError, struct.error, EOFError and more for bad bytes.
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            reason = "not a JPEG, PNG or WebP file"
        raise ValueError(f"undecodable picture of {len(data)} bytes: {' '.join(reason.split())}") from error


def center_crop_resize(image: Image.Image, size: int) -> np.ndarray:
    """The largest central square of an RGB picture, resampled to `size` pixels a side.

    Bicubic with a support that grows with the reduction (Pillow's), so shrinking does not alias; a smaller
    picture is enlarged. A picture of the right size passes through untouched. Returns uint8 [S, S, C=3].
    """
    assert image.mode == "RGB", image.mode
    width, height = image.size
    if (width, height) == (size, size):
        return np.array(image)
    side = min(width, height)
    left, top = (width - side) // 2, (height - side) // 2
    square = image.crop((left, top, left + side, top + side))  # resize's own `box` lets pixels outside bleed in
    return np.array(square.resize((size, size), Image.Resampling.BICUBIC))


def _upright(image: Image.Image) -> Image.Image:
    # ImageOps.exif_transpose also writes the EXIF block anew, which fails where an entry that nobody needs is malformed.
    try:
        turn = _TURNS.get(image.getexif().get(_EXIF_ORIENTATION, 1))
    except Exception:  # a malformed EXIF block says nothing about the pixels, which are fine
        return image
    return image if turn is None else image.transpose(turn)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):
        return _from_16_bit_grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    canvas = Image.new("RGB", rgba.size, _WHITE)
    canvas.paste(rgba, mask=rgba.getchannel("A"))
    return canvas


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    grey = np.asarray(image).astype(np.int64)
    scaled = (grey + 128) // 257
    key = image.info.get("transparency")
    if isinstance(key, int):
        scaled[grey == key] = 255
    return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
