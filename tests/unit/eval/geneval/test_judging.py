"""Batches, counts and unreadable files on the way from pictures to results."""

import base64
import io
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as PillowImage

from eval.ahead import READERS
from eval.geneval.ceiling import ground_truth_pictures, reconstructed_pictures
from eval.geneval.detections import Detection, Image
from eval.geneval.gallery import _copy
from eval.geneval.judging import Picture, batched, judge_pictures, read_picture, read_pictures
from eval.geneval.prompts import shapes_prompts
from eval.geneval.scoring import ScoringOptions
from eval.pictures import read_ahead

METADATA = {"tag": "single_object", "include": [{"class": "star", "count": 1}], "prompt": "a photo of a star"}


class BrightnessDetector:
    """Sees a star in a bright picture; remembers the sizes of its batches."""

    scoring = ScoringOptions()

    def __init__(self) -> None:
        self.batches: list[int] = []

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        self.batches.append(len(images))
        return [[Detection("star", (0, 0, 1, 1), 0.9)] if image.mean() > 100 else [] for image in images]


def gray(value: int) -> Image:
    return np.full((2, 2, 3), value, dtype=np.uint8)


@given(st.lists(st.integers()), st.integers(1, 7))
def test_batches_hold_everything_in_order(items: list[int], size: int) -> None:
    batches = list(batched(items, size))
    assert [item for batch in batches for item in batch] == items
    assert all(len(batch) == size for batch in batches[:-1])
    assert all(batches)


def test_verdicts_meet_their_pictures_around_unreadable_ones() -> None:
    values = [200, None, 0, 200, None, 0, 200]
    pictures = [Picture(f"{i}", METADATA, None if v is None else gray(v), "gone") for i, v in enumerate(values)]
    detector = BrightnessDetector()
    rows = judge_pictures(detector, pictures, len(pictures), batch_size=3, progress=False)
    assert [row["filename"] for row in rows] == [f"{i}" for i in range(7)]
    assert [row["correct"] for row in rows] == [value == 200 for value in values]
    assert [row.get("unreadable", False) for row in rows] == [value is None for value in values]
    assert "gone" in rows[1]["reason"]
    assert detector.batches == [2, 2, 1]


def test_no_more_than_a_batch_is_read_ahead() -> None:
    read = 0

    def pictures() -> Iterator[Picture]:
        nonlocal read
        for number in range(10):
            read += 1
            yield Picture(f"{number}", METADATA, gray(0))

    class Watching(BrightnessDetector):
        def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
            assert read <= 4 * (len(self.batches) + 1)
            return super().detect(images)

    judge_pictures(Watching(), pictures(), 10, batch_size=4, progress=False)


def test_files_are_read_in_order_and_damage_is_kept(tmp_path: Path) -> None:
    files = []
    for number in range(40):
        path = tmp_path / f"{number}.png"
        PillowImage.fromarray(gray(number)).save(path)
        files.append((path, f"picture {number}", METADATA))
    files[1][0].write_bytes(b"not a picture")
    files[2][0].unlink()
    files[3][0].write_bytes(files[0][0].read_bytes()[:43])
    pictures = list(read_pictures(files, ahead=3))
    assert [picture.filename for picture in pictures] == [f"picture {number}" for number in range(40)]
    problems = [picture.problem for picture in pictures]
    assert problems[:3] == [
        "",
        "undecodable picture of 13 bytes: not a JPEG, PNG or WebP file",
        "No such file or directory",
    ]
    assert problems[3].startswith("undecodable picture of 43 bytes: ")
    assert set(problems[4:]) == {""}
    for number, picture in enumerate(pictures):
        assert (picture.image is None) == bool(picture.problem)
        assert picture.image is None or (picture.image == number).all()


def test_no_more_pictures_than_asked_for_are_decoded_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[int] = []

    def read(path: Path, filename: str, metadata: Any) -> Picture:
        started.append(int(filename))
        return Picture(filename, metadata, gray(0))

    monkeypatch.setattr("eval.geneval.judging.read_picture", read)
    pictures = read_pictures(((Path(), str(number), METADATA) for number in range(100)), ahead=5)
    for number in range(10):
        assert next(pictures).filename == str(number)
        assert max(started) <= number + 5
    pictures.close()  # type: ignore[attr-defined]
    assert len(started) <= 10 + 5 + READERS


def turned(orientation: int, **more: Any) -> PillowImage.Exif:
    exif = PillowImage.Exif()
    exif[0x0112] = orientation
    for tag, value in more.items():
        exif[int(tag, 16)] = value
    return exif


RED_OVER_WHITE = (227, 127, 127)  # (200, 0, 0), half transparent


def save_all_modes(folder: Path) -> dict[str, Any]:
    """Pictures of 20 x 10 pixels of one colour, in every mode and a few traps; name -> the colour that a viewer shows."""
    size = (20, 10)
    palette = PillowImage.new("P", size, 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    made: dict[str, tuple[PillowImage.Image, dict[str, Any], Any]] = {
        "rgb.png": (PillowImage.new("RGB", size, (1, 2, 3)), {}, (1, 2, 3)),
        "key.png": (PillowImage.new("RGB", size, (1, 2, 3)), {"transparency": (1, 2, 3)}, (255, 255, 255)),
        "rgba.png": (PillowImage.new("RGBA", size, (200, 0, 0, 128)), {}, RED_OVER_WHITE),
        "rgba.webp": (PillowImage.new("RGBA", size, (200, 0, 0, 128)), {"lossless": True}, RED_OVER_WHITE),
        "grey.png": (PillowImage.new("L", size, 7), {}, (7, 7, 7)),
        "grey_alpha.png": (PillowImage.new("LA", size, (7, 0)), {}, (255, 255, 255)),
        "palette.png": (palette, {}, (200, 0, 0)),
        "clear_palette.png": (palette, {"transparency": 1}, (255, 255, 255)),
        "bits.png": (PillowImage.new("1", size, 1), {}, (255, 255, 255)),
        "grey16.png": (PillowImage.fromarray(np.full(size[::-1], 257 * 100, np.uint16)), {}, (100, 100, 100)),
        "cmyk.jpg": (PillowImage.new("CMYK", size, (0, 0, 255, 0)), {"quality": 95}, (255, 255, 0)),
        "turned.jpg": (PillowImage.new("RGB", size, (9, 9, 9)), {"exif": turned(6)}, (9, 9, 9)),
    }
    for name, (image, options, _) in made.items():
        image.save(folder / name, **options)
    # Its EXIF block is fine but for an entry that cannot be written again, as turning a picture the usual way does.
    PillowImage.new("RGB", size, (9, 9, 9)).save(folder / "odd_exif.jpg", exif=turned(6, **{"11a": 72.0}))
    data = (folder / "odd_exif.jpg").read_bytes()
    (folder / "odd_exif.jpg").write_bytes(data.replace(b"\x01\x1a\x00\x05", b"\x01\x1a\x00\x07", 1))
    return {name: color for name, (_, _, color) in made.items()} | {"odd_exif.jpg": (9, 9, 9)}


def test_every_mode_is_judged_measured_and_shown_as_the_same_pixels(tmp_path: Path) -> None:
    colors = save_all_modes(tmp_path)
    paths = [tmp_path / name for name in colors]
    measured = [found.value for found in read_ahead(paths, np.asarray)]
    for path, color, others in zip(paths, colors.values(), measured, strict=True):
        pixels = read_picture(path, "", METADATA).image
        assert pixels is not None, path
        stands = path.stem in ("turned", "odd_exif")
        assert pixels.shape == ((20, 10, 3) if stands else (10, 20, 3)), path
        assert pixels.dtype == np.uint8
        assert np.abs(pixels.astype(int) - color).max() <= 2, path
        np.testing.assert_array_equal(pixels, others)
        copy = _copy(path, 8)
        assert (copy.height, copy.width) == pixels.shape[:2], path
        assert copy.uri is not None
        shown = PillowImage.open(io.BytesIO(base64.b64decode(copy.uri.partition(",")[2])))
        np.testing.assert_array_equal(pixels, np.asarray(shown))


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of damaged EXIF blocks
@given(st.integers(20, 200), st.binary(min_size=1, max_size=4))
def test_no_damage_ends_the_reading(place: int, patch: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jpg"
        PillowImage.new("RGB", (24, 24)).save(path, exif=turned(6, **{"11a": 72.0, "10e": "hello"}))
        data = bytearray(path.read_bytes())
        data[place : place + len(patch)] = patch
        path.write_bytes(data)
        picture = read_picture(path, "", METADATA)
        assert (picture.image is None) == bool(picture.problem)
        assert "\n" not in picture.problem


COLORED = {
    "tag": "colors",
    "include": [{"class": "star", "count": 1, "color": "red"}],
    "prompt": "a photo of a red star",
}


class Boxes:
    """Sees as many stars as a picture's first pixel says, the n-th with score 1 - n / 10; and a cow."""

    scoring = ScoringOptions()

    def detect(self, images: Sequence[Image]) -> list[list[Detection]]:
        return [
            [Detection("cow", (0, 0, 1, 1), 0.99)]
            + [Detection("star", (n, 0, n + 1, 1), 1 - n / 10) for n in range(int(image[0, 0, 0]))]
            for image in images
        ]


class ByFirstPixel:
    """Says "red" of what it is shown first in a picture, and remembers what it was shown."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[int, float]]] = []

    def classify(self, objects: Sequence[tuple[Image, Detection]]) -> list[str]:
        self.calls.append([(int(image[0, 0, 0]), detection.score) for image, detection in objects])
        return ["red" if image[0, 0, 0] != 2 else "blue" for image, _ in objects]


def test_colors_are_asked_for_once_a_batch_and_only_of_objects_that_a_prompt_asks_about() -> None:
    two = {**COLORED, "include": [{"class": "star", "count": 2, "color": "red"}]}
    asked = [(0, COLORED), (3, COLORED), (1, METADATA), (2, COLORED), (3, two), (1, two), (1, COLORED)]
    pictures = [Picture(str(place), metadata, gray(stars)) for place, (stars, metadata) in enumerate(asked)]
    pictures.insert(2, Picture("lost", COLORED, None, "gone"))
    classifier = ByFirstPixel()
    rows = judge_pictures(Boxes(), pictures, 8, batch_size=6, progress=False, colors=classifier)
    assert classifier.calls == [[(3, 1.0), (2, 1.0), (3, 1.0), (3, 0.9)], [(1, 1.0)]]
    assert [row["correct"] for row in rows] == [False, True, False, True, False, True, False, True]
    assert "expected red star>=1, found 0 red; and 1 blue" in rows[4]["reason"]
    assert json.loads(rows[5]["colors"]) == {"cow": [None], "star": ["red", "red", None]}


def test_without_colored_prompts_the_classifier_is_not_asked() -> None:
    classifier = ByFirstPixel()
    judge_pictures(Boxes(), [Picture("0", METADATA, gray(1))], 1, progress=False, colors=classifier)
    assert classifier.calls == []


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_reconstructions_meet_their_prompts(batch_size: int) -> None:
    prompts = shapes_prompts(2)
    sizes = []

    def inverted(images: np.ndarray) -> np.ndarray:
        sizes.append(len(images))
        return 255 - images

    correct = list(ground_truth_pictures(prompts, 2))
    rebuilt = list(reconstructed_pictures(prompts, 2, inverted, batch_size))
    assert len(correct) == len(rebuilt) == 24
    assert max(sizes) <= batch_size
    for one, other in zip(correct, rebuilt, strict=True):
        assert one.metadata is other.metadata
        assert one.image is not None
        np.testing.assert_array_equal(255 - one.image, other.image)
