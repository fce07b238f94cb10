"""What ranks tell each other: where each one is, and why the job ends. Plain data, and its JSON."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

EXIT_DEAD_RANK = 86
"""Exit code of a rank that is well, after another one has died, fallen silent or failed."""
EXIT_HANG = 87
"""Exit code of all ranks after the watchdog has found no step done in time."""

State = Literal["running", "failed", "finished"]


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `pid` 0 stands for a rank that has not said anything yet."""

    rank: int
    local_rank: int = 0
    host: str = "unknown host"
    pid: int = 0
    born: str = ""
    """Which process this is, among all that ever have its pid; empty where the system does not tell."""
    state: State = "running"
    step: int | None = None
    """The last one done by this process."""
    ticks: int = 0
    """Grows with every sign of progress."""
    phase: str = ""
    """What takes longer than a step, if anything: "saving", for example."""
    where: str = ""
    """Where the main thread is."""
    waits: bool = False
    """Whether it is inside torch or DeepSpeed, as a rank is that waits for others."""
    error: str = ""
    follow_up: bool = False
    """Whether the error may be the fault of another rank: it came out of a collective."""
    lines: tuple[str, ...] = ()
    """The last ones of its log."""

    def __str__(self) -> str:
        process = f", pid {self.pid}" if self.pid else ""
        return f"rank {self.rank} on {self.host}{process}"

    @property
    def progress(self) -> str:
        """ "after step 7", in words."""
        step = "before its first step" if self.step is None else f"after step {self.step}"
        return f"{step}, {self.phase}" if self.phase else step


class Progress:
    """Where the training loop is, as it says itself; read by the monitor of its rank."""

    def __init__(self) -> None:
        self.done: int | None = None
        self.phase = ""
        self.ticks = 0

    def step(self, number: int) -> None:
        """Step `number` is done."""
        self.done = number
        self.ticks += 1

    @contextlib.contextmanager
    def busy(self, phase: str) -> Iterator[None]:
        """What happens inside takes longer than a step: saving, for example."""
        self.phase = phase
        self.ticks += 1
        try:
            yield
        finally:
            self.phase = ""
            self.ticks += 1


@dataclass(frozen=True)
class Verdict:
    """Why the job ends. `text` is a line, and below it the last log lines of the ranks that it names."""

    kind: Literal["died", "silent", "failed", "hangs"]
    gone: tuple[Beat, ...]
    """The ranks that can say nothing of it themselves: dead, silent, or busy with an error of their own."""
    text: str

    @property
    def exit_code(self) -> int:
        return EXIT_HANG if self.kind == "hangs" else EXIT_DEAD_RANK


def beat_from(values: dict[str, Any]) -> Beat:
    """A beat from JSON. Raises TypeError or KeyError for anything else."""
    return Beat(**{**values, "lines": tuple(values["lines"])})


def verdict_to_json(verdict: Verdict) -> str:
    return json.dumps(asdict(verdict))


def verdict_from(values: dict[str, Any]) -> Verdict:
    """A verdict from JSON. Raises TypeError or KeyError for anything else."""
    return Verdict(values["kind"], tuple(beat_from(one) for one in values["gone"]), values["text"])


def speaker(host: str, verdict: Verdict) -> int:
    """The local rank that tells of the verdict on a host: the first one there that is well."""
    gone = {beat.local_rank for beat in verdict.gone if beat.host == host}
    return next(number for number in range(len(gone) + 1) if number not in gone)
