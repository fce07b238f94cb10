"""A rank that dies, hangs or is stopped ends the job, which says which one it was; launchers that restart it go on from the
newest checkpoint."""

import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from t2i.checkpoint import checkpoints
from t2i.config import EvalConfig

from .conftest import (
    ROOT,
    TIMEOUT,
    Entry,
    entries,
    environment,
    execute,
    forked,
    free_port,
    results,
    rows,
    small_recipe,
)
from .test_training import assert_same_weights

pytestmark = pytest.mark.slow

HOST = socket.gethostname()
OFTEN = ("--train.steps", "120", "--train.save-every", "10")
LOOP = re.compile(r"^until (deepspeed .*); do\n.*?^done$", re.MULTILINE | re.DOTALL)
"""In docs/faults.md."""


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Entry:
    recipe = small_recipe(data)
    quiet = replace(recipe.train, sample_every=0, validate_every=10**6, keep_last=2)
    return entries(replace(recipe, train=quiet, eval=EvalConfig()), tmp_path_factory.mktemp("configs"))


def log(run_dir: Path, rank: int, kind: str = "log") -> str:
    return (run_dir / "logs" / f"rank-{rank:05d}.{kind}").read_text()


def pid_of(run_dir: Path, rank: int) -> int:
    """By the title of its log."""
    return int(re.findall(r"^--- .* rank \d+ of 2 on \S+, pid (\d+)$", log(run_dir, rank), re.MULTILINE)[-1])


def killed_once(
    command: Sequence[str], run_dir: Path, ready: Callable[[], bool], output: Path, **changes: str
) -> tuple[int, int, float]:
    """Start a launcher and kill rank 1 once `ready`; returns the launcher's exit code, who was killed, and how many seconds the
    job then took to end."""
    with open(output, "w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(**changes), start_new_session=True, stdout=file, stderr=file
        )
    try:
        limit = time.monotonic() + TIMEOUT
        while not ready():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < limit, output.read_text()
            time.sleep(0.02)
        pid = pid_of(run_dir, 1)
        os.kill(pid, signal.SIGKILL)
        begun = time.monotonic()
        code = process.wait(TIMEOUT)
        return code, pid, time.monotonic() - begun
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def has_rows(run_dir: Path, count: int) -> bool:
    return (run_dir / "metrics.jsonl").exists() and len(rows(run_dir)) >= count


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_killed_rank_ends_the_job_of_the_launcher(run: Entry, tmp_path: Path) -> None:
    run_dir, output = tmp_path / "run", tmp_path / "output"
    arguments = run(run_dir, 2, 2, "--train.steps", "100000", "--train.save-every", "100000")["arguments"]
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "t2i/train.py"]
    code, killed, seconds = killed_once([*launcher, *arguments], run_dir, lambda: has_rows(run_dir, 20), output)
    text = output.read_text()
    assert code != 0
    assert seconds < 30
    assert not is_running(pid_of(run_dir, 0))
    (message,) = re.findall(r"^error: .*$", text, re.MULTILINE)
    found = re.match(
        rf"error: rank 1 on {HOST}, pid {killed} is dead \(its process has ended\), after step (\d+), last seen",
        message,
    )
    assert found is not None, text
    steps = [row["step"] for row in rows(run_dir) if "loss" in row]
    assert steps[-1] - 1000 < int(found[1]) <= steps[-1]  # a beat comes once a second
    assert re.search(r"last lines of rank 1:\n(    step \d+: loss \S+, \S+ samples/s\n)+", text)
    assert message.removeprefix("error: ") in log(run_dir, 0)
    assert "Connection closed by peer" not in text  # what the other rank's collective said is in its log


def test_a_rank_that_hangs_ends_the_job_with_the_stacks_of_all(run: Entry, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (answer,) = forked(tmp_path, [run(run_dir, 2, 2, "--train.watchdog-seconds", "5", trouble="reading for ever")])
    output = (tmp_path / "scenario.log").read_text()
    assert answer["codes"] == [87, 87], output
    (message,) = re.findall(r"^error: .*$", output, re.MULTILINE)
    step = rows(run_dir)[-1]["step"]
    assert re.match(rf"error: no step done for \d+ s, after step {step}; rank 1 on {HOST}, pid \d+ is behind", message)
    assert f"stacks of all ranks are in {run_dir}/logs/rank-*.stacks" in message
    assert "reading_for_ever" in log(run_dir, 1, "stacks")
    assert "reading_for_ever" not in log(run_dir, 0, "stacks")
    assert "distributed_c10d.py" in log(run_dir, 0, "stacks")


def test_a_rank_that_is_stopped_ends_the_job_though_it_cannot_say_a_word(run: Entry, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    (answer,) = forked(tmp_path, [run(run_dir, 2, 2, trouble="stopped")])
    output = (tmp_path / "scenario.log").read_text()
    assert answer["codes"] == [86, -signal.SIGKILL], output
    assert answer["outlived"] < 30
    (message,) = re.findall(r"^error: .*$", output, re.MULTILINE)
    assert re.match(
        rf"error: rank 1 on {HOST}, pid \d+ is dead or stopped: no sign of life for (1\d s, after step|2[5-9] s, before its)",
        message,
    )
    assert message.endswith("it cannot write its stacks")


@pytest.fixture(scope="module")
def straight(run: Entry, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that saves often, which nobody killed."""
    folder = tmp_path_factory.mktemp("straight")
    assert forked(folder, [run(folder / "run", 2, 2, *OFTEN)])[0]["codes"] == [0, 0]
    return folder / "run"


def loop(*command: str) -> list[str]:
    """The documented loop around another command, which does not wait as long."""
    text = (ROOT / "docs" / "faults.md").read_text()
    found = LOOP.search(text)
    assert found is not None
    return ["bash", "-c", found[0].replace(found[1], shlex.join(command)).replace("sleep 10", "sleep 0.1")]


@pytest.mark.parametrize("launcher", ["torchrun", "loop"])
def test_a_job_that_is_started_again_goes_on_from_the_newest_checkpoint(
    launcher: str, run: Entry, straight: Path, tmp_path: Path
) -> None:
    killed, output = tmp_path / "killed", tmp_path / "output"
    arguments = ["t2i/train.py", *run(killed, 2, 2, *OFTEN)["arguments"]]
    if launcher == "torchrun":
        command = ["torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1", *arguments]
    else:
        command = loop("deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), *arguments)
    code, pid, _ = killed_once(
        command, killed, lambda: bool(checkpoints(killed)), output, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"
    )
    text = output.read_text()
    assert code == 0, text
    assert f"error: rank 1 on {HOST}, pid {pid} is dead" in text
    titles = re.findall(r"^--- .*$", log(killed, 1), re.MULTILINE)
    assert len(titles) == 2
    assert pid_of(killed, 1) != pid
    assert results(killed) == results(straight)
    assert_same_weights(killed, straight)


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (2, 1), (85, 1), (1, 3), (86, 3), (247, 3)])
def test_the_loop_starts_again_after_faults_alone(code: int, starts: int, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    command = f"echo >> {begun}; [ $(wc -l < {begun}) = 3 ] || exit {code}"
    execute(loop("bash", "-c", command), timeout=30)
    assert len(begun.read_text()) == starts


def test_the_loop_ends_after_a_mistake() -> None:
    launcher = ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()), "t2i/train.py", "no-recipe"]
    done = execute(loop(*launcher), timeout=TIMEOUT)
    assert done.stderr.count("no recipe or file 'no-recipe'") == 1, done.stdout + done.stderr
