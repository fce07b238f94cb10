"""Who of the ranks is dead or hangs, and what to say of it: pure functions of what ranks have said and when.

No sockets and no clock of its own in here: `t2i.monitor` brings both, so that every rule can be tested by itself. Times
are seconds of one clock, that of the process which judges, since the clocks of hosts differ.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

BEAT_SECONDS = 2.0
"""Between two signs of life of a rank."""
SILENT_SECONDS = 20.0
"""Silence after which a rank in training is taken for dead. Nothing less will do for a host without power."""
SILENT_AT_START_SECONDS = 60.0
"""The same before the first step, when libraries that are loaded and keep Python's lock can hold up the beats."""
QUIET_SECONDS = 2.5 * BEAT_SECONDS
"""Silence that means something where there is other evidence."""
NEVER_HEARD_SECONDS = 30.0
"""How long a rank may take for its first beat."""
SETTLE_SECONDS = 0.5
"""Between the first connection that ends and the verdict: a dead host takes several ranks with it."""
FOLLOW_UP_SECONDS = 5.0
"""How long an error inside a collective waits for the rank that caused it to be found."""
UNUSUAL_FACTOR = 4
"""Before the first step, and while saving, validating and sampling, a step may take this many times `watchdog`."""

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
    """Why the job ends. `text` is a line, and the culprits' last log lines below it."""

    kind: Literal["died", "silent", "failed", "hangs"]
    culprits: tuple[Beat, ...]
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
    return Verdict(values["kind"], tuple(beat_from(one) for one in values["culprits"]), values["text"])


@dataclass
class _Seen:
    beat: Beat
    heard: float
    moved: float
    ended: float | None = None
    failed: float | None = None


@dataclass
class Judge:
    """Takes what is heard of some ranks and says, at any time, whether the job has to end and why.

    The verdict is about the first cause. An error that came out of a collective is most often the echo of another rank's
    death, so it counts only when nothing else has been found for a while.
    """

    ranks: Collection[int]
    watchdog: float
    """Seconds without a step that are too many; 0 for no such limit."""
    stacks: str
    """Where stacks are written to, for the text."""
    now: float
    """Time at which judging begins."""
    _seen: dict[int, _Seen] = field(init=False)
    _looked: float = field(init=False)

    def __post_init__(self) -> None:
        self._seen = {rank: _Seen(Beat(rank), self.now, self.now) for rank in self.ranks}
        self._looked = self.now

    def hear(self, beat: Beat, now: float) -> None:
        """A beat has come."""
        seen = self._seen[beat.rank]
        if beat.ticks != seen.beat.ticks or beat.state != seen.beat.state or not seen.beat.pid:
            seen.moved = now
        if beat.state == "failed" and seen.failed is None:
            seen.failed = now
        seen.beat, seen.heard = beat, now

    def end(self, rank: int, now: float) -> None:
        """The connection to a rank has ended."""
        self._seen[rank].ended = now

    def has_ended(self, rank: int) -> bool:
        return self._seen[rank].ended is not None

    def all_finished(self) -> bool:
        return all(seen.beat.state == "finished" for seen in self._seen.values())

    def verdict(self, now: float) -> Verdict | None:
        """Why the job has to end, or None. Call it often: a long gap between two calls is not held against the ranks."""
        gap, self._looked = now - self._looked, now
        if gap > BEAT_SECONDS + 1:
            # This process was stopped itself, or something kept Python's lock: beats have come and were not read.
            for seen in self._seen.values():
                seen.heard, seen.moved = seen.heard + gap, seen.moved + gap
        return self._failed() or self._dead(now) or self._echo(now) or self._hangs(now)

    def _failed(self) -> Verdict | None:
        failures = [seen for seen in self._seen.values() if seen.failed is not None and not seen.beat.follow_up]
        if not failures:
            return None
        first = min(failures, key=lambda seen: seen.failed or 0.0).beat
        return Verdict("failed", (first,), with_lines(f"{first} failed {first.progress}: {first.error}", [first]))

    def _dead(self, now: float) -> Verdict | None:
        watched = [seen for seen in self._seen.values() if seen.beat.state != "finished"]
        ended = sorted((seen.ended, seen.beat.rank) for seen in watched if seen.ended is not None)
        troubled = any(seen.failed is not None and now - seen.failed > FOLLOW_UP_SECONDS for seen in watched)
        silent = [
            seen for seen in watched
            if seen.ended is None and now - seen.heard > (QUIET_SECONDS if ended or troubled else _patience(seen.beat))
        ]  # fmt: skip
        quiet = [seen.beat for seen in silent]
        silence = f"nothing heard of {_names(quiet)} for {min((now - seen.heard for seen in silent), default=0):.0f} s"
        if ended:
            if now - ended[0][0] < SETTLE_SECONDS:
                return None
            dead = [self._seen[rank].beat for _, rank in ended]
            # A rank whose own call broke, and which then went, followed another.
            first = [beat for beat in dead if beat.state != "failed"] or dead
            cause = f": {first[0].error}" if first[0].error else " without a word"
            text = f"{_names(first)} died {first[0].progress}{cause}" + (f"; {silence} either" if quiet else "")
            return Verdict("died", (*first, *quiet), with_lines(text, [*first, *quiet]))
        if quiet:
            text = f"{silence}, {quiet[0].progress}: stopped, cut off or without power"
            return Verdict("silent", tuple(quiet), with_lines(text, quiet))
        return None

    def _echo(self, now: float) -> Verdict | None:
        watched = [seen for seen in self._seen.values() if seen.beat.state != "finished"]
        echoes = sorted((seen.failed, seen.beat.rank) for seen in watched if seen.failed is not None)
        # Later than `_dead` looks for silent ranks, and not while a death that it has found is settling.
        patience = FOLLOW_UP_SECONDS + BEAT_SECONDS
        if not echoes or now - echoes[0][0] < patience or any(seen.ended is not None for seen in watched):
            return None
        first = self._seen[echoes[0][1]].beat
        text = f"{first} failed in a collective {first.progress}, and no other rank is known to be the cause: {first.error}"
        return Verdict("failed", (first,), with_lines(text, [first]))

    def _hangs(self, now: float) -> Verdict | None:
        running = [seen for seen in self._seen.values() if seen.beat.state == "running" and seen.beat.pid]
        late = [seen for seen in running if self.watchdog and now - seen.moved > self._allowance(seen.beat)]
        if not late:
            return None
        silent = {seen.beat.rank for seen in running if now - seen.heard > QUIET_SECONDS}
        beats = [seen.beat for seen in running]
        culprits = [beat for beat in beats if beat.rank in silent] or hanging(beats)
        seconds = max(now - seen.moved for seen in late)
        text = f"no step done for {seconds:.0f} s, {max(late, key=lambda seen: now - seen.moved).beat.progress}: "
        if silent:
            text += f"nothing heard of {_names(culprits)} either, which cannot write its stacks"
        elif culprits:
            place = "; ".join(f"{beat} is at {beat.where}" for beat in culprits[:4])
            text += place + (" and the others wait for it" if len(culprits) < len(beats) else "")
        else:
            text += f"all ranks wait, none apart from the others; rank {beats[0].rank} is at {beats[0].where}"
        text += f"; stacks are in {self.stacks}"
        return Verdict("hangs", tuple(culprits), with_lines(text, culprits))

    def _allowance(self, beat: Beat) -> float:
        return self.watchdog * (UNUSUAL_FACTOR if beat.step is None or beat.phase else 1)


def hanging(beats: Sequence[Beat]) -> list[Beat]:
    """The ranks that the others wait for, as far as places tell: a hint, and empty where there is none.

    They are outside of torch and DeepSpeed while others are inside, or else a step behind, or else at a place where few are.
    """
    places = Counter(beat.where for beat in beats)
    last = max(beat.step or 0 for beat in beats)
    for apart in (
        [beat for beat in beats if not beat.waits],
        [beat for beat in beats if (beat.step or 0) < last],
        [beat for beat in beats if 2 * places[beat.where] < len(beats)],
    ):
        if 0 < len(apart) < len(beats):
            return apart
    return list(beats) if len(beats) == 1 else []


def speaker(host: str, verdict: Verdict) -> int:
    """The local rank that tells of the verdict on a host: the first one there that is well."""
    gone = {beat.local_rank for beat in verdict.culprits if beat.host == host}
    return next(number for number in range(len(gone) + 1) if number not in gone)


def with_lines(text: str, beats: Sequence[Beat]) -> str:
    """The text, and below it the last log lines of up to four ranks."""
    parts = [text]
    for beat in beats[:4]:
        if beat.lines:
            parts.append(f"last lines of rank {beat.rank}:")
            parts += [f"    {line}" for line in beat.lines]
    return "\n".join(parts)


def _names(beats: Sequence[Beat]) -> str:
    more = f" and {len(beats) - 4} more ranks" if len(beats) > 4 else ""
    return ", ".join(str(beat) for beat in beats[:4]) + more


def _patience(beat: Beat) -> float:
    if not beat.pid:
        return NEVER_HEARD_SECONDS
    return SILENT_AT_START_SECONDS if beat.step is None else SILENT_SECONDS
