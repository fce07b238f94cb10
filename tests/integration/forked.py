"""Runs of several ranks without the price of imports: `python -m integration.forked SCENARIO.json`.

One process imports everything once, and forks itself for each rank of each run, as if the launcher had started it. What ends
a run here are signals that are really sent and ranks that really die, so tests that need tens of runs take minutes.

A scenario is a list of runs, each {"ranks", "arguments", "run_dir"} and what is to happen to it. "fault": one of `FAULTS`, on
the last rank; "trouble": one of `TROUBLES`, there too; those `OF_FIRST_RANK` on the first. "kill": {"after": seconds since the
first step, "who": "all" or "one"}. "signal_at": the step during which the last rank is told to save and end. The answer, a
line of JSON: for every run its exit codes, in the order of the ranks, and how many seconds the other ranks outlived the first
that died.
"""

import contextlib
import json
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, which every engine imports, and all of torch's compiler with it

from data_pipeline import shard_set
from eval import in_training
from t2i import batches, checkpoint, checkpoint_writer, objective, train

DEADLINE = 60.0
"""Seconds after which ranks that outlive another are ended."""


def die() -> None:
    """End like a process that was killed, since it is."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(owner: Any, name: str, number: int, before: bool = True) -> None:
    """Die in the n-th call of a function of a module or class (0 is the first), or just after it."""
    original, calls = getattr(owner, name), iter(range(10**9))

    def counted(*arguments: Any, **options: Any) -> Any:
        due = next(calls) == number
        if due and before:
            die()
        result = original(*arguments, **options)
        if due:
            die()
        return result

    setattr(owner, name, counted)


def in_file(part: str, skip: int) -> None:
    """Die while a checkpoint's file with `part` in its name is being written, some of it being there."""
    write, seen = checkpoint_writer._Watched.write, iter(range(10**9))

    def watched(self: Any, data: Any) -> int:
        result = write(self, data)
        if part in str(self._stream.name) and next(seen) >= skip:
            self._stream.flush()
            die()
        return result

    checkpoint_writer._Watched.write = watched  # type: ignore[method-assign]


def in_metadata(after: bool) -> None:
    """Die before or after the file that makes a checkpoint whole is there."""
    write = checkpoint.write_bytes

    def watched(path: Path, data: bytes) -> None:
        if path.name == checkpoint.MARKER and not after:
            die()
        write(path, data)
        if path.name == checkpoint.MARKER:
            die()

    checkpoint.write_bytes = watched


def signal_in_step(step: int) -> None:
    """Send SIGTERM to this process while it makes a step (the first is 1), whichever run it belongs to."""
    inputs = batches.Batches.inputs

    def watched(self: Any, done: int, *arguments: Any) -> Any:
        if done + 1 == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return inputs(self, done, *arguments)

    batches.Batches.inputs = watched  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[random.Random], None]] = {
    "reading": lambda r: at_call(shard_set.ShardSet, "_sample", r.randrange(1, 50)),
    "forward": lambda r: at_call(objective.TrainingModel, "forward", r.randrange(10)),
    "after forward": lambda r: at_call(objective.TrainingModel, "forward", r.randrange(10), before=False),
    "model shard": lambda r: in_file("model_states", r.randrange(15)),
    "optimizer shard": lambda r: in_file("optim_states", r.randrange(15)),
    "before metadata": lambda r: in_metadata(after=False),
    "after metadata": lambda r: in_metadata(after=True),
    "removing old": lambda r: at_call(checkpoint.shutil, "rmtree", r.randrange(2)),
}
"""Moments to die in, by name."""
OF_FIRST_RANK = {"model shard", "before metadata", "after metadata", "removing old", "judge without memory"}
"""Those, and troubles, that only the first rank comes to."""


def no_numbers(steps: tuple[int, ...]) -> None:
    """The loss is no number in these steps (the first is 0)."""
    forward, inputs = objective.TrainingModel.forward, batches.Batches.inputs
    now: list[int] = []

    def noting(self: Any, step: int, *arguments: Any) -> Any:
        now[:] = [step]
        return inputs(self, step, *arguments)

    def poisoned(self: Any, *arguments: Any) -> Any:
        loss = forward(self, *arguments)
        return loss * float("nan") if self.training and now[0] in steps else loss

    batches.Batches.inputs = noting  # type: ignore[method-assign]
    objective.TrainingModel.forward = poisoned  # type: ignore[method-assign]


def full_disk(step: int) -> None:
    """Files cannot grow beyond 20 kB while the checkpoint of this step is written."""
    begin, before = checkpoint.Saver.begin, resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def limited(self: Any, now: int, *arguments: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if now == step else before[0], before[1]))
        return begin(self, now, *arguments)

    checkpoint.Saver.begin = limited  # type: ignore[method-assign]


def at_reading(number: int, what: Callable[[], None]) -> None:
    """Something happens in the n-th reading of a sample (0 is the first)."""
    read, calls = shard_set.ShardSet._sample, iter(range(10**9))

    def watched(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(calls) == number:
            what()
        return read(self, *arguments, **options)

    shard_set.ShardSet._sample = watched  # type: ignore[method-assign]


def reading_for_ever() -> None:
    """What a file system does that is gone."""
    time.sleep(10**6)


def late_checkpoints() -> None:
    """The newest checkpoint is seen a while after the others, as on a network's file system."""
    checkpoints, first = checkpoint.checkpoints, time.monotonic()

    def watched(run_dir: Path) -> list[checkpoint.Checkpoint]:
        found = checkpoints(run_dir)
        return found if time.monotonic() - first > 8 else found[:-1]

    checkpoint.checkpoints = watched


def full_file_system(first: int, last: int) -> None:
    """The file system of the run folder is full from the saving of one step to that of another."""
    begin = checkpoint.Saver.begin

    def filling(self: Any, now: int, *arguments: Any) -> Any:
        filler = self.run_dir.parent / "filler"
        filler.unlink(missing_ok=True)
        if first <= now < last:
            with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
                for size in (1 << 20, 1 << 10, 1):
                    with contextlib.suppress(OSError):
                        while file.write(bytes(size)):
                            pass
        return begin(self, now, *arguments)

    checkpoint.Saver.begin = filling  # type: ignore[method-assign]


def judge_without_memory() -> None:
    """What a GPU has that is full of a model in training."""

    def judge(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory\nand a trace of it")

    in_training.judge_pictures = judge


TROUBLES: dict[str, Callable[[], None]] = {
    "two steps without numbers": lambda: no_numbers((3, 5)),
    "two steps in a row without numbers": lambda: no_numbers((3, 4)),
    "full disk": lambda: full_disk(4),
    "full file system": lambda: full_file_system(4, 20),
    "judge without memory": judge_without_memory,
    "late checkpoints": late_checkpoints,
    "reading for ever": lambda: at_reading(40, reading_for_ever),
    "stopped": lambda: at_reading(40, lambda: os.kill(os.getpid(), signal.SIGSTOP)),
}
"""What goes wrong on the last rank and does not kill it, by name."""


def _rank(rank: int, run: dict[str, Any], port: int, log: Path, seed: int) -> None:
    ranks = run["ranks"]
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    fault, trouble = run.get("fault"), run.get("trouble")
    if fault is not None and rank == (0 if fault in OF_FIRST_RANK else ranks - 1):
        FAULTS[fault](random.Random(seed))
    if trouble is not None and rank == (0 if trouble in OF_FIRST_RANK else ranks - 1):
        TROUBLES[trouble]()
    if run.get("signal_at") is not None and rank == ranks - 1:
        signal_in_step(run["signal_at"])
    sys.argv = ["t2i/train.py", *run["arguments"]]
    code = 1
    try:
        code = train.main()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def execute(run: dict[str, Any], log: Path, seed: int) -> dict[str, Any]:
    """One run; returns its exit codes (negative: the signal that ended a rank)."""
    from .conftest import free_port

    port = free_port()
    steps_file = Path(run["run_dir"]) / "metrics.jsonl"
    stamp = steps_file.stat().st_mtime_ns if steps_file.exists() else 0
    pids = []
    for rank in range(run["ranks"]):
        pid = os.fork()
        if pid == 0:
            _rank(rank, run, port, log, seed)
        pids.append(pid)
    codes: dict[int, int] = {}
    first_step: float | None = None
    first_end: float | None = None
    kill = run.get("kill")
    while len(codes) < len(pids):
        for pid in pids:
            if pid not in codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
                    first_end = first_end or time.monotonic()
        if first_step is None and steps_file.exists() and steps_file.stat().st_mtime_ns != stamp:
            first_step = time.monotonic()
        if kill is not None and first_step is not None and time.monotonic() - first_step >= kill["after"]:
            for pid in pids if kill["who"] == "all" else pids[-1:]:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
            kill = None
        if first_end is not None and time.monotonic() - first_end > DEADLINE:
            for pid in pids:
                if pid not in codes:
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)
    assert first_end is not None
    return {"codes": [codes[pid] for pid in pids], "outlived": time.monotonic() - first_end}


def main() -> None:
    """Execute the scenario in the file that is the first argument; logs go to the file beside it."""
    path = Path(sys.argv[1])
    for number, run in enumerate(json.loads(path.read_text())):
        print(json.dumps(execute(run, path.with_suffix(".log"), number)), flush=True)


if __name__ == "__main__":
    main()
