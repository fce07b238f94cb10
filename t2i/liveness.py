"""Which rank is dead or hangs, and what to say of it: functions of what ranks have said of themselves and when.

No store and no clock in here: `t2i.monitor` brings both. Times are seconds on the clock of the process that judges, since
the clocks of hosts differ; a rank lives while its beats change.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

EXIT_DEAD_RANK = 86
"""Exit code of a rank that is well, after another one has died, fallen silent or failed."""
EXIT_HANG = 87
"""Exit code of all ranks after no step was done in time, or after a collective failed and no rank was found dead."""

BEAT_SECONDS = 1.0
"""Between two beats of a rank."""
SILENT_SECONDS = 10.0
"""Without a beat for so long, a rank in training is dead."""
SILENT_AT_START_SECONDS = 25.0
"""The same before its first step, when libraries that are loaded or compiled may hold Python's lock."""
QUIET_SECONDS = 3.0
"""The same where a collective has failed on another rank, or a launcher ends the job, or another rank is dead."""
SETTLE_SECONDS = 2.0
"""From the first error to the verdict: a mistake that all ranks make is told by each of them, not by a verdict."""
ECHO_SECONDS = 8.0
"""From an error in a collective to the verdict that nobody has died and somebody must hang."""
START_FACTOR = 4
"""Before its first step a rank may take so many times as long as the watchdog allows afterwards."""


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself. `pid` 0 stands for a rank that has said nothing yet."""

    rank: int
    host: str = "unknown host"
    pid: int = 0
    parent: int = 0
    state: Literal["running", "leaving", "failed", "finished"] = "running"
    """"leaving": a signal has ended it before its first step, perhaps since another rank is dead."""
    count: int = 0
    """Grows with every beat."""
    signs: int = 0
    """Grows with every sign of progress."""
    step: int | None = None
    """The last one done by this process."""
    doing: str = ""
    """What takes longer than a step, if anything: "saving", for example."""
    where: str = ""
    """Where the main thread is."""
    waits: bool = False
    """Whether that is inside torch or DeepSpeed, as of a rank that waits for others."""
    error: str = ""
    echo: bool = False
    """Whether the error came out of a collective, and so may be the fault of another rank."""
    lines: tuple[str, ...] = ()
    """The last ones of its log."""

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}" + (f", pid {self.pid}" if self.pid else "")

    @property
    def progress(self) -> str:
        """ "after step 7", in words."""
        step = "before its first step" if self.step is None else f"after step {self.step}"
        return f"{step}, {self.doing}" if self.doing else step

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Beat":
        values = json.loads(text)
        return cls(**{**values, "lines": tuple(values["lines"])})


@dataclass(frozen=True)
class Verdict:
    """Why the job ends: a line, and below it the last log lines of the ranks that are named."""

    kind: Literal["dead", "failed", "hangs"]
    text: str
    dead: tuple[Beat, ...] = ()
    """Ranks that may be unable to end by themselves."""
    speakers: tuple[int, ...] = ()
    """The ranks that print the text: on each host the first that is well."""

    @property
    def exit_code(self) -> int:
        return EXIT_HANG if self.kind == "hangs" else EXIT_DEAD_RANK

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Verdict":
        values = json.loads(text)
        dead = tuple(Beat.from_json(json.dumps(one)) for one in values["dead"])
        return cls(values["kind"], values["text"], dead, tuple(values["speakers"]))


@dataclass
class _Seen:
    beat: Beat
    heard: float
    moved: float
    failed: float = math.inf


@dataclass
class Judge:
    """Hears the beats of some ranks, and says at any time whether the job has to end and why.

    The verdict is about the first cause: an error out of a collective is most often the echo of another rank's death, so
    it only makes silence suspicious earlier, and counts by itself when nobody is found dead.
    """

    ranks: Sequence[int]
    watchdog: float
    """Seconds without a sign of progress that are too many; 0 for no such limit."""
    stacks: str
    """Where stacks are written to, for the text."""
    begun: float
    _seen: dict[int, _Seen] = field(init=False)

    def __post_init__(self) -> None:
        self._seen = {rank: _Seen(Beat(rank), self.begun, self.begun) for rank in self.ranks}

    def hear(self, beat: Beat, now: float) -> None:
        """Take in what a rank says at this time, be it news or not."""
        seen = self._seen[beat.rank]
        if beat.count != seen.beat.count:
            seen.heard = now
        if beat.signs != seen.beat.signs or not seen.beat.pid:
            seen.moved = now
        if beat.state == "failed":
            seen.failed = min(seen.failed, now)
        seen.beat = beat

    def ended(self) -> bool:
        """Whether all ranks are done, in one way or the other."""
        beats = [seen.beat for seen in self._seen.values()]
        return all(one.state in ("finished", "leaving") or _at_fault(one) for one in beats)

    def listeners(self, verdict: Verdict) -> list[int]:
        """The ranks that still wait for a verdict, and can take this one."""
        beats = [seen.beat for _, seen in sorted(self._seen.items())]
        return [one.rank for one in beats if (_lives(one) or one.echo) and one.pid and one not in verdict.dead]

    def verdict(self, now: float) -> Verdict | None:
        """Why the job has to end, or None."""
        return self._failed(now) or self.dead(now) or self._echo(now) or self._hangs(now)

    def dead(self, now: float) -> Verdict | None:
        """The verdict on ranks that have fallen silent, if any."""
        troubled = any(seen.beat.echo or seen.beat.state == "leaving" for seen in self._seen.values())
        silent = {seen.beat.rank: now - seen.heard for seen in self._running() if now - seen.heard > QUIET_SECONDS}
        if not any(troubled or seconds > _patience(self._seen[rank].beat) for rank, seconds in silent.items()):
            return None
        beats = [self._seen[rank].beat for rank in silent]
        text = (
            f"{_names(beats)} is dead or stopped: no sign of life for {max(silent.values()):.0f} s, {beats[0].progress}"
        )
        if beats[0].where:
            text += f", last seen at {beats[0].where}"
        return self._verdict("dead", f"{text}; it cannot write its stacks", beats, dead=beats)

    def gone(self, ranks: Collection[int], why: str) -> Verdict | None:
        """The verdict on ranks whose processes are known to be gone; None where they had been done."""
        beats = [self._seen[rank].beat for rank in sorted(ranks)]
        if failed := [beat for beat in beats if _at_fault(beat)]:
            return self._verdict("failed", f"{failed[0]} failed {failed[0].progress}: {failed[0].error}", failed[:1])
        dead = [beat for beat in beats if beat.state != "finished"]
        if not dead:
            return None
        how = "was ended by a signal" if dead[0].state == "leaving" else f"is dead ({why})"
        text = f"{_names(dead)} {how}, {dead[0].progress}" + (
            f", last seen at {dead[0].where}" if dead[0].where else ""
        )
        return self._verdict("dead", text, dead, dead=dead)

    def _running(self) -> list[_Seen]:
        return [seen for seen in self._seen.values() if _lives(seen.beat)]

    def _failed(self, now: float) -> Verdict | None:
        failures = [seen for seen in self._seen.values() if _at_fault(seen.beat)]
        first = min(failures, key=lambda seen: seen.failed, default=None)
        if first is None or now - first.failed < SETTLE_SECONDS:
            return None
        return self.gone([first.beat.rank], "")

    def _echo(self, now: float) -> Verdict | None:
        echoes = [seen for seen in self._seen.values() if seen.beat.echo]
        first = min(echoes, key=lambda seen: seen.failed, default=None)
        if first is None or now - first.failed < ECHO_SECONDS:
            return None
        text = f"a collective failed on {first.beat} {first.beat.progress} ({first.beat.error}) and no rank is dead"
        return self._hang_verdict(text, [seen.beat for seen in self._running()] or [seen.beat for seen in echoes])

    def _hangs(self, now: float) -> Verdict | None:
        late = [seen for seen in self._running() if self.watchdog and now - seen.moved > self._allowance(seen.beat)]
        # Of a rank that is about to be found dead nobody should say that it hangs.
        if not late or any(now - seen.heard > 2 * BEAT_SECONDS for seen in self._running()):
            return None
        longest = max(late, key=lambda seen: now - seen.moved)
        text = f"no step done for {now - longest.moved:.0f} s, {longest.beat.progress}"
        return self._hang_verdict(text, [seen.beat for seen in self._running()])

    def _allowance(self, beat: Beat) -> float:
        return self.watchdog * (START_FACTOR if beat.step is None else 1)

    def _hang_verdict(self, text: str, beats: Sequence[Beat]) -> Verdict:
        culprits = behind(beats)
        if culprits:
            text += "".join(f"; {beat} is behind, {beat.progress}, at {beat.where}" for beat in culprits[:4])
        else:
            text += f"; none of {len(beats)} ranks is behind the others; rank {beats[0].rank} is at {beats[0].where}"
        return self._verdict("hangs", f"{text}; stacks of all ranks are in {self.stacks}", culprits)

    def _verdict(
        self, kind: Literal["dead", "failed", "hangs"], text: str, beats: Sequence[Beat], dead: Sequence[Beat] = ()
    ) -> Verdict:
        verdict = Verdict(kind, _with_lines(text, beats), tuple(dead))
        speakers: dict[str, int] = {}
        for rank in self.listeners(verdict):
            speakers.setdefault(self._seen[rank].beat.host, rank)
        return replace(verdict, speakers=tuple(speakers.values()))


def behind(beats: Sequence[Beat]) -> list[Beat]:
    """The ranks that the others wait for, as far as steps and places tell: a hint, and empty where there is none.

    They have done fewer steps; or are outside of torch and DeepSpeed while others are inside; or at a place where few are.
    """
    steps = [-1 if beat.step is None else beat.step for beat in beats]
    places = Counter(beat.where for beat in beats)
    for apart in (
        [beat for beat, step in zip(beats, steps, strict=True) if step < max(steps)],
        [beat for beat in beats if not beat.waits],
        [beat for beat in beats if 2 * places[beat.where] < len(beats)],
    ):
        if 0 < len(apart) < len(beats):
            return apart
    return list(beats) if len(beats) == 1 else []


def _lives(beat: Beat) -> bool:
    return beat.state in ("running", "leaving")


def _at_fault(beat: Beat) -> bool:
    return beat.state == "failed" and not beat.echo


def _patience(beat: Beat) -> float:
    return SILENT_AT_START_SECONDS if beat.step is None else SILENT_SECONDS


def _names(beats: Sequence[Beat]) -> str:
    more = f" and {len(beats) - 4} more ranks" if len(beats) > 4 else ""
    return "; ".join(str(beat) for beat in beats[:4]) + more


def _with_lines(text: str, beats: Iterable[Beat]) -> str:
    parts = [text]
    for beat in list(beats)[:4]:
        if beat.lines:
            parts += [f"last lines of rank {beat.rank}:", *(f"    {line}" for line in beat.lines)]
    return "\n".join(parts)
