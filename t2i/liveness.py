"""Who of the ranks is dead or hangs, and what to say of it: functions of what ranks have said and when.

No sockets and no clock of its own in here: `t2i.monitor` brings both, so that every rule can be tested by itself. Times
are seconds of one clock, that of the process which judges, since the clocks of hosts differ.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from t2i.beats import Beat, Verdict

BEAT_SECONDS = 2.0
"""Between two signs of life of a rank."""
SILENT_SECONDS = 20.0
"""Silence after which a rank in training is taken for dead. A host without power is noticed by nothing else."""
SILENT_AT_START_SECONDS = 60.0
"""The same before the first step, when libraries that are loaded and keep Python's lock can hold up the beats."""
QUIET_SECONDS = 2.5 * BEAT_SECONDS
"""Silence that means something where there is other evidence."""
NEVER_HEARD_SECONDS = 30.0
"""How long a rank may take for its first beat."""
SETTLE_SECONDS = 1.0
"""Between the first death or failure and the verdict: a host takes several ranks with it, and a mistake that every rank is
about to make is told by each in its own way."""
FOLLOW_UP_SECONDS = 5.0
"""How long an error inside a collective waits for the rank that caused it to be found."""
UNUSUAL_FACTOR = 4
"""Before the first step, and while saving, validating and sampling, a step may take this many times `watchdog`."""


@dataclass
class _Seen:
    beat: Beat
    heard: float
    moved: float
    ended: float = math.inf
    failed: float = math.inf


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
    _settle: float = field(init=False)

    def __post_init__(self) -> None:
        self._seen = {rank: _Seen(Beat(rank), self.now, self.now) for rank in self.ranks}
        self._looked = self.now
        self._settle = SETTLE_SECONDS if len(self._seen) > 1 else 0.0

    def hear(self, beat: Beat, now: float) -> None:
        """A beat has come."""
        seen = self._seen[beat.rank]
        if beat.ticks != seen.beat.ticks or beat.state != seen.beat.state or not seen.beat.pid:
            seen.moved = now
        if beat.state == "failed":
            seen.failed = min(seen.failed, now)
        seen.beat, seen.heard = beat, now

    def end(self, rank: int, now: float) -> None:
        """The connection to a rank has ended."""
        self._seen[rank].ended = now

    def has_ended(self, rank: int) -> bool:
        return self._seen[rank].ended < math.inf

    def all_finished(self) -> bool:
        return all(seen.beat.state == "finished" for seen in self._seen.values())

    def verdict(self, now: float) -> Verdict | None:
        """Why the job has to end, or None. Call it often: a long gap between two calls is not held against the ranks."""
        gap, self._looked = now - self._looked, now
        if gap > BEAT_SECONDS + 1:
            # This process was stopped itself, or something kept Python's lock: beats have come and were not read.
            for seen in self._seen.values():
                seen.heard, seen.moved = seen.heard + gap, seen.moved + gap
        return self._failed(now) or self._dead(now) or self._echo(now) or self._hangs(now)

    def _failed(self, now: float) -> Verdict | None:
        failures = [seen for seen in self._seen.values() if seen.failed < math.inf and not seen.beat.follow_up]
        if not failures:
            return None
        if now - min(seen.failed for seen in failures) < self._settle:
            return None
        first = min(failures, key=lambda seen: seen.failed).beat
        return Verdict("failed", (first,), with_lines(f"{first} failed {first.progress}: {first.error}", [first]))

    def _dead(self, now: float) -> Verdict | None:
        watched = [seen for seen in self._seen.values() if seen.beat.state != "finished"]
        ended = sorted((seen.ended, seen.beat.rank) for seen in watched if seen.ended < math.inf)
        troubled = any(now - seen.failed > FOLLOW_UP_SECONDS for seen in watched)
        silent = [
            seen for seen in watched
            if seen.ended == math.inf and now - seen.heard > (QUIET_SECONDS if ended or troubled else _patience(seen.beat))
        ]  # fmt: skip
        quiet = [seen.beat for seen in silent]
        silence = f"nothing heard of {_names(quiet)} for {min((now - seen.heard for seen in silent), default=0):.0f} s"
        if ended:
            if now - ended[0][0] < self._settle:
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
        echoes = sorted((seen.failed, seen.beat.rank) for seen in watched if seen.failed < math.inf)
        # Later than `_dead` looks for silent ranks, and not while a death that it has found is settling.
        patience = FOLLOW_UP_SECONDS + BEAT_SECONDS
        if not echoes or now - echoes[0][0] < patience or any(seen.ended < math.inf for seen in watched):
            return None
        first = self._seen[echoes[0][1]].beat
        text = f"{first} failed in a collective {first.progress}, and no other rank is known to be the cause: {first.error}"
        return Verdict("failed", (first,), with_lines(text, [first]))

    def _hangs(self, now: float) -> Verdict | None:
        running = [seen for seen in self._seen.values() if seen.beat.state == "running" and seen.beat.pid]
        # Ranks tell of their steps a beat late.
        late = [s for s in running if self.watchdog and now - s.moved > self._allowance(s.beat) + BEAT_SECONDS]
        unclear = any(1.5 * BEAT_SECONDS < now - seen.heard <= QUIET_SECONDS for seen in running)
        if not late or unclear:
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
        return Verdict("hangs", tuple(beat for beat in beats if beat.rank in silent), with_lines(text, culprits))

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
