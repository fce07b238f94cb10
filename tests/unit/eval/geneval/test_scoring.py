"""GenEval's rules, against the published verdicts and clause by clause."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.geneval.detections import Box, Detection
from eval.geneval.scoring import (
    ScoringOptions,
    box_iou,
    color_candidates,
    judge_picture,
    keep_detections,
    relations_between,
    result_row,
    unreadable_row,
)

ASSETS = Path(__file__).parents[3] / "assets"
SCENES = json.loads((ASSETS / "geneval_scoring_reference.json").read_text())


def scene_detections(scene: dict[str, Any]) -> list[Detection]:
    colors = {tuple(box): color for box, color in scene["colors"]}
    return [
        Detection(name, (x0, y0, x1, y1), score, color=colors[x0, y0, x1, y1])
        for name, boxes in scene["detections"].items()
        for x0, y0, x1, y1, score in boxes
    ]


@pytest.mark.parametrize("scene", SCENES, ids=[f"{i}-{s['metadata']['tag']}" for i, s in enumerate(SCENES)])
def test_published_verdicts_and_kept_boxes(scene: dict[str, Any]) -> None:
    verdict = judge_picture(scene_detections(scene), scene["metadata"], ScoringOptions(**scene["options"]))
    assert verdict.correct == scene["correct"]
    assert len(verdict.reasons) == scene["reason_lines"]
    kept = {name: [[*d.box, d.score] for d in found] for name, found in verdict.kept.items()}
    assert kept == scene["kept"]


def test_all_scenes_are_there() -> None:
    assert len(SCENES) == 240


def circle(x: float = 0, y: float = 0, score: float = 1.0, name: str = "circle", color: str = "red") -> Detection:
    return Detection(name, (x, y, x + 10, y + 10), score, color=color)


def clause(name: str, count: int = 1, **attributes: Any) -> dict[str, Any]:
    return {"class": name, "count": count, **attributes}


POSITION_WITH_COLORS = {
    "tag": "position",
    "include": [clause("star", color="blue"), clause("circle", color="red", position=["left of", 0])],
}


@pytest.mark.parametrize(
    ("circle_color", "star_color", "star_x", "reasons"),
    [
        ("red", "blue", 40, []),
        ("red", "blue", -40, ["expected circle left of star, found right of it"]),
        ("red", "blue", 1, ["expected circle left of star, found neither side of it"]),
        ("green", "blue", 40, ["expected red circle>=1, found 0 red; and 1 green"]),
        # A wrong colour fails the target too, so the relation has nothing to be judged against.
        (
            "red",
            "green",
            40,
            ["expected blue star>=1, found 0 blue; and 1 green", "no target for circle to be left of"],
        ),
    ],
)
def test_position_with_colors(circle_color: str, star_color: str, star_x: float, reasons: list[str]) -> None:
    found = [circle(color=circle_color), circle(star_x, name="star", color=star_color)]
    verdict = judge_picture(found, POSITION_WITH_COLORS)
    assert list(verdict.reasons) == reasons
    assert verdict.correct == (not reasons)


def test_every_pair_of_the_groups_must_hold_the_relation() -> None:
    metadata = {"tag": "position", "include": [clause("star"), clause("circle", 2, position=["above", 0])]}
    star = circle(0, 50, name="star")
    assert judge_picture([star, circle(0, 0), circle(5, 10)], metadata).correct
    verdict = judge_picture([star, circle(0, 0), circle(5, 90)], metadata)
    assert verdict.reasons == ("expected circle above star, found below it",)


def test_counting_is_strict_about_scores_and_about_more() -> None:
    metadata = {"tag": "counting", "include": [clause("circle", 2)], "exclude": [clause("circle", 3)]}
    assert judge_picture([circle(), circle(20)], metadata).correct
    assert judge_picture([circle(), circle(20), circle(40, score=0.9)], metadata).correct
    assert judge_picture([circle(), circle(20, score=0.9)], metadata).reasons == ("expected circle>=2, found 1",)
    too_many = judge_picture([circle(), circle(20), circle(40)], metadata)
    assert too_many.reasons == ("expected circle<3, found 3",)


def test_the_limit_per_class_keeps_the_best() -> None:
    found = [circle(i, score=0.4 + i / 100) for i in range(20)]
    kept = keep_detections(found, "single_object", ScoringOptions())["circle"]
    assert [d.score for d in kept] == sorted((d.score for d in found), reverse=True)[:16]


def test_suppression_is_off_at_one_and_inclusive_below() -> None:
    pair = [circle(), circle(score=0.8), circle(30, score=0.7)]
    overlap = box_iou(pair[0].box, pair[2].box)
    assert overlap == 0.0
    assert len(keep_detections(pair, "colors", ScoringOptions())["circle"]) == 3
    assert len(keep_detections(pair, "colors", ScoringOptions(max_overlap=0.99))["circle"]) == 2
    half = [circle(), circle(5, score=0.8)]
    exactly = box_iou(half[0].box, half[1].box)
    assert len(keep_detections(half, "colors", ScoringOptions(max_overlap=exactly))["circle"]) == 1
    assert len(keep_detections(half, "colors", ScoringOptions(max_overlap=exactly + 1e-9))["circle"]) == 2


ends = st.tuples(st.integers(0, 9), st.integers(0, 9)).map(sorted)


@given(ends, ends, ends, ends)
def test_box_iou_is_that_of_the_pixels(xa: list[int], ya: list[int], xb: list[int], yb: list[int]) -> None:
    masks = np.zeros((2, 10, 10), dtype=bool)
    masks[0, ya[0] : ya[1] + 1, xa[0] : xa[1] + 1] = True
    masks[1, yb[0] : yb[1] + 1, xb[0] : xb[1] + 1] = True
    expected = np.logical_and(*masks).sum() / np.logical_or(*masks).sum()
    assert box_iou((xa[0], ya[0], xa[1], ya[1]), (xb[0], yb[0], xb[1], yb[1])) == pytest.approx(expected)


def test_box_iou_counts_the_last_pixel() -> None:
    assert box_iou((0, 0, 9, 9), (5, 0, 14, 9)) == pytest.approx(50 / 150)


def test_only_asked_colors_are_classified() -> None:
    found = [circle(), circle(20), circle(40, name="star"), circle(60, name="star", score=0.2)]
    kept = keep_detections(found, "colors", ScoringOptions())
    assert color_candidates(kept, {"include": [clause("circle", color="red"), clause("star")]}) == [found[1]]
    # A group that is short of objects fails before any colour is looked at.
    assert color_candidates(kept, {"include": [clause("star", 2, color="red")]}) == []


def test_color_without_classifier_is_an_error() -> None:
    metadata = {"tag": "colors", "include": [clause("circle", color="red")]}
    with pytest.raises(ValueError, match="give a colour classifier"):
        judge_picture([Detection("circle", (0, 0, 9, 9), 1.0)], metadata)
    assert judge_picture([Detection("circle", (0, 0, 9, 9), 1.0)], metadata, color_of=lambda d: "red").correct


coordinate = st.floats(-100, 100).map(lambda value: round(value, 2))
boxes = st.builds(
    lambda x, y, w, h: (x, y, x + w, y + h),
    coordinate, coordinate, st.floats(1, 50).map(round), st.floats(1, 50).map(round),
)  # fmt: skip
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(boxes, boxes)
def test_relations_are_antisymmetric(a: Box, b: Box) -> None:
    assert {OPPOSITE[relation] for relation in relations_between(a, b)} == relations_between(b, a)


@given(boxes, boxes)
def test_relations_never_contradict(a: Box, b: Box) -> None:
    relations = relations_between(a, b)
    assert not any(OPPOSITE[relation] in relations for relation in relations)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("sign", [-1, 1])
def test_a_relation_takes_more_than_half_of_the_offset(axis: int, sign: int) -> None:
    # Two boxes 10 wide: of an offset of 4 the margin leaves 2, exactly half.
    moved = [[0.0, 0.0, 10.0, 10.0] for _ in range(2)]
    for box, offset in zip(moved, (4 * sign, 5 * sign), strict=True):
        box[axis] += offset
        box[axis + 2] += offset
    half, more = (relations_between((b[0], b[1], b[2], b[3]), (0, 0, 10, 10)) for b in moved)
    assert half == set()
    assert more == {[["left of", "right of"], ["above", "below"]][axis][sign > 0]}


@pytest.mark.parametrize(
    "wrong", [{"threshold": 1.5}, {"max_overlap": 0.0}, {"max_objects": 0}, {"counting_threshold": -1}]
)
def test_thresholds_are_checked(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScoringOptions(**wrong)  # type: ignore[arg-type]


def test_result_rows_have_the_published_fields() -> None:
    metadata = {"tag": "colors", "include": [clause("circle", color="red")], "prompt": "a photo of a red circle"}
    row = result_row("00000/samples/0000.png", metadata, judge_picture([circle()], metadata))
    published = ["filename", "tag", "prompt", "correct", "reason", "metadata", "details"]
    assert list(row)[: len(published)] == published
    assert row["correct"] is True
    assert json.loads(row["metadata"]) == metadata
    assert json.loads(row["details"]) == {"circle": [[0, 0, 10, 10, 1.0]]}
    assert json.loads(row["colors"]) == {"circle": ["red"]}
    lost = unreadable_row("00000/samples/0001.png", metadata, "truncated")
    assert (lost["correct"], lost["unreadable"]) == (False, True)
    assert "truncated" in lost["reason"]
