import contextlib
import io
import itertools
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from data_pipeline.images import animation, center_crop_resize, open_frames, open_rgb, read_rgb, verify_frames


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def pixel(data: bytes, x: int = 0, y: int = 0) -> tuple[int, ...]:
    image = open_rgb(data)
    assert image.mode == "RGB"
    value = image.getpixel((x, y))
    assert isinstance(value, tuple)
    return value


def png_16_bit_color(values: tuple[int, int, int], width: int = 4, height: int = 4) -> bytes:
    """Written by hand, because Pillow does not write 16-bit colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = (b"\0" + struct.pack(">3H", *values) * width) * height
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_transparency_goes_over_white() -> None:
    for alpha, expected in ((0, (255, 255, 255)), (255, (200, 0, 0)), (128, (227, 127, 127))):
        rgba = Image.new("RGBA", (4, 4), (200, 0, 0, alpha))
        assert np.abs(np.subtract(pixel(encoded(rgba)), expected)).max() <= 1
        assert np.abs(np.subtract(pixel(encoded(rgba, "WEBP", lossless=True, exact=True)), expected)).max() <= 1


def test_transparency_of_other_modes_goes_over_white() -> None:
    assert pixel(encoded(Image.new("LA", (4, 4), (9, 0)))) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    assert pixel(encoded(palette)) == (255, 0, 0)
    assert pixel(encoded(palette, transparency=1)) == (255, 255, 255)
    assert pixel(encoded(Image.new("RGB", (4, 4), (1, 2, 3)), transparency=(1, 2, 3))) == (255, 255, 255)
    assert pixel(encoded(Image.new("L", (4, 4), 7), transparency=7)) == (255, 255, 255)
    assert pixel(encoded(Image.new("1", (4, 4), 1))) == (255, 255, 255)


def test_sixteen_bit_pictures_are_scaled_not_clipped() -> None:
    for value, expected in ((0, 0), (257 * 100, 100), (32768, 128), (65535, 255), (300, 1)):
        grey = Image.fromarray(np.full((4, 4), value, np.uint16))
        assert pixel(encoded(grey)) == (expected,) * 3
    assert pixel(png_16_bit_color((65535, 257 * 100, 0))) == (255, 100, 0)


def test_sixteen_bit_grey_with_a_transparent_value_goes_over_white() -> None:
    grey = np.full((4, 4), 500, np.uint16)
    grey[0, 1] = 25700
    data = encoded(Image.fromarray(grey))
    header_end = data.index(b"IDAT") - 4
    body = b"tRNS" + struct.pack(">H", 500)
    chunk = struct.pack(">I", 2) + body + struct.pack(">I", zlib.crc32(body))
    keyed = data[:header_end] + chunk + data[header_end:]
    assert pixel(keyed) == (255, 255, 255)
    assert pixel(keyed, x=1) == (100, 100, 100)


def test_cmyk_jpeg_keeps_its_colors() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    assert np.abs(np.subtract(pixel(encoded(red, "JPEG", quality=95)), (255, 0, 0))).max() <= 8


def test_grey_jpeg_becomes_rgb() -> None:
    assert pixel(encoded(Image.new("L", (16, 16), 90), "JPEG")) == (90, 90, 90)


def test_an_animation_gives_its_first_frame() -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    for kind in ("WEBP", "PNG"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True, duration=50)
        assert pixel(data) == (250, 0, 0)


def test_exif_orientation_is_applied() -> None:
    image = Image.new("RGB", (20, 10), (0, 0, 255))
    exif = Image.Exif()
    exif[0x0112] = 6
    assert open_rgb(encoded(image, "JPEG", exif=exif)).size == (10, 20)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_malformed_exif_block_does_not_spoil_the_picture() -> None:
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=b"Exif\0\0MM\0\x2a\xff\xff\xff\xff")
    assert open_rgb(data).size == (20, 10)


def test_an_exif_block_that_cannot_be_written_again_turns_the_picture_all_the_same() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    data = encoded(Image.new("RGB", (20, 10)), "JPEG", exif=exif)
    kind = data.index(b"\x01\x1a\x00\x05") + 1
    damaged = data[:kind] + b"\x07" + data[kind + 1 :]  # a fraction under a tag that is for whole numbers
    with pytest.raises(struct.error):
        ImageOps.exif_transpose(Image.open(io.BytesIO(damaged)))
    assert open_rgb(damaged).size == (10, 20)


@pytest.mark.parametrize("orientation", range(11))
def test_every_exif_orientation_is_pillows(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(noise().crop((0, 0, 30, 40)), exif=exif)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(open_rgb(data)), np.asarray(expected))


def test_a_file_is_read_or_the_reason_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"^No such file or directory$"):
        read_rgb(path)
    path.write_bytes(encoded(noise())[:100])
    with pytest.raises(ValueError, match=r"^undecodable picture of 100 bytes: "):
        read_rgb(path)
    path.write_bytes(encoded(noise()))
    assert np.array_equal(np.asarray(read_rgb(path)), np.asarray(noise()))


def test_the_bytes_decide_the_format_and_others_are_refused() -> None:
    assert open_rgb(encoded(Image.new("RGB", (3, 2)), "WEBP")).size == (3, 2)
    for kind in ("GIF", "BMP", "TIFF"):
        with pytest.raises(ValueError, match="not a JPEG, PNG or WebP"):
            open_rgb(encoded(Image.new("RGB", (3, 2)), kind))


def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_picture_cut_short_is_undecodable(kind: str) -> None:
    data = encoded(noise(), kind)
    for length in (0, 5, len(data) // 2):
        with pytest.raises(ValueError, match="undecodable picture"):
            open_rgb(data[:length])


@settings(max_examples=100)
@given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.integers(0, 10**6), st.binary(min_size=1, max_size=8))
def test_damaged_bytes_give_a_picture_or_a_value_error(kind: str, place: int, patch: bytes) -> None:
    data = bytearray(encoded(noise(), kind))
    place %= len(data)
    data[place : place + len(patch)] = patch
    with contextlib.suppress(ValueError):  # and no other exception
        assert open_rgb(bytes(data)).mode == "RGB"


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="DecompressionBombError"):
        open_rgb(encoded(Image.new("RGB", (20, 20))))


@pytest.mark.parametrize(("width", "height"), [(96, 64), (64, 96), (64, 64), (33, 200), (1, 1)])
def test_center_crop_keeps_the_middle(width: int, height: int) -> None:
    array = np.zeros((height, width, 3), np.uint8)
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    array[top : top + side, left : left + side] = 255
    cropped = center_crop_resize(Image.fromarray(array), 32)
    assert cropped.shape == (32, 32, 3)
    assert cropped.dtype == np.uint8
    assert cropped.min() == 255


def test_a_picture_of_the_right_size_is_untouched_and_writable() -> None:
    image = noise()
    result = center_crop_resize(image, 40)
    assert np.array_equal(result, np.asarray(image))
    result[0, 0] = 0


def test_shrinking_averages_rather_than_skips() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    result = center_crop_resize(Image.fromarray(stripes), 16).astype(int)
    assert np.abs(result - 127).max() <= 12


# Animations


def colored(*numbers: int) -> list[Image.Image]:
    return [Image.new("RGB", (20, 12), (number * 40, 0, 255)) for number in numbers]


def numbers_of(frames: list[Image.Image]) -> list[int]:
    assert all((frame.mode, frame.size) == ("RGB", (20, 12)) for frame in frames)
    return [np.asarray(frame)[0, 0, 0] // 40 for frame in frames]


@pytest.mark.parametrize("kind", ["WEBP", "PNG"])
@pytest.mark.parametrize("numbers", [[1, 2, 3], [1, 1, 2, 3], [1, 2, 2, 2, 3], [3, 2, 1, 1]])
def test_frames_come_back_also_where_equal_ones_were_merged(kind: str, numbers: list[int]) -> None:
    frames = colored(*numbers)
    data = (
        animation(frames, kind, 100)
        if kind == "WEBP"
        else encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=100)
    )
    assert numbers_of(open_frames(data)) == numbers
    assert numbers_of([open_rgb(data)]) == numbers[:1]
    assert verify_frames(data) == (20, 12)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=8), st.sampled_from([10, 33, 250]))
def test_any_animation_keeps_its_frames_and_how_long_they_are_shown(numbers: list[int], frame_ms: int) -> None:
    back = numbers_of(open_frames(animation(colored(*numbers), "WEBP", frame_ms)))
    # An animation says how long frames are shown, not how often they were given: three equal pairs are three frames.
    runs = [(number, len(list(run))) for number, run in itertools.groupby(numbers)]
    briefest = min(length for _, length in runs)
    expected = [number for number, length in runs for _ in range(round(length / briefest))]
    assert back == expected


def test_a_frame_without_a_time_is_one_frame() -> None:
    frames = colored(1, 2, 3)
    for durations in ([0, 0, 0], [100, 0, 100], [0, 100, 100]):
        data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:], duration=durations)
        assert numbers_of(open_frames(data)) == [1, 2, 3]


def test_a_gif_plays_as_long_as_its_clip() -> None:
    image = Image.open(io.BytesIO(animation(colored(1, 1, 2), "GIF", 200)))
    shown = []
    for number in range(image.n_frames):
        image.seek(number)
        shown.append(image.info["duration"])
    assert sum(shown) == 600
    assert image.info["loop"] == 0


def test_a_still_picture_is_one_frame() -> None:
    for kind in ("PNG", "JPEG", "WEBP"):
        assert len(open_frames(encoded(noise(), kind))) == 1


def test_a_damaged_later_frame_is_found() -> None:
    rng = np.random.default_rng(0)
    frames = [Image.fromarray(rng.integers(0, 255, (40, 40, 3), np.uint8)) for _ in range(3)]
    data = bytearray(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:]))
    last = data.rindex(b"fdAT")
    data[last + 8 : last + 200] = bytes(192)
    assert open_rgb(bytes(data)).size == (40, 40)  # the first frame is whole
    for look in (open_frames, verify_frames):
        with pytest.raises(ValueError, match="undecodable picture"):
            look(bytes(data))
    webp = animation(frames, "WEBP", 100)
    damaged = bytearray(webp)
    last = webp.rindex(b"VP8L")
    damaged[last + 13 :] = bytes(len(webp) - last - 13)
    for look in (open_frames, verify_frames):
        with pytest.raises(ValueError, match="undecodable picture"):
            look(bytes(damaged))
    assert open_rgb(bytes(damaged)).size == (40, 40)


def test_a_jpeg_of_two_views_is_a_still_picture() -> None:
    first, second = colored(1, 2)
    stream = io.BytesIO()
    first.save(stream, "MPO", save_all=True, append_images=[second])
    data = stream.getvalue()
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert len(open_frames(data)) == 1
    assert len(open_frames(data[: data.rindex(b"\xff\xd8") + 20])) == 1  # a cut second view is nobody's loss
