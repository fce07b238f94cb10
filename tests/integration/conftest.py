"""One small data set and a few real training runs through the launcher, shared by all integration tests.

A two-rank run takes about 20 s, most of it imports, so runs are made once, whichever of the processes that share the tests
needs them first, and tests look at what they left.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from t2i.config import DataConfig, EvalConfig, Recipe, TrainConfig, to_json
from t2i.recipes import shapes_tiny

ROOT = Path(__file__).parents[2]
STEPS = 8
SAMPLES = 600
VALIDATION = 21  # no multiple of micro-batch or ranks: the last validation batches are of different sizes
TIMEOUT = 240


def environment(**changes: str) -> dict[str, str]:
    """This process's environment, with its own interpreter's programs first on the path."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    # With the tests as pytest names them, since an installed library may have a package `tests`.
    modules = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    return os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "PYTHONPATH": modules} | changes


def execute(
    command: Sequence[str | Path], timeout: float = TIMEOUT, **changes: str
) -> subprocess.CompletedProcess[str]:
    """Run a command in a process group of its own, which does not outlive it or the timeout."""
    process = subprocess.Popen(
        [str(part) for part in command], cwd=ROOT, env=environment(**changes), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def t2i(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The `t2i` command."""
    return execute([sys.executable, "-m", "t2i.cli", *arguments])


def train_alone(recipe: Recipe, config: dict[str, object], folder: Path) -> Path:
    """Train the recipe in one process of its own; returns the run folder."""
    (folder / "recipe.json").write_text(to_json(recipe))
    (folder / "zero.json").write_text(json.dumps(config))
    done = execute([sys.executable, "t2i/train.py", folder / "recipe.json", "--deepspeed_config", folder / "zero.json"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 steps done" in done.stdout
    return recipe.run_dir


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def launch(*arguments: str | Path, ranks: int = 2) -> subprocess.CompletedProcess[str]:
    """`deepspeed t2i/train.py ARGUMENTS` on several ranks."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks), "--master_port", str(free_port())]
    return execute([*launcher, "t2i/train.py", *arguments])


def rows(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def results(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run without what depends on the clock."""
    clock = {
        "samples_per_s", "tokens_per_s", "mfu", "data_wait_share", "save_share", "memory_gib", "seconds_left",
    }  # fmt: skip
    return [{key: value for key, value in row.items() if key not in clock} for row in rows(run_dir)]


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in rows(run_dir) if "loss" in row]


def forked(folder: Path, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Execute runs one after the other, each forked from one process that has imported everything."""
    scenario = folder / "scenario.json"
    scenario.write_text(json.dumps(runs))
    done = execute([sys.executable, "-m", "integration.forked", scenario], timeout=900)
    log = scenario.with_suffix(".log")
    assert done.returncode == 0, done.stderr + (log.read_text()[-4000:] if log.exists() else "")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"codes"')]


def again(folder: Path, run_dir: Path, *arguments: str | Path, **more: Any) -> list[int]:
    """Exit codes of one run of two ranks through `forked`, whose files go to a folder."""
    run = {"ranks": 2, "arguments": [str(argument) for argument in arguments], "run_dir": str(run_dir), **more}
    (answer,) = forked(folder, [run])
    return list(answer["codes"])


Entry = Callable[..., dict[str, Any]]
"""entry(run_dir, stage, ranks, options..., what is to happen) -> a run of a scenario; the global batch stays the same."""


def entries(recipe: Recipe, folder: Path) -> Entry:
    """Makes runs of a recipe for `forked`."""
    (folder / "recipe.json").write_text(to_json(recipe))

    def entry(run_dir: Path, stage: int = 2, ranks: int = 2, *options: str, **more: Any) -> dict[str, Any]:
        zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 100} if stage == 3 else {})
        config = {
            "train_micro_batch_size_per_gpu": 8 // ranks, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
            "zero_optimization": zero,
        }  # fmt: skip
        path = folder / f"zero{stage}-{ranks}.json"
        path.write_text(json.dumps(config))
        arguments = [str(folder / "recipe.json"), "--deepspeed_config", str(path), "--run-dir", str(run_dir), *options]
        return {"ranks": ranks, "arguments": arguments, "run_dir": str(run_dir), **more}

    return entry


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The one folder of all processes that share the tests."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared"
    folder.mkdir(exist_ok=True)
    return folder


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, which the first of several processes makes while the others wait."""
    with FileLock(folder.with_suffix(".lock")):
        whole = folder.with_suffix(".whole")
        if not whole.exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process whose `make` has failed
            folder.mkdir()
            make(folder)
            whole.touch()
    return folder


@pytest.fixture(scope="session")
def data(shared: Path) -> Path:
    """Shapes pictures made, indexed and encoded by the command line."""

    def make(folder: Path) -> None:
        raw = folder / "raw"
        for command in (
            ("data", "shapes", "--out", raw, "--samples", str(SAMPLES), "--shard-size", "200", "--workers", "1"),
            ("data", "index", raw),
            ("encode", raw, "--out", folder / "encoded", "--image-size", "64", "--tokenizer", "shapes"),
        ):
            done = t2i(*command)
            assert done.returncode == 0, done.stderr

    return once(shared / "data", make) / "encoded"


def small_recipe(data: Path) -> Recipe:
    """shapes-tiny, shrunk until a step takes milliseconds."""
    tiny = shapes_tiny()
    assert tiny.text_encoder is not None
    return replace(
        tiny,
        name="small",
        model=replace(tiny.model, n_layer=2, width=32, init_std=0.05, condition_dim=32, dropout=0.1),
        text_encoder=replace(tiny.text_encoder, dim=32, n_layer=1, ffn_dim=64),
        data=DataConfig(path=data, lanes=8, validation=VALIDATION, workers=1),
        train=TrainConfig(
            steps=STEPS, seed=1, lr=5e-3, warmup_steps=2, ema_decay=0.5,
            log_every=1, validate_every=4, sample_every=4, save_every=4, keep_last=5,
            sample_prompts=("a photo of a red circle", "a photo of two stars"), wandb="disabled",
        ),
        eval=EvalConfig(geneval_every=8, per_task=1),
    )  # fmt: skip


@pytest.fixture(scope="session")
def recipe_file(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.json"
    path.write_text(to_json(small_recipe(data)))
    return path


@pytest.fixture(scope="session")
def deepspeed_config(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """deepspeed_config(stage) -> a configuration with accumulation, clipping, and under stage 3 nothing kept whole."""
    folder = tmp_path_factory.mktemp("deepspeed")

    def write(stage: int) -> Path:
        zero: dict[str, int] = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
        config = {
            "train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 2, "gradient_clipping": 1.0,
            "zero_optimization": zero,
        }  # fmt: skip
        path = folder / f"zero{stage}.json"
        path.write_text(json.dumps(config))
        return path

    return write


@pytest.fixture(scope="session")
def trained(recipe_file: Path, deepspeed_config: Callable[[int], Path], shared: Path) -> Callable[[int], Path]:
    """trained(stage) -> folder of an uninterrupted run of two ranks at that ZeRO stage; of stage 2 by the launcher."""

    def train(stage: int) -> Path:
        def make(folder: Path) -> None:
            arguments = [recipe_file, "--deepspeed_config", deepspeed_config(stage), "--run-dir", folder / "run"]
            if stage == 2:
                run = launch(*arguments)
                assert run.returncode == 0, run.stdout + run.stderr
            else:
                assert again(folder, folder / "run", *arguments) == [0, 0], (folder / "scenario.log").read_text()

        return once(shared / f"zero{stage}", make) / "run"

    return train
