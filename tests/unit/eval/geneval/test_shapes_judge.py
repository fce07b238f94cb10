"""The shapes judge: exact on correct pictures, steady under small damage, strict about what a shape is."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.ndimage as ndi
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline import shapes
from eval.generate import picture_seed
from eval.geneval.detections import Detection, Image
from eval.geneval.scoring import judge_picture, keep_detections, relations_between
from eval.geneval.shapes_judge import ShapesJudge

JUDGE = ShapesJudge()
OPTIONS = JUDGE.scoring
Change = Callable[[Image, int], Image]


def blurred(image: Image, seed: int) -> Image:
    return ndi.gaussian_filter(image.astype(np.float32), (0.7, 0.7, 0)).round().astype(np.uint8)


def noisy(image: Image, seed: int) -> Image:
    noise = np.random.default_rng(seed).normal(0, 8, image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


def kept(image: Image) -> list[Detection]:
    """All that counts in a picture, whatever the task."""
    (found,) = JUDGE.detect([image])
    return [one for group in keep_detections(found, "counting", OPTIONS).values() for one in group]


def share_right(change: Change | None, pictures: int, per_task: int) -> float:
    """The overall score (mean over tasks) of correct pictures after a change."""
    by_task: dict[str, list[bool]] = {}
    for index, metadata in enumerate(shapes.evaluation_metadata(per_task)):
        for number in range(pictures):
            seed = picture_seed(index, number, seed=11)
            image = shapes.ground_truth(metadata, seed).image
            (found,) = JUDGE.detect([image if change is None else change(image, seed)])
            by_task.setdefault(metadata["tag"], []).append(judge_picture(found, metadata, OPTIONS).correct)
    assert tuple(by_task) == shapes.TASKS
    return float(np.mean([np.mean(verdicts) for verdicts in by_task.values()]))


@pytest.mark.parametrize(
    ("change", "floor"), [(None, 0.995), (blurred, 0.98), (noisy, 0.98)], ids=["exact", "blurred", "noisy"]
)
def test_correct_pictures_are_right(change: Change | None, floor: float) -> None:
    assert share_right(change, pictures=2, per_task=24) >= floor


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32))
def test_sees_what_was_drawn(seed: int) -> None:
    sample = shapes.training_sample(seed, 0)
    found = kept(sample.image)
    assert sorted((d.class_name, d.color) for d in found) == sorted((o.shape, o.color) for o in sample.objects)
    for placed in sample.objects:
        distances = {
            max(abs(a - b) for a, b in zip(one.box, placed.box, strict=True))
            for one in found
            if (one.class_name, one.color) == (placed.shape, placed.color)
        }
        assert min(distances) <= 2.0  # pixels: the half-covered end of a thin tip lies inside its outline


@pytest.mark.parametrize("tag", shapes.TASKS)
def test_pictures_of_other_prompts_are_wrong(tag: str) -> None:
    """A picture passes exactly the prompts that its objects satisfy: no prompt is passed by a picture that lacks them."""
    entries = [entry for entry in shapes.evaluation_metadata(12, seed=1) if entry["tag"] == tag]
    for index, metadata in enumerate(entries):
        other = entries[(index + 1) % len(entries)]
        sample = shapes.ground_truth(other, index)
        (found,) = JUDGE.detect([sample.image])
        assert judge_picture(found, metadata, OPTIONS).correct == truly(metadata, sample)


def truly(metadata: dict[str, Any], sample: shapes.ShapesSample) -> bool:
    """Whether the drawn objects satisfy a prompt, by the same rules applied to what was drawn."""
    drawn = [Detection(placed.shape, placed.box, 1.0, color=placed.color) for placed in sample.objects]
    return judge_picture(drawn, metadata, OPTIONS).correct


def on_background(alpha: np.ndarray, color: str) -> Image:
    background = np.full((64, 64, 3), 150.0) + np.linspace(-12, 12, 64)[:, None, None]
    blended = background * (1 - alpha[..., None]) + np.array(shapes.COLORS[color]) * alpha[..., None]
    return np.clip(blended.round(), 0, 255).astype(np.uint8)


def test_an_empty_picture_has_no_objects() -> None:
    assert kept(on_background(np.zeros((64, 64)), "red")) == []
    assert kept(np.zeros((64, 64, 3), dtype=np.uint8)) == []
    assert kept(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)) == []


@pytest.mark.parametrize("color", ["red", "black", "white"])
def test_smears_do_not_count(color: str) -> None:
    y, x = np.mgrid[:64, :64].astype(float)
    bent = (np.abs(y - 32 - 10 * np.sin(x / 9)) < 4) & (np.abs(x - 32) < 22)
    ragged = ndi.gaussian_filter(np.random.default_rng(5).random((64, 64)), 2.5)
    ragged = (ragged > np.quantile(ragged, 0.82)) & (np.hypot(x - 32, y - 32) < 20)
    crescent = (np.hypot(x - 32, y - 32) < 14) & (np.hypot(x - 39, y - 32) > 12)
    for blob in (bent, ragged, crescent):
        assert kept(on_background(ndi.gaussian_filter(blob.astype(float), 0.6), color)) == []


def test_an_outline_or_a_tiny_shape_does_not_count() -> None:
    ring = shapes.shape_mask("circle", 32, 32, 14) - shapes.shape_mask("circle", 32, 32, 11)
    assert kept(on_background(ring, "blue")) == []
    assert kept(on_background(shapes.shape_mask("square", 32, 32, 3), "blue")) == []


@pytest.mark.parametrize("shape", shapes.SHAPES)
def test_half_a_shape_is_not_that_shape(shape: str) -> None:
    alpha = shapes.shape_mask(shape, 32, 32, 13)
    alpha[:, 32:] = 0
    assert shape not in {one.class_name for one in kept(on_background(alpha, "purple"))}


def test_two_touching_colors_are_two_objects() -> None:
    image = on_background(shapes.shape_mask("square", 20, 32, 12), "red")
    alpha = shapes.shape_mask("square", 42, 32, 12)[..., None]
    image = (image * (1 - alpha) + np.array(shapes.COLORS["blue"]) * alpha).round().astype(np.uint8)
    assert sorted((one.class_name, one.color) for one in kept(image)) == [("square", "blue"), ("square", "red")]


def test_relations_and_colors_reach_the_rules() -> None:
    metadata = {
        "tag": "position",
        "include": [{"class": "star", "count": 1}, {"class": "circle", "count": 1, "position": ["left of", 0]}],
        "prompt": "a photo of a circle left of a star",
    }
    image = shapes.ground_truth(metadata, 3).image
    mirrored = np.ascontiguousarray(image[:, ::-1])
    straight, turned = (judge_picture(found, metadata, OPTIONS) for found in JUDGE.detect([image, mirrored]))
    assert straight.correct
    assert turned.reasons == ("expected circle left of star, found right of it",)
    boxes = {one.class_name: one.box for one in kept(image)}
    assert relations_between(boxes["circle"], boxes["star"], OPTIONS) == {"left of"}

    colored = {"tag": "colors", "include": [{"class": "star", "count": 1, "color": "pink"}], "prompt": "a pink star"}
    image = on_background(shapes.shape_mask("star", 32, 32, 13), "green")
    verdict = judge_picture(JUDGE.detect([image])[0], colored, OPTIONS)
    assert verdict.reasons == ("expected pink star>=1, found 0 pink; and 1 green",)


def test_one_too_many_is_wrong() -> None:
    three = {"tag": "counting", "include": [{"class": "heart", "count": 3}], "prompt": "a photo of three hearts"}
    two = {
        "tag": "counting",
        "include": [{"class": "heart", "count": 2}],
        "exclude": [{"class": "heart", "count": 3}],
        "prompt": "a photo of two hearts",
    }
    (found,) = JUDGE.detect([shapes.ground_truth(three, 0).image])
    assert judge_picture(found, three, OPTIONS).correct
    assert judge_picture(found, two, OPTIONS).reasons == ("expected heart<3, found 3",)


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    images = [shapes.training_sample(4, index).image for index in range(6)]
    together = JUDGE.detect(images)
    for image, found in zip(images, together, strict=True):
        (alone,) = JUDGE.detect([image])
        assert [(d.class_name, d.box, d.score, d.color) for d in alone] == [
            (d.class_name, d.box, d.score, d.color) for d in found
        ]


def test_masks_lie_in_their_boxes() -> None:
    for index in range(10):
        for one in JUDGE.detect([shapes.training_sample(6, index).image])[0]:
            assert one.mask is not None
            rows, columns = np.nonzero(one.mask)
            assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == one.box
            assert 0 <= one.score <= 1


def test_a_batch_may_hold_pictures_of_nothing_or_be_empty() -> None:
    judge = ShapesJudge()
    assert judge.scoring.threshold == judge.scoring.counting_threshold
    sample = shapes.training_sample(0, 0)
    first, nothing = judge.detect([sample.image, np.full((64, 64, 3), 140, dtype=np.uint8)])
    assert len(first) == len(sample.objects)
    assert nothing == []
    assert judge.detect([]) == []
