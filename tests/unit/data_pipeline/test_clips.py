"""Clips: classes and back, motion by whole tokens, and that the first frame's shape is known before the others are drawn."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.clips import (
    CLASSES,
    DIRECTIONS,
    MAX_FRAMES,
    MIN_FRAMES,
    STEP,
    clip_class,
    clip_meaning,
    clip_of_class,
    clip_sample,
)
from data_pipeline.shapes import CENTERS, COLORS, IMAGE_SIZE, SHAPES, shape_mask

FRAMES = st.integers(MIN_FRAMES, MAX_FRAMES)


def test_classes_are_shapes_times_directions() -> None:
    meanings = [clip_meaning(label) for label in range(CLASSES)]
    assert CLASSES == len(set(meanings)) == 32
    assert [clip_class(*meaning) for meaning in meanings] == list(range(32))
    assert meanings[0] == ("circle", "left")
    assert meanings[7] == ("square", "down")
    for label in (-1, 32):
        with pytest.raises(ValueError, match=f"{label} is no class of the clips; classes are 0 to 31"):
            clip_meaning(label)


@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**31), frames=FRAMES)
def test_a_clip_is_what_its_class_and_caption_say(seed: int, index: int, frames: int) -> None:
    clip = clip_sample(seed, index, frames)
    shape, direction = clip_meaning(clip.label)
    assert (clip.frames.shape, clip.frames.dtype) == ((frames, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    assert {one.shape for one in clip.objects} == {shape}
    (color,) = {one.color for one in clip.objects}
    assert clip.caption == f"a {color} {shape} moving {direction}"
    places_T2 = np.array([(one.cx, one.cy) for one in clip.objects])
    assert np.isin(places_T2, CENTERS).all()
    np.testing.assert_array_equal(places_T2[0], places_T2[1])
    steps = np.diff(places_T2[1:], axis=0)
    np.testing.assert_array_equal(steps, np.tile(np.array(DIRECTIONS[direction]) * STEP, (frames - 2, 1)))
    for picture, one in zip(clip.frames, clip.objects, strict=True):
        inside = shape_mask(one.shape, one.cx, one.cy, one.radius) == 1
        assert (picture[inside] == COLORS[color]).all()
    again = clip_sample(seed, index, frames)
    np.testing.assert_array_equal(clip.frames, again.frames)


@given(seed=st.integers(0, 2**31), index=st.integers(0, 2**31), frames=FRAMES)
def test_what_does_not_move_stands_still(seed: int, index: int, frames: int) -> None:
    clip = clip_sample(seed, index, frames)
    covered = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
    for one in clip.objects:
        covered |= shape_mask(one.shape, one.cx, one.cy, one.radius) > 0
    still = clip.frames[:, ~covered]
    assert (still == still[0]).all()


@given(label=st.integers(0, CLASSES - 1), frames=FRAMES, seed=st.integers(0, 2**31))
def test_the_first_frames_shape_is_drawn_before_those_of_the_others(label: int, frames: int, seed: int) -> None:
    # What module `clips` promises of wavefronts: levels t + h + w of the shape's first token.
    clip = clip_of_class(label, frames, np.random.default_rng(seed))
    levels = [t + (one.cy + one.cx) / 8 for t, one in enumerate(clip.objects)]
    assert levels[0] < min(levels[1:])


def test_all_classes_colors_and_starts_occur() -> None:
    clips = [clip_sample(1, index, 4) for index in range(640)]
    assert set(Counter(clip.label for clip in clips)) == set(range(CLASSES))
    assert {clip.objects[0].color for clip in clips} == set(COLORS)
    right = [c.objects[0] for c in clips if clip_meaning(c.label)[1] == "right"]
    assert {one.cx for one in right} == {16, 24, 32}  # it has two tokens to go
    assert {one.cy for one in right} == set(CENTERS.tolist())
    up = [c.objects[0] for c in clips if clip_meaning(c.label)[1] == "up"]
    assert {one.cy for one in up} == {32, 40, 48}
    assert {one.shape for one in up} == set(SHAPES)


def test_neighbours_and_seeds_differ() -> None:
    assert len({clip_sample(seed, index, 4).frames.tobytes() for seed in (0, 1) for index in range(50)}) == 100


def test_clips_of_other_lengths_are_refused() -> None:
    for frames in (MIN_FRAMES - 1, MAX_FRAMES + 1):
        with pytest.raises(ValueError, match=f"clips of {frames} frames cannot be made"):
            clip_sample(0, 0, frames)
