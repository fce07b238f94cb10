from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.geneval_text import prompt_for
from data_pipeline.shapes import (
    BACKGROUNDS,
    COLORS,
    DARKEST,
    GAP,
    HELD_OUT_PAIRS,
    IMAGE_SIZE,
    RADIUS,
    RELATIONS,
    SHAPES,
    TASKS,
    PlacedShape,
    ShapesSample,
    evaluation_metadata,
    ground_truth,
    label_of,
    shape_mask,
    single_object_sample,
    training_sample,
)

COMBINATIONS = {"two_object", "position", "color_attr"}


@pytest.fixture(scope="module")
def training() -> list[ShapesSample]:
    return [training_sample(0, index) for index in range(2000)]


def kinds(metadata: dict[str, Any]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for entry in metadata["include"]:
        counts[entry["class"]] += entry["count"]
    return counts


def pair_of(metadata: dict[str, Any]) -> frozenset[str]:
    return frozenset(entry["class"] for entry in metadata["include"])


def check(sample: ShapesSample) -> None:
    """Everything that a picture's metadata promises, from the objects that were drawn."""
    metadata, objects = sample.metadata, sample.objects
    assert (sample.image.shape, sample.image.dtype) == ((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert sample.caption == metadata["prompt"] == prompt_for(metadata["tag"], metadata["include"])
    assert Counter(o.shape for o in objects) == kinds(metadata)
    for placed in objects:
        x0, y0, x1, y1 = placed.box
        assert min(x0, y0) >= 1
        assert max(x1, y1) <= IMAGE_SIZE - 1
    for one, other in combinations(objects, 2):
        a, b = one.box, other.box
        gap = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3])
        assert gap >= GAP - 1e-9, (one, other)
    for entry in metadata["include"]:
        if "color" in entry:
            assert [o.color for o in objects if o.shape == entry["class"]] == [entry["color"]] * entry["count"]
        if "position" in entry:
            relation, target = entry["position"]
            assert target == 0
            assert holds(relation, objects[0], objects[1])


def holds(relation: str, anchor: PlacedShape, subject: PlacedShape) -> bool:
    """The subject's centre lies in that direction of the anchor's, and more so than sideways."""
    dx, dy = subject.cx - anchor.cx, subject.cy - anchor.cy
    along, across = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return along > 0 and abs(across) < along


def test_training_pictures_are_what_their_captions_say(training: list[ShapesSample]) -> None:
    for sample in training:
        check(sample)


def test_no_training_caption_of_a_task_names_its_held_out_pairs(training: list[ShapesSample]) -> None:
    for sample in training:
        drawn = frozenset(o.shape for o in sample.objects)
        assert drawn not in HELD_OUT_PAIRS.get(sample.metadata["tag"], ()), sample.caption


def test_all_templates_shapes_colors_and_relations_occur(training: list[ShapesSample]) -> None:
    assert {s.metadata["tag"] for s in training} == set(TASKS)
    assert {o.shape for s in training for o in s.objects} == set(SHAPES)
    assert {o.color for s in training for o in s.objects} == set(COLORS)
    found = {e["position"][0] for s in training for e in s.metadata["include"] if "position" in e}
    assert found == set(RELATIONS)
    counting = [s for s in training if s.metadata["tag"] == "counting"]
    assert {s.metadata["include"][0]["count"] for s in counting} == {2, 3, 4}
    for sample in counting:
        (entry,) = sample.metadata["include"]
        assert sample.metadata["exclude"] == [{"class": entry["class"], "count": entry["count"] + 1}]
    # Half of the position captions name colours.
    positions = [s for s in training if s.metadata["tag"] == "position"]
    colored = sum("color" in s.metadata["include"][0] for s in positions) / len(positions)
    assert 0.4 < colored < 0.6


def test_every_other_pair_is_trained_on(training: list[ShapesSample]) -> None:
    every = {frozenset(pair) for pair in combinations(SHAPES, 2)}
    for tag in COMBINATIONS:
        pairs = {pair_of(s.metadata) for s in training if s.metadata["tag"] == tag}
        assert pairs == every - HELD_OUT_PAIRS[tag]
    assert {pair_of(s.metadata) for s in training if s.metadata["tag"] in COMBINATIONS} == every


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**31))
def test_a_sample_is_a_function_of_seed_and_index(seed: int, index: int) -> None:
    one, again = training_sample(seed, index), training_sample(seed, index)
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.caption, one.metadata, one.objects) == (again.caption, again.metadata, again.objects)
    check(one)


def test_neighbours_and_seeds_differ() -> None:
    pictures = [training_sample(seed, index).image.tobytes() for seed in (0, 1) for index in range(50)]
    assert len(set(pictures)) == 100


def test_evaluation_prompts_of_combination_tasks_hold_held_out_pairs_only(training: list[ShapesSample]) -> None:
    prompts = evaluation_metadata(per_task=2000)
    sizes = Counter(metadata["tag"] for metadata in prompts)
    assert sizes == {
        "single_object": 8, "two_object": 16, "counting": 24, "colors": 80, "position": 64, "color_attr": 1440,
    }  # fmt: skip
    for metadata in prompts:
        if metadata["tag"] in COMBINATIONS:
            assert pair_of(metadata) in HELD_OUT_PAIRS[metadata["tag"]]
    unseen = {m["prompt"] for m in prompts if m["tag"] in COMBINATIONS}
    assert not unseen & {s.caption for s in training}
    assert len({metadata["prompt"] for metadata in prompts}) == len(prompts)


def test_held_out_pairs_leave_every_shape_partners() -> None:
    assert set(HELD_OUT_PAIRS) == COMBINATIONS
    for pairs in HELD_OUT_PAIRS.values():
        assert len(pairs) == 8
        assert Counter(shape for pair in pairs for shape in pair) == dict.fromkeys(SHAPES, 2)
    assert len(frozenset.union(*HELD_OUT_PAIRS.values())) == 24  # held out of one task each


def test_evaluation_prompts_are_a_function_of_the_seed() -> None:
    assert evaluation_metadata(10, seed=3) == evaluation_metadata(10, seed=3)
    assert evaluation_metadata(10, seed=3) != evaluation_metadata(10, seed=4)
    tags = [metadata["tag"] for metadata in evaluation_metadata(10)]
    assert tags == sorted(tags, key=TASKS.index)
    assert Counter(tags) == {tag: 8 if tag == "single_object" else 10 for tag in TASKS}
    with pytest.raises(ValueError, match="per_task is 0"):
        evaluation_metadata(0)


def test_ground_truth_is_correct_and_unlike_training() -> None:
    for number, metadata in enumerate(evaluation_metadata(per_task=12, seed=1)):
        sample = ground_truth(metadata, number)
        check(sample)
        assert sample.metadata == metadata
        np.testing.assert_array_equal(sample.image, ground_truth(metadata, number).image)
    assert training_sample(5, 0).image.tobytes() != ground_truth(training_sample(5, 0).metadata, 5).image.tobytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_masks_are_anti_aliased_and_inside_their_box(shape: str) -> None:
    mask = shape_mask(shape, 30.0, 33.0, 12.0)
    assert (mask.shape, mask.dtype) == ((IMAGE_SIZE, IMAGE_SIZE), np.float32)
    assert mask.min() == 0
    assert mask.max() == 1
    assert ((mask > 0) & (mask < 1)).any()
    x0, y0, x1, y1 = PlacedShape(shape, "red", 30.0, 33.0, 12.0).box
    rows, columns = np.nonzero(mask)
    assert x0 - 1.5 <= columns.min() <= x0 + 1.5
    assert x1 - 2.5 <= columns.max() <= x1 + 1.5
    assert y0 - 1.5 <= rows.min() <= y0 + 1.5
    assert y1 - 2.5 <= rows.max() <= y1 + 1.5
    np.testing.assert_allclose(np.roll(mask, 5, axis=1), shape_mask(shape, 35.0, 33.0, 12.0))


def test_what_is_counted_is_of_one_color(training: list[ShapesSample]) -> None:
    counted = [sample for sample in training if sample.metadata["tag"] == "counting"]
    assert counted
    assert all(len({placed.color for placed in sample.objects}) == 1 for sample in counted)


def test_a_shape_fills_two_by_two_tokens(training: list[ShapesSample]) -> None:
    for sample in training:
        for placed in sample.objects:
            assert placed.cx % 8 == placed.cy % 8 == 0
            x0, y0, x1, y1 = placed.box
            assert min(x0 - (placed.cx - 8), y0 - (placed.cy - 8), placed.cx + 8 - x1, placed.cy + 8 - y1) >= 0


def test_the_first_token_of_a_shape_shows_its_kind() -> None:
    corners = [shape_mask(shape, 8, 8, RADIUS, 16)[:8, :8] for shape in SHAPES]
    for i, corner in enumerate(corners):
        assert corner.sum() >= 12, SHAPES[i]  # pixels of 64
        for j in range(i):
            assert np.abs(corner - corners[j]).sum() >= 3, (SHAPES[i], SHAPES[j])


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'blob'; choose one of circle"):
        shape_mask("blob", 32, 32, 10)


def test_colors_stand_out_from_each_other_and_from_every_background() -> None:
    colors = [np.array(color, float) for color in COLORS.values()]
    assert min(np.linalg.norm(a - b) for a, b in combinations(colors, 2)) > 60
    shades = [shade * np.array(b, float) for b in BACKGROUNDS for shade in np.linspace(DARKEST, 1, 6)]
    assert min(np.linalg.norm(a - b) for a in colors for b in shades) >= 60


def test_pictures_show_their_objects_in_their_colors(training: list[ShapesSample]) -> None:
    for sample in training[:200]:
        for placed in sample.objects:
            inside = shape_mask(placed.shape, placed.cx, placed.cy, placed.radius) == 1
            assert (sample.image[inside] == COLORS[placed.color]).all()


def test_pictures_of_one_object_are_of_all_classes_and_half_of_the_captions_name_the_color() -> None:
    samples = [single_object_sample(3, index) for index in range(400)]
    for sample in samples:
        check(sample)
        (placed,) = sample.objects
        assert SHAPES[label_of(sample)] == placed.shape
    counts = Counter(label_of(sample) for sample in samples)
    assert set(counts) == set(range(8))
    assert min(counts.values()) >= 25  # 50 on average
    tags = Counter(sample.metadata["tag"] for sample in samples)
    assert set(tags) == {"single_object", "colors"}
    assert 160 < tags["colors"] < 240
    assert {sample.objects[0].color for sample in samples} == set(COLORS)


def test_a_picture_of_one_object_is_a_function_of_seed_and_index_and_no_training_picture() -> None:
    pictures = {single_object_sample(seed, index).image.tobytes() for seed in (0, 1) for index in range(20)}
    assert len(pictures) == 40
    assert single_object_sample(1, 19).image.tobytes() in pictures
    assert not pictures & {training_sample(seed, index).image.tobytes() for seed in (0, 1) for index in range(20)}
