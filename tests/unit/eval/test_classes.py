"""The judge of classes: right on what was drawn, strict about shape, colour and motion; and the whole command."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipeline import clips, shapes
from eval.classes import _Meaning, reasons_against, score_classes, score_samples
from eval.files import read_jsonl
from eval.geneval.detections import Detection
from eval.geneval.options import JudgeOptions
from eval.geneval.shapes_judge import ShapesJudge
from t2i.config import ModelConfig
from t2i.model import NAR
from t2i.pipeline import Provenance, TextToImagePipeline
from t2i.recipes import shapes_classes, shapes_clips
from t2i.vq import load_vq

JUDGE = ShapesJudge()


def judged(frames: np.ndarray, shape: str, direction: str | None = None) -> list[str]:
    (reasons,) = score_samples([frames], [_Meaning(shape, direction)], JUDGE)
    return reasons


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31))
def test_clips_are_right_as_their_class_and_as_no_other(seed: int) -> None:
    clip = clips.clip_sample(seed, 0, 4)
    shape, direction = clips.clip_meaning(clip.label)
    assert judged(clip.frames, shape, direction) == []
    for other in clips.DIRECTIONS:
        assert bool(judged(clip.frames, shape, other)) == (other != direction)
    other_shape = shapes.SHAPES[(shapes.SHAPES.index(shape) + 1) % 8]
    assert len(judged(clip.frames, other_shape, direction)) == 4  # a reason for each frame


def test_pictures_of_the_set_are_right_as_their_class_and_as_no_other() -> None:
    for index in range(40):
        sample = shapes.single_object_sample(3, index)
        label = shapes.label_of(sample)
        for other, shape in enumerate(shapes.SHAPES):
            assert bool(judged(sample.image[None], shape)) == (other != label)


def test_backward_in_time_is_the_other_direction() -> None:
    clip = clips.clip_of_class(clips.clip_class("star", "left"), 4, np.random.default_rng(0))
    assert judged(clip.frames[::-1], "star", "right") == []
    assert judged(clip.frames[::-1], "star", "left") == [
        "expected to move left, moved by +16 +0 pixels (right, down)",
    ]


def test_two_objects_or_none_are_wrong() -> None:
    two = shapes.ground_truth({"tag": "counting", "include": [{"class": "heart", "count": 2}], "prompt": ""}, 0).image
    assert judged(two[None], "heart") == ["expected one heart, found heart, heart"]
    clip = clips.clip_of_class(clips.clip_class("heart", "up"), 4, np.random.default_rng(1)).frames.copy()
    clip[2] = 150
    assert judged(clip, "heart", "up") == ["frame 2: expected one heart, found nothing"]


def seen(*places: tuple[float, float], colors: str = "") -> list[list[Detection]]:
    names = colors.split() or ["red"] * len(places)
    return [
        [Detection("star", (x - 7, y - 7, x + 7, y + 7), 1.0, color=color)]
        for (x, y), color in zip(places, names, strict=True)
    ]


@pytest.mark.parametrize(
    ("places", "right"),
    [
        ([(16, 32), (16, 32), (24, 32), (32, 32)], True),
        ([(16, 32), (17, 31), (24.5, 32.5), (31, 33)], True),  # blurred outlines
        ([(16, 32), (16, 32), (16, 32), (24, 32)], True),  # late, but to the right
        ([(16, 32), (16, 32), (16, 32), (16, 32)], False),  # stands still
        ([(16, 32), (16, 32), (24, 32), (16, 32)], False),  # returns
        ([(16, 32), (32, 32), (24, 32), (32, 32)], False),  # goes back on the way
        ([(16, 32), (16, 32), (24, 40), (32, 48)], False),  # askew
        ([(32, 32), (32, 32), (24, 32), (16, 32)], False),  # to the left
    ],
)
def test_what_counts_as_motion_to_the_right(places: list[tuple[float, float]], right: bool) -> None:
    assert (reasons_against(seen(*places), "star", "right") == []) == right
    turned = [(y, x) for x, y in places]
    assert (reasons_against(seen(*turned), "star", "down") == []) == right
    assert reasons_against(seen(*places), "star") == []


def test_a_clip_that_changes_its_color_is_wrong() -> None:
    places = [(16.0, 32.0), (16.0, 32.0), (24.0, 32.0)]
    assert reasons_against(seen(*places, colors="red red pink"), "star", "right") == [
        "expected one colour, found pink, red"
    ]


def export(model: ModelConfig, folder: Path, image_size: int = 64) -> Path:
    sample = shapes_classes().sample
    pipe = TextToImagePipeline(NAR(model), load_vq("shapes"), None, sample, image_size, Provenance("small", 7))
    pipe.save_pretrained(folder)
    return folder


def small(model: ModelConfig) -> ModelConfig:
    return replace(model, n_layer=1, n_head=2, width=16)


def test_an_untrained_video_model_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = export(small(shapes_clips().model), tmp_path / "export")
    out = tmp_path / "out"
    scores = score_classes(folder, out, samples=2, seed=3, progress=False)
    assert [score.name for score in scores] == [*shapes.SHAPES, *clips.DIRECTIONS, "overall"]
    assert [score.samples for score in scores] == [8] * 8 + [16] * 4 + [64]
    overall = scores[-1]
    rows = read_jsonl(out / "results.jsonl")
    assert [row["class"] for row in rows] == [label for label in range(32) for _ in range(2)]
    assert rows[14]["meaning"] == "square moving down"
    assert overall.right == sum(row["correct"] for row in rows) < 10
    assert all(row["correct"] == (row["reason"] == "") for row in rows)
    assert overall.ceiling > 0.9
    assert overall.share.value == overall.right / 64 < overall.share.high
    document = json.loads((out / "summary.json").read_text())
    assert document["model"] == {"recipe": "small", "step": 7}
    assert document["scores"][-1]["right"] == overall.right
    with Image.open(out / "clips.webp") as image:
        assert image.size == (2 * 66 - 2, 32 * 66 - 2)
    assert f"{overall.right}/64" in capsys.readouterr().out
    again = score_classes(folder, tmp_path / "again", samples=2, seed=3, batch_size=5, progress=False)
    assert again == scores
    assert (tmp_path / "again" / "results.jsonl").read_bytes() == (out / "results.jsonl").read_bytes()


def test_an_untrained_model_of_pictures_is_measured(tmp_path: Path) -> None:
    scores = score_classes(
        export(small(shapes_classes().model), tmp_path / "export"), tmp_path / "out", samples=3, progress=False
    )
    assert [score.name for score in scores] == [*shapes.SHAPES, "overall"]
    assert scores[-1].ceiling > 0.9
    assert Image.open(tmp_path / "out" / "pictures.png").size == (3 * 66 - 2, 8 * 66 - 2)


def test_models_that_the_judge_cannot_measure_are_refused(
    tmp_path: Path, small_detector: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small(shapes_classes().model)
    for number, (other, size) in enumerate(
        (
            (replace(model, num_classes=9), 64),
            (model, 32),
            (replace(small(shapes_clips().model), num_classes=8), 64),
            (replace(small(shapes_clips().model), grid=(2, 8, 8)), 64),
        )
    ):
        with pytest.raises(ValueError, match=r"draws \d+ classes on a grid of .* the shapes judge knows pictures of 8"):
            score_classes(export(other, tmp_path / str(number), size), tmp_path / "out")
    folder = export(model, tmp_path / "good")
    with pytest.raises(ValueError, match=r"samples \(0\) and batch size \(64\) must be at least 1"):
        score_classes(folder, tmp_path / "out", samples=0)
    with pytest.raises(ValueError, match="unknown judge 'cow'"):
        score_classes(folder, tmp_path / "out", judge="cow")
    monkeypatch.setattr("eval.classes.JudgeOptions", lambda: JudgeOptions(detector=str(small_detector)))
    with pytest.raises(ValueError, match="good draws a circle, which the judge 'mask2former' does not know"):
        score_classes(folder, tmp_path / "out", judge="mask2former")
    description = json.loads((folder / "config.json").read_text())
    description["model"]["condition"] = "text"
    (folder / "config.json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match="draws captions, not classes; measure it with `t2i geneval run`"):
        score_classes(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
