"""Pictures as bytes to 8-bit RGB, the same way wherever a picture is decoded.

Verification, encoding and evaluation all decode through `open_rgb`, so what the index accepted is what the
tokenizer sees. Shape suffixes: S side in pixels, C channels.
"""

import io
from typing import Final

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

IMAGE_SUFFIXES: Final = ("jpg", "jpeg", "png", "webp")
CROP_POLICY: Final = "center-square-bicubic-v1"
"""Name of what `center_crop_resize` does, recorded with everything encoded from its output."""

_FORMATS: Final = ("JPEG", "PNG", "WEBP")
_EXIF_ORIENTATION: Final = 0x0112
_WHITE: Final = (255, 255, 255)


def open_rgb(data: bytes) -> Image.Image:
    """Decode one JPEG, PNG or WebP file to an 8-bit RGB picture.

    - Transparency of any kind (RGBA, LA, a palette entry, a colour key) is laid over white.
    - 16-bit grey is scaled by 257, not clipped; 16-bit colour keeps its high byte.
    - CMYK and YCCK JPEGs are converted (naively: colour profiles are ignored in every format).
    - The EXIF orientation is applied, so width and height are those that a viewer shows.
    - Of an animation, the first frame.

    The format is read from the bytes, so a PNG named `.jpg` opens. The whole picture is decoded, so a
    truncated file is an error here. Raises ValueError with the decoder's reason when the bytes are no
    readable picture, or unpack to more pixels than Pillow's decompression-bomb limit.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=_FORMATS)
        image.load()
        return _over_white(_upright(image))
    # Decoders raise OSError, SyntaxError, struct.error, EOFError and more for bad bytes.
    except Exception as error:
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        if isinstance(error, UnidentifiedImageError):
            reason = "not a JPEG, PNG or WebP file"
        raise ValueError(f"undecodable picture of {len(data)} bytes: {reason}") from error


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
    try:
        turned = image.getexif().get(_EXIF_ORIENTATION, 1) != 1
    except Exception:  # a malformed EXIF block says nothing about the pixels, which are fine
        return image
    return ImageOps.exif_transpose(image) if turned else image


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
