"""The pictures in the page: copies, objects, those that cannot be shown, and how much they take."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from report_pages import LOSSES, pictures, text, written

from eval.geneval.gallery import LARGEST_SIDE
from eval.geneval.judging import read_picture
from eval.geneval.results import Results


def test_copies_hold_the_very_pixels(models: list[Results], both: str) -> None:
    for number, results in enumerate(models):
        for one, copy in pictures(both, number):
            original = np.asarray(Image.open(results.folder / one["file"]))
            np.testing.assert_array_equal(np.asarray(copy), original)
            assert (one["width"], one["height"]) == (64, 64)


def test_objects_carry_their_colors(models: list[Results], page: str) -> None:
    found = {(color, name) for one, _ in pictures(page) for name, color, *_ in one["found"]}
    wanted = {tuple(one.prompt.split()[-2:]) for one in models[0].pictures if one.tag == "colors"}
    assert wanted & found
    assert all(color for color, _ in found)


def test_unreadable_missing_and_large_pictures(models: list[Results], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = np.kron(rng.integers(0, 255, (4, 8, 3), dtype=np.uint8), np.ones((64, 64, 1), dtype=np.uint8))
    names = ["large.png", "damaged.png", "cut.png", "missing.png", "odd.png"]
    for name in names[:3]:
        Image.fromarray(pixels).save(tmp_path / name)
    (tmp_path / "damaged.png").write_bytes(b"no picture")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:200])
    Image.fromarray(pixels[:1]).convert("L").save(tmp_path / "odd.png")
    rows = tuple(replace(models[0].pictures[0], filename=name) for name in names)
    page = written([replace(models[0], folder=tmp_path, pictures=rows)], tmp_path)
    shown = {one["file"]: (one, copy) for one, copy in pictures(page)}
    one, copy = shown["large.png"]
    # Boxes are in the pixels of the original, also where a smaller copy is shown.
    assert (one["width"], one["height"]) == (512, 256)
    assert copy is not None
    assert copy.size == (LARGEST_SIDE, LARGEST_SIDE // 2)
    assert np.abs(np.asarray(copy)[10, 10].astype(int) - pixels[32, 32]).max() < 25
    assert shown["odd.png"][1] is not None
    assert shown["odd.png"][1].size == (LARGEST_SIDE, 1)
    problems = {name: one["problem"] for name, (one, copy) in shown.items() if copy is None}
    assert problems["missing.png"] == "not found"
    assert problems["damaged.png"].startswith("cannot be read: ")
    assert problems["cut.png"].startswith("cannot be read: ")
    assert len(problems) == 3
    assert "3 pictures of first are not found or cannot be read" in text(page)
    assert "5 judged pictures of 1 prompts. 2 are in this page" in text(page)


def test_a_turned_picture_is_shown_as_the_judge_saw_it(models: list[Results], tmp_path: Path) -> None:
    """Its boxes are in the pixels of the upright picture."""
    pixels = np.zeros((128, 512, 3), dtype=np.uint8)
    pixels[:, :256] = 200
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    judged = read_picture(tmp_path / "turned.png", "", {}).image
    assert judged is not None
    rows = (replace(models[0].pictures[0], filename="turned.png"),)
    ((one, copy),) = pictures(written([replace(models[0], folder=tmp_path, pictures=rows)], tmp_path))
    assert (one["height"], one["width"]) == judged.shape[:2] == (512, 128)
    assert copy is not None
    assert copy.size == (LARGEST_SIDE // 4, LARGEST_SIDE)
    # What lies to the left lies below when the picture is upright.
    assert np.asarray(copy)[10].max() < 20
    assert np.asarray(copy)[-10].min() > 180


def test_a_thousand_small_pictures_stay_below_ten_megabytes(models: list[Results], page: str, tmp_path: Path) -> None:
    one = replace(models[0], pictures=models[0].pictures[:1])
    size, empty = len(page.encode()), len(written([one], tmp_path, LOSSES).encode())
    assert empty + (size - empty) / (len(models[0].pictures) - 1) * 1200 < 10e6


def test_the_published_prompts_with_large_pictures_stay_usable(models: list[Results], tmp_path: Path) -> None:
    """Pictures of 512x512 full of texture, of which a whole evaluation would be twenty megabytes."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(512), np.fft.fftfreq(512)))
    frequency[0, 0] = 1
    rows = []
    for number in range(4):
        noise = np.fft.fft2(rng.normal(size=(3, 512, 512)))
        field = np.real(np.fft.ifft2(noise / frequency**1.1)).transpose(1, 2, 0)
        Image.fromarray(np.clip(128 + 45 * field / field.std(), 0, 255).astype(np.uint8)).save(
            tmp_path / f"{number}.png"
        )
        rows.append(replace(models[0].pictures[0], filename=f"{number}.png"))

    def size(kept: int, **options: Any) -> int:
        return len(written([replace(models[0], folder=tmp_path, pictures=tuple(rows[:kept]))], tmp_path, **options))

    each = (size(4) - size(1)) / 3
    assert each > 3e3
    assert each * 553 * 4 < 25e6
    assert (size(4, side=64) - size(1, side=64)) / 3 < each / 3
