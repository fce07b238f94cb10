"""Classes and clips of the embedded data set end to end, by the command line, training in one process of two steps."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data_pipeline.clips import clip_meaning
from data_pipeline.images import open_frames
from data_pipeline.index import ShardSet
from data_pipeline.shapes import SHAPES
from eval.geneval.shapes_judge import SCORE_THRESHOLD, ShapesJudge
from t2i.config import DataConfig, Recipe
from t2i.pipeline import TextToImagePipeline
from t2i.recipes import shapes_classes, shapes_clips
from t2i.vq import load_vq, tensor_to_images

from .conftest import execute, results, t2i, train_alone

pytestmark = pytest.mark.slow


def run(*command: str | Path) -> str:
    done = t2i(*command)
    assert done.returncode == 0, done.stderr
    return done.stdout


def make_and_train(recipe: Recipe, folder: Path, kind: tuple[str, ...], encode: tuple[str, ...]) -> Path:
    """A set of 80 samples, encoded, and two steps of a small model on it; returns the export."""
    run("data", "shapes", "--out", folder / "raw", "--samples", "80", "--shard-size", "40", "--workers", "1", *kind)
    run("data", "index", folder / "raw")
    run("encode", folder / "raw", "--out", folder / "encoded", "--image-size", "64", *encode)
    small = replace(
        recipe,
        model=replace(recipe.model, n_layer=1, n_head=2, width=32, init_std=0.05),
        data=DataConfig(path=folder / "encoded", lanes=8, validation=9, workers=1),
        train=replace(
            recipe.train, steps=2, sample_every=2, log_every=1, validate_every=2, save_every=2, wandb="disabled"
        ),
        run_dir=folder / "run",
    )
    train_alone(small, {"train_micro_batch_size_per_gpu": 8, "zero_optimization": {"stage": 2}}, folder)
    assert all(0 < row.get("loss", 1) < 8 for row in results(small.run_dir))
    run("export", small.run_dir, "--out", folder / "export")
    return folder / "export"


def scores(export: Path, samples: int) -> dict[str, int]:
    run("score-classes", export, "--samples", str(samples))
    document = json.loads((export / "classes" / "summary.json").read_text())
    return {score["name"]: score["samples"] for score in document["scores"]}


def test_pictures_by_class(tmp_path: Path) -> None:
    export = make_and_train(shapes_classes(), tmp_path, ("--single-object",), ())
    encoded, judge, vq = ShardSet(tmp_path / "encoded"), ShapesJudge(), load_vq("shapes")
    right = 0
    for i in range(80):  # the classes that a model is trained on are what is in the codes
        sample = encoded.read_encoded(i)
        (found,) = judge.detect(
            list(tensor_to_images(vq.decode(torch.from_numpy(sample.codes.astype(np.int64))[None])))
        )
        right += [SHAPES.index(one.class_name) for one in found if one.score > SCORE_THRESHOLD] == [sample.label]
    assert right >= 76
    assert (tmp_path / "run" / "samples" / "step-00000002.png").is_file()
    run("sample", export, "0", "7", "--images", "3", "--out", tmp_path / "classes.png")
    with Image.open(tmp_path / "classes.png") as image:
        assert image.size == (3 * 66 - 2, 2 * 66 - 2)
    assert scores(export, 2) == {**dict.fromkeys(SHAPES, 2), "overall": 16}


def test_clips(tmp_path: Path) -> None:
    export = make_and_train(shapes_clips(), tmp_path, ("--frames", "4"), ("--frames", "4"))
    encoded = ShardSet(tmp_path / "encoded")
    sample = encoded.read_encoded(0)
    assert sample.codes.shape == (4, 8, 8)
    assert sample.label is not None
    assert sample.caption.endswith(" {} moving {}".format(*clip_meaning(sample.label)))
    # Eight clips of four frames, one below the other.
    assert Image.open(tmp_path / "run" / "samples" / "step-00000002.png").size == (4 * 66 - 2, 8 * 72 - 8)
    out = tmp_path / "clips.webp"
    run("sample", export, "3", "17", "--images", "2", "--frame-ms", "100", "--out", out)
    with Image.open(out) as image:
        assert image.format == "WEBP"
        assert image.is_animated
    frames = open_frames(out.read_bytes())
    assert [frame.size for frame in frames] == [(130, 130)] * 4
    clips = TextToImagePipeline.from_pretrained(export).clips([3, 3, 17, 17], seed=0)
    for t, frame in enumerate(frames):
        for n, clip in enumerate(clips):
            x, y = n % 2 * 66, n // 2 * 66
            np.testing.assert_array_equal(np.asarray(frame)[y : y + 64, x : x + 64], np.asarray(clip[t]))
    assert scores(export, 1)["overall"] == 32
    # A recipe of pictures does not take clips.
    refused = execute(
        [sys.executable, "t2i/train.py", "shapes-classes", "--deepspeed_config", "deepspeed_configs/cpu.json",
         "--data.path", tmp_path / "encoded", "--data.validation", "8", "--run-dir", tmp_path / "other"]
    )  # fmt: skip
    assert refused.returncode == 2
    assert "encoded with grid [4, 8, 8] and recipe shapes-classes needs [8, 8]" in refused.stderr
