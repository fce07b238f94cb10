import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import ANY

import pytest
import torch
from PIL import Image

from data_pipeline.geneval_text import TAGS
from t2i.checkpoint import checkpoints
from t2i.config import Recipe, from_json
from t2i.export import merged_weights
from t2i.vq import vq_sha256

from .conftest import ROOT, STEPS, TIMEOUT, again, environment, execute, free_port, losses, results, rows

pytestmark = pytest.mark.slow

Stage = Callable[[int], Path]


def assert_same_weights(run_dir: Path, other: Path) -> None:
    """The newest checkpoints of two runs hold the same weights and averages, bit for bit."""
    for averaged in (False, True):
        mine, theirs = (merged_weights(checkpoints(folder)[-1], averaged) for folder in (run_dir, other))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def test_zero_1_2_and_3_give_the_same_losses(trained: Stage) -> None:
    one, two, three = (results(trained(stage)) for stage in (1, 2, 3))
    assert [row["step"] for row in one if "loss" in row] == list(range(1, STEPS + 1))
    for other in (two, three):
        assert [row.keys() for row in other] == [row.keys() for row in one]
        for row, expected in zip(other, one, strict=True):
            assert row == pytest.approx(expected, rel=1e-4, abs=1e-5)
            for key in ("loss", "val_loss"):
                assert row.get(key, 0) == pytest.approx(expected.get(key, 0), rel=0, abs=1e-5)


def test_scores_are_made_and_logged_at_the_last_step(trained: Stage) -> None:
    scored = [row for row in rows(trained(3)) if any(name.startswith("geneval") for name in row)]
    assert [row["step"] for row in scored] == [STEPS]
    assert set(scored[0]) == {"step", "geneval_shapes/overall", *(f"geneval_shapes/{tag}" for tag in TAGS)}
    assert all(0 <= value <= 1 for name, value in scored[0].items() if name != "step")


def test_the_loss_falls_from_that_of_a_uniform_guess(trained: Stage) -> None:
    curve = losses(trained(2))
    assert abs(curve[0] - math.log(512)) < 0.05  # one head starts at zero, the other near it
    assert curve[-1] < curve[0] - 0.08
    validation = [row["val_loss"] for row in rows(trained(2)) if "val_loss" in row]
    assert len(validation) == 2
    assert validation[1] < validation[0]


def test_a_run_leaves_recipe_samples_and_whole_checkpoints(trained: Stage, recipe_file: Path) -> None:
    for stage in (1, 2, 3):
        run_dir = trained(stage)
        recipe = from_json(Recipe, (run_dir / "recipe.json").read_bytes())
        given = from_json(Recipe, recipe_file.read_bytes())
        assert (recipe.model, recipe.train, recipe.run_dir) == (given.model, given.train, run_dir)
        assert (run_dir / "spiece.model").is_file()
        for step in (4, 8):
            assert Image.open(run_dir / "samples" / f"step-{step:08d}.png").size == (64 * 2 + 2, 64)
            marker = run_dir / "checkpoints" / f"step-{step:08d}" / "checkpoint.json"
            written = json.loads(marker.read_text())
            inputs = written.pop("inputs")
            assert written == {
                "step": step, "ranks": 2, "stage": stage, "global_batch": 16, "layout": ANY, "averaged": True,
                "inspected": True, "unreadable": 0,
            }  # fmt: skip
            assert inputs == {"data": ANY, "tokenizer": vq_sha256("shapes"), "text_encoder": None}
            assert (marker.parent / "recipe.json").read_bytes() == (run_dir / "recipe.json").read_bytes()
            assert (marker.parent / "spiece.model").read_bytes() == (run_dir / "spiece.model").read_bytes()


def test_a_run_goes_on_from_its_newest_whole_checkpoint(
    trained: Stage, recipe_file: Path, deepspeed_config: Stage, tmp_path: Path
) -> None:
    """What a run killed while it saved its last checkpoint leaves, and then the same command again."""
    whole, run_dir = trained(3), tmp_path / "run"
    shutil.copytree(whole, run_dir)
    unfinished = run_dir / "checkpoints" / "step-00000008"
    (unfinished / "checkpoint.json").unlink()
    for path in list(unfinished.iterdir())[1:]:
        path.write_bytes(b"cut off")
    with open(run_dir / "metrics.jsonl", "a") as metrics:
        metrics.write('{"step": 9, "lo')
    options = [recipe_file, "--deepspeed_config", deepspeed_config(3), "--run-dir", run_dir]
    assert again(tmp_path, run_dir, *options) == [0, 0], (tmp_path / "scenario.log").read_text()
    assert results(run_dir) == results(whole)  # bit for bit, and no step twice
    assert_same_weights(run_dir, whole)
    assert (unfinished / "checkpoint.json").is_file()
    # The steps up to the checkpoint were not done again.
    assert [row["samples_per_s"] for row in rows(run_dir)[:4]] == [row["samples_per_s"] for row in rows(whole)[:4]]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT], ids=lambda signum: signum.name)
def test_a_signal_saves_and_the_same_command_goes_on(
    trained: Stage, recipe_file: Path, deepspeed_config: Stage, tmp_path: Path, signum: signal.Signals
) -> None:
    run_dir = tmp_path / "run"
    options = [recipe_file, "--deepspeed_config", deepspeed_config(2), "--run-dir", run_dir]
    port = str(free_port())
    ranks = [
        subprocess.Popen(
            [sys.executable, "t2i/train.py", *map(str, options)], cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port),
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        limit = time.monotonic() + TIMEOUT
        while not (run_dir / "metrics.jsonl").exists():  # made once the first rank listens to signals
            assert time.monotonic() < limit, "no training within the time"
            assert ranks[0].poll() is None, ranks[0].stderr.read()
            time.sleep(0.005)
        ranks[0].send_signal(signum)  # to one rank: the other one has to hear of it
        errors = [rank.communicate(timeout=TIMEOUT)[1] for rank in ranks]
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
    assert [rank.returncode for rank in ranks] == [85, 85], errors
    (folder,) = (run_dir / "checkpoints").glob("step-*")
    step = json.loads((folder / "checkpoint.json").read_text())["step"]
    assert 1 <= step < STEPS
    assert losses(run_dir) == losses(trained(2))[:step]

    assert again(tmp_path, run_dir, *options) == [0, 0], (tmp_path / "scenario.log").read_text()
    assert results(run_dir) == results(trained(2))
    assert_same_weights(run_dir, trained(2))


def test_mistakes_are_one_line_and_exit_code_2(
    trained: Stage, recipe_file: Path, deepspeed_config: Stage, tmp_path: Path
) -> None:
    def alone(*options: str | Path) -> str:
        done = execute([sys.executable, "t2i/train.py", *options])
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        return done.stderr.strip().splitlines()[-1]

    config = ("--deepspeed_config", deepspeed_config(2))
    # A checkpoint of two ranks, and one process with the same micro-batch.
    error = alone(recipe_file, "--deepspeed_config", deepspeed_config(2), "--run-dir", trained(2))
    assert error.startswith("error: ")
    assert (
        "was written with global batch 16 and this run has 8 (1 ranks x micro-batch 4 x accumulation 2); set" in error
    )
    # A global batch that the lanes do not divide.
    error = alone(recipe_file, *config, "--run-dir", tmp_path, "--data.lanes", "24")
    assert error == "error: global batch 8 is not divisible by 24 lanes; nearest: 24"
    assert not list(tmp_path.iterdir())
