"""What goes wrong without killing anybody: numbers that are none, samples that cannot be read, full disks; and options of a
run that change how it computes and not what."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.index import ShardSet
from data_pipeline.loader import LaneOrder
from t2i.checkpoint import checkpoints
from t2i.config import EvalConfig
from t2i.export import merged_weights

from .conftest import ROOT, STEPS, VALIDATION, Entry, entries, forked, losses, rows, small_recipe

pytestmark = pytest.mark.slow

Stage = Callable[[int], Path]


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    recipe = small_recipe(data)
    quiet = replace(recipe.train, sample_every=0, validate_every=100, save_every=4)
    return entries(replace(recipe, train=quiet, eval=EvalConfig()), tmp_path_factory.mktemp("configs"))


def odd_steps(run_dir: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run_dir / "odd_steps.jsonl").read_text().splitlines()]


def test_steps_without_numbers_are_left_out_and_counted(run: Entry, data: Path, tmp_path: Path) -> None:
    folders = {stage: tmp_path / f"zero{stage}" for stage in (1, 2, 3)}
    trouble = "two steps without numbers"
    answers = forked(
        tmp_path,
        [run(folder, stage, 2, "--train.max-bad-steps", "2", trouble=trouble) for stage, folder in folders.items()],
    )
    assert [answer["codes"] for answer in answers] == [[0, 0]] * 3, (tmp_path / "scenario.log").read_text()
    shards = ShardSet(data)
    order = LaneOrder(0, len(shards) - VALIDATION, 8, 1)
    for folder in folders.values():
        curve = [row["loss"] for row in rows(folder) if "loss" in row]
        assert [loss is None for loss in curve] == [step in (4, 6) for step in range(1, STEPS + 1)]
        assert [row["skipped_steps"] for row in rows(folder) if "loss" in row] == [0, 0, 0, 1, 1, 2, 2, 2]
        odd = odd_steps(folder)
        assert [(row["step"], row["kind"], row["loss"]) for row in odd] == [(4, "skipped", None), (6, "skipped", None)]
        # Only the second rank's losses were no numbers.
        numbers = order.indices(3, 16, 1, 2)
        assert odd[0]["samples"] == [{"key": shards.key(int(i)), "shard": shards.shard_of(int(i))} for i in numbers]
    one, *others = [[row["loss"] for row in rows(folder) if row.get("loss") is not None] for folder in folders.values()]
    for other in others:
        assert other == pytest.approx(one, rel=0, abs=1e-5)


def test_too_many_bad_steps_in_a_row_end_the_run(run: Entry, tmp_path: Path) -> None:
    trouble = "two steps in a row without numbers"
    (answer,) = forked(tmp_path, [run(tmp_path / "run", 2, 2, "--train.max-bad-steps", "2", trouble=trouble)])
    assert answer["codes"] == [2, 2]
    log = (tmp_path / "scenario.log").read_text()
    assert "Traceback" not in log
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    samples = odd_steps(tmp_path / "run")[1]["samples"]
    assert isinstance(samples, list)
    assert "were no finite numbers in 2 steps in a row; the last, step 5, had samples" in error
    assert f"{samples[0]['key']} in {samples[0]['shard']}" in error
    assert [one.info.step for one in checkpoints(tmp_path / "run")] == [4]


def test_a_full_disk_leaves_the_checkpoint_before_and_the_run_as_asked(run: Entry, tmp_path: Path) -> None:
    stopped, gone_on, blocking = (tmp_path / name for name in ("stopped", "gone-on", "blocking"))
    often = ("--train.save-every", "2")
    goes_on = ("--train.on-save-error", "continue")
    answers = forked(
        tmp_path,
        [
            run(stopped, 2, 2, *often, trouble="full disk"),
            run(gone_on, 2, 2, *often, *goes_on, trouble="full disk"),
            run(blocking, 2, 2, *often, *goes_on, "--train.no-background-save", trouble="full disk"),
            run(stopped, 2, 2, *often),
        ],
    )
    log = (tmp_path / "scenario.log").read_text()
    assert [answer["codes"] for answer in answers] == [[2, 2], [0, 0], [0, 0], [0, 0]], log
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert "rank 1 could not write" in error
    assert "step-00000004" in error
    assert "File too large" in error
    assert "goes on from the newest" in error
    for folder in (gone_on, blocking):
        assert [one.info.step for one in checkpoints(folder)] == [2, 6, 8]
        assert sum("save_error" in row for row in rows(folder)) == 1
    # The one that was stopped went on from step 2, and wrote what it could not write before.
    assert [one.info.step for one in checkpoints(stopped)] == [2, 4, 6, 8]
    assert losses(stopped) == losses(gone_on) == losses(blocking)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a file system here: {error}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_file_system_without_room_for_a_single_row(run: Entry, small_disk: Path, tmp_path: Path) -> None:
    run_dir = small_disk / "run"
    often = ("--train.steps", "24", "--train.save-every", "4", "--train.sample-every", "8")
    often += ("--train.on-save-error", "continue")
    (answer,) = forked(tmp_path, [run(run_dir, 2, 2, *often, trouble="full file system")])
    log = (tmp_path / "scenario.log").read_text()
    assert answer["codes"] == [0, 0], log
    assert "its rows wait for the next time" in log
    steps = [one.info.step for one in checkpoints(run_dir)]
    assert steps in ([20, 24], [24])  # at 20 one rank makes room while the other looks for it
    assert len(losses(run_dir)) == 24
    errors = [row["save_error"] for row in rows(run_dir) if "save_error" in row]
    assert len(errors) == 6 - len(steps)
    assert all("No space left" in error or "MiB left" in error for error in errors)


def test_a_judge_that_fails_does_not_end_the_run(run: Entry, tmp_path: Path) -> None:
    judged, failing = tmp_path / "judged", tmp_path / "failing"
    often = ("--eval.geneval-every", "4", "--eval.per-task", "1")
    trouble = "judge without memory"
    answers = forked(tmp_path, [run(judged, 3, 2, *often), run(failing, 3, 2, *often, trouble=trouble)])
    log = (tmp_path / "scenario.log").read_text()
    assert [answer["codes"] for answer in answers] == [[0, 0], [0, 0]], log
    assert [row["step"] for row in rows(judged) if "geneval_shapes/counting" in row] == [4, 8]
    errors = [{"step": step, "geneval_error": "RuntimeError: out of memory"} for step in (4, 8)]
    assert [row for row in rows(failing) if "geneval_error" in row] == errors
    assert "step 4: judging pictures failed (RuntimeError: out of memory); going on" in log
    assert losses(failing) == losses(judged)
    assert [one.info.step for one in checkpoints(failing)] == [4, 8]


def test_all_ranks_go_on_from_the_same_checkpoint(run: Entry, tmp_path: Path) -> None:
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    late = run(stopped, 2, 2, "--train.watchdog-seconds", "60", trouble="late checkpoints")  # else ranks wait for long
    answers = forked(tmp_path, [run(straight, 2, 2), run(stopped, 2, 2, signal_at=6), late])
    assert [answer["codes"] for answer in answers] == [[0, 0], [85, 85], [0, 0]], (
        tmp_path / "scenario.log"
    ).read_text()
    assert losses(stopped) == losses(straight)


def test_a_sample_that_cannot_be_read_any_more(run: Entry, data: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(data, broken)
    shards = ShardSet(broken)
    number = int(LaneOrder(0, len(shards) - VALIDATION, 8, 1).indices(2, 16)[3])
    path = broken / shards.shard_of(number)
    before = path.stat()
    with open(path, "r+b") as tar:  # what a disk does to a file, which looks the same from outside
        content = tar.read()
        start = content.index(shards.members(number)["codes.npy"])
        tar.seek(start)
        tar.write(b"\0" * 32)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    ends, goes_on, alone = (tmp_path / name for name in ("ends", "goes-on", "alone"))
    here = ("--data.path", str(broken))
    answers = forked(
        tmp_path,
        [
            run(ends, 2, 1, *here),
            run(goes_on, 2, 2, *here, "--data.unreadable", "replace", "--model.dropout", "0"),
            run(alone, 2, 1, *here, "--data.unreadable", "replace", "--model.dropout", "0"),
        ],
    )
    log = (tmp_path / "scenario.log").read_text()
    assert [answer["codes"] for answer in answers] == [[2], [0, 0], [0]], log
    (error,) = [line for line in log.splitlines() if line.startswith("error: ")]
    assert f"sample {shards.key(number)!r} at byte" in error
    assert str(path) in error
    for folder in (goes_on, alone):
        assert [row["unreadable"] for row in rows(folder) if "loss" in row][-1] == 1
    # Whichever rank meets it: the same sample stands in its place.
    assert losses(goes_on) == pytest.approx(losses(alone), rel=0, abs=1e-5)
    assert f"takes another sample in place of number {number}: sample {shards.key(number)!r}" in log


def test_a_run_starts_from_the_weights_of_another(run: Entry, trained: Stage, tmp_path: Path) -> None:
    still = (
        "--train.lr",
        "1e-12",
        "--train.steps",
        "1",
        "--train.weight-decay",
        "0",
        "--train.init-from",
        str(trained(2)),
    )
    answers = forked(tmp_path, [run(tmp_path / f"zero{stage}", stage, 2, *still) for stage in (2, 3)])
    log = (tmp_path / "scenario.log").read_text()
    assert [answer["codes"] for answer in answers] == [[0, 0]] * 2, log
    source = merged_weights(checkpoints(trained(2))[-1], averaged=True)
    assert log.count(f"starting from {trained(2)}: {len(source)} parameters taken") == 2
    for folder in (tmp_path / "zero2", tmp_path / "zero3"):
        mine = merged_weights(checkpoints(folder)[-1])
        for name, tensor in source.items():
            torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-9)
        assert (folder / "spiece.model").read_bytes() == (trained(2) / "spiece.model").read_bytes()


def test_a_compiled_run_learns_the_same_and_goes_on_uncompiled(run: Entry, tmp_path: Path) -> None:
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    still = ("--model.dropout", "0")
    runs = [
        run(plain, 2, 1, *still),
        run(compiled, 2, 1, *still, "--train.compile", signal_at=3),
        run(compiled, 2, 1, *still),
    ]
    answers = forked(tmp_path, runs)
    assert [answer["codes"] for answer in answers] == [[0], [85], [0]], (tmp_path / "scenario.log").read_text()[-4000:]
    assert losses(compiled) == pytest.approx(losses(plain), rel=0, abs=1e-4)


def test_the_configurations_that_come_along_train(run: Entry, tmp_path: Path) -> None:
    """In bf16, as on GPUs; offloaded are optimizer and parameters from one memory to the same one here."""
    names = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
    runs = [run(tmp_path / name, 2, 2, "--train.steps", "3") for name in names]
    for name, entry in zip(names, runs, strict=True):
        entry["arguments"][2] = str(ROOT / "deepspeed_configs" / f"{name}.json")
    answers = forked(tmp_path, runs)
    assert [answer["codes"] for answer in answers] == [[0, 0]] * 5, (tmp_path / "scenario.log").read_text()[-4000:]
    for name in names:
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "zero1"), rel=0, abs=0.02)
