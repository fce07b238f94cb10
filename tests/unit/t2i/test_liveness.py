import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.liveness import (
    BEAT_SECONDS,
    ECHO_SECONDS,
    EXIT_DEAD_RANK,
    EXIT_HANG,
    QUIET_SECONDS,
    SETTLE_SECONDS,
    SILENT_AT_START_SECONDS,
    SILENT_SECONDS,
    START_FACTOR,
    Beat,
    Judge,
    Verdict,
    behind,
)

WATCHDOG = 60.0
SLACK = 2 * BEAT_SECONDS
"""Between what comes to pass and the judge's next look."""


def beat(rank: int, **changes: object) -> Beat:
    """Of a rank in training, of two on each host."""
    values = {"host": f"host{rank // 2}", "pid": 100 + rank, "step": 7, "signs": 7, "waits": True, "where": "x.py:1"}
    return replace(Beat(rank), **(values | changes))  # type: ignore[arg-type]


class Story:
    """A judge, and ranks that beat every second unless told otherwise."""

    def __init__(self, ranks: int, watchdog: float = WATCHDOG, **changes: object) -> None:
        self.now = 0.0
        self.judge = Judge(range(ranks), watchdog, "logs/rank-*.stacks", self.now)
        self.beats = {rank: beat(rank, **changes) for rank in range(ranks)}
        self.silent: set[int] = set()

    def change(self, rank: int, **changes: object) -> None:
        self.beats[rank] = replace(self.beats[rank], **changes)  # type: ignore[arg-type]

    def until(self, end: float) -> Verdict | None:
        """The first verdict up to a time; `now` is when it came."""
        while self.now < end:
            self.now += BEAT_SECONDS
            for rank, one in self.beats.items():
                if rank not in self.silent:
                    self.beats[rank] = replace(one, count=one.count + 1)
                self.judge.hear(self.beats[rank], self.now)
            if verdict := self.judge.verdict(self.now):
                return verdict
        return None


texts = st.text(max_size=20)
beats = st.builds(
    Beat, st.integers(0, 999), texts, st.integers(0, 2**22), state=st.sampled_from(("running", "failed", "finished")),
    step=st.none() | st.integers(0), doing=texts, where=texts, waits=st.booleans(), error=texts, echo=st.booleans(),
    lines=st.lists(texts, max_size=5).map(tuple),
)  # fmt: skip


@given(
    st.builds(
        Verdict, st.sampled_from(("dead", "failed", "hangs")), texts, st.lists(beats, max_size=3).map(tuple),
        st.lists(st.integers(0, 9)).map(tuple),
    )
)  # fmt: skip
def test_what_is_sent_arrives_as_it_was(verdict: Verdict) -> None:
    assert Verdict.from_json(verdict.to_json()) == verdict
    for one in verdict.dead:
        assert Beat.from_json(one.to_json()) == one


def moments(draw: random.Random, end: float, longest: float) -> Iterator[float]:
    now = 0.0
    while now < end:
        now += draw.uniform(0.1, longest)
        yield now


@given(ranks=st.integers(1, 5), seed=st.integers())
def test_ranks_that_are_well_are_left_alone(ranks: int, seed: int) -> None:
    """Beats that come late, steps within the watchdog, saving, and an end in any order."""
    draw = random.Random(seed)
    judge = Judge(range(ranks), WATCHDOG, "", 0.0)
    states = [beat(rank, step=None) for rank in range(ranks)]
    due = [iter([*moments(draw, 150, SILENT_SECONDS - SLACK), 1e9]) for _ in states]
    next_beat = [next(one) for one in due]
    moved = [0.0] * ranks
    for tick in range(400):
        now = tick / 2
        for rank, state in enumerate(states):
            if now >= next_beat[rank] and state.state == "running":
                next_beat[rank] = next(one for one in due[rank] if one > now)
                state = replace(state, count=state.count + 1)
                if now - moved[rank] > WATCHDOG - 2 * SILENT_SECONDS:
                    state, moved[rank] = replace(state, signs=state.signs + 1, step=1), now
                if now > 130:
                    state = replace(state, state="finished")
                states[rank] = state
            judge.hear(states[rank], now)
        assert judge.verdict(now) is None
    assert judge.ended()


@pytest.mark.parametrize(
    ("changes", "patience"),
    [({}, SILENT_SECONDS), ({"step": None}, SILENT_AT_START_SECONDS), ({"step": None, "pid": 0}, SILENT_AT_START_SECONDS)],
    ids=["in training", "before the first step", "never heard"],
)  # fmt: skip
def test_a_silent_rank_is_dead_within_thirty_seconds(changes: dict[str, object], patience: float) -> None:
    story = Story(4, lines=("loss 3.2", "loss 3.1"))
    assert story.until(20) is None
    story.change(2, **changes)
    story.silent = {2}
    verdict = story.until(100)
    assert verdict is not None
    assert patience < story.now - 20 < patience + SLACK < 30
    assert (verdict.kind, verdict.exit_code) == ("dead", EXIT_DEAD_RANK)
    assert verdict.dead == (story.beats[2],)
    process = "" if "pid" in changes else ", pid 102"
    step = "before its first step" if "step" in changes else "after step 7"
    assert verdict.text.splitlines() == [
        f"rank 2 on host1{process} is dead or stopped: no sign of life for {patience + 1:.0f} s, {step}, last seen at "
        "x.py:1; it cannot write its stacks",
        "last lines of rank 2:",
        "    loss 3.2",
        "    loss 3.1",
    ]
    assert verdict.speakers == (0, 3)


@given(st.data())
def test_the_first_cause_is_named_and_not_its_echoes(data: st.DataObject) -> None:
    """A rank dies; the collectives of any of the others fail after that, at once or later, and soon it is named."""
    ranks = data.draw(st.integers(2, 8))
    dead = data.draw(st.integers(0, ranks - 1))
    others = [rank for rank in range(ranks) if rank != dead]
    echoes = data.draw(st.dictionaries(st.sampled_from(others), st.integers(1, 5), min_size=1))
    story = Story(ranks)
    assert story.until(5) is None
    story.silent = {dead}
    verdict = None
    while verdict is None:
        for rank, after in echoes.items():
            if story.now >= 5 + after:
                story.change(rank, state="failed", error="RuntimeError: Connection closed by peer", echo=True)
        verdict = story.until(story.now + BEAT_SECONDS)
    assert [one.rank for one in verdict.dead] == [dead]
    assert verdict.text.startswith(f"rank {dead} on host{dead // 2}, pid {100 + dead} is dead")
    assert "Connection closed" not in verdict.text
    assert story.now - 5 <= max(QUIET_SECONDS, min(echoes.values())) + SLACK
    assert all(rank in story.judge.listeners(verdict) for rank in others)


def test_a_launcher_that_ends_the_others_makes_silence_suspicious_and_alone_is_none() -> None:
    story = Story(3, step=None)
    story.until(5)
    story.change(0, state="leaving")
    assert story.until(60) is None
    story.silent = {1}
    verdict = story.until(100)
    assert verdict is not None
    assert story.now - 60 < QUIET_SECONDS + SLACK
    assert [one.rank for one in verdict.dead] == [1]
    assert story.judge.listeners(verdict) == [0, 2]


def test_ranks_of_a_dead_host_are_named_together() -> None:
    story = Story(6)
    story.until(5)
    story.silent = {3}
    story.until(6)
    story.silent = {2, 3}
    verdict = story.until(30)
    assert verdict is not None
    assert "rank 2 on host1, pid 102; rank 3 on host1, pid 103 is dead" in verdict.text
    assert verdict.speakers == (0, 4)


def test_an_error_of_its_own_comes_first_and_after_all_had_time_for_theirs() -> None:
    story = Story(3)
    story.until(5)
    story.change(2, state="failed", error="OSError: disk full")
    story.silent = {2}
    assert story.until(6) is None
    story.change(0, state="failed", error="RuntimeError: Connection closed by peer", echo=True)
    verdict = story.until(20)
    assert verdict is not None
    assert story.now <= 5 + SETTLE_SECONDS + SLACK
    assert (verdict.kind, verdict.dead, verdict.exit_code) == ("failed", (), EXIT_DEAD_RANK)
    assert verdict.text == "rank 2 on host1, pid 102 failed after step 7: OSError: disk full"
    assert story.judge.listeners(verdict) == [0, 1]


def test_an_error_that_all_make_needs_no_verdict() -> None:
    story = Story(3)
    story.change(0, state="failed", error="ValueError: global batch")
    assert story.until(1) is None
    assert not story.judge.ended()
    for rank in (1, 2):
        story.change(rank, state="failed", error="ValueError: global batch")
    assert story.until(2) is None
    assert story.judge.ended()


def test_a_collective_that_fails_among_the_living_names_who_is_behind() -> None:
    story = Story(3)
    story.until(5)
    story.change(0, state="failed", error="RuntimeError: Timed out waiting 600000ms", echo=True)
    story.change(1, waits=False, where="loader.py:1 (read)")
    verdict = story.until(60)
    assert verdict is not None
    assert ECHO_SECONDS <= story.now - 5 < ECHO_SECONDS + SLACK
    assert verdict.exit_code == EXIT_HANG
    assert verdict.text == (
        "a collective failed on rank 0 on host0, pid 100 after step 7 (RuntimeError: Timed out waiting 600000ms) and no rank "
        "is dead; rank 1 on host0, pid 101 is behind, after step 7, at loader.py:1 (read); stacks of all ranks are in "
        "logs/rank-*.stacks"
    )
    assert story.judge.listeners(verdict) == [0, 1, 2]


@pytest.mark.parametrize(("step", "allowance"), [(7, 1), (None, START_FACTOR)])
def test_the_watchdog_counts_from_the_last_sign(step: int | None, allowance: int) -> None:
    story = Story(2, step=step)
    story.until(10)
    story.change(0, signs=8, doing="saving")
    story.change(1, signs=8, waits=False, where="loader.py:1 (read)")
    verdict = story.until(1000)
    assert verdict is not None
    assert allowance * WATCHDOG < story.now - 10 < allowance * WATCHDOG + 2 * SLACK
    assert (verdict.kind, verdict.dead, verdict.exit_code) == ("hangs", (), EXIT_HANG)
    assert "rank 1 on host0, pid 101 is behind" in verdict.text
    assert "at loader.py:1 (read); stacks of all ranks are in logs/rank-*.stacks" in verdict.text


def test_no_watchdog_waits_for_ever() -> None:
    assert Story(2, watchdog=0).until(10_000) is None


def test_a_rank_that_is_stopped_is_dead_and_not_hanging() -> None:
    story = Story(2, watchdog=5)
    story.until(1)
    story.silent = {1}
    verdict = story.until(60)
    assert verdict is not None
    assert (verdict.kind, [one.rank for one in verdict.dead]) == ("dead", [1])


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ([{}, {"waits": False}, {}], [1]),
        ([{}, {"waits": False}, {"step": 6}], [2]),
        ([{"step": 0}, {"step": None}], [1]),
        ([{"where": "a"}, {"where": "a"}, {"where": "b"}], [2]),
        ([{"where": "a"}, {"where": "b"}], []),
        ([{"where": "a"}] * 3, []),
        ([{"where": "a"}], [0]),
    ],
)
def test_who_is_behind(running: list[dict[str, object]], expected: list[int]) -> None:
    found = behind([beat(rank, **changes) for rank, changes in enumerate(running)])
    assert [one.rank for one in found] == expected


def test_ranks_known_to_be_gone_are_told_with_their_own_error_where_they_had_one() -> None:
    judge = Judge([0, 1, 2], 0.0, "", 0.0)
    for rank in range(3):
        judge.hear(beat(rank, lines=("a", "b") if rank == 1 else ()), 1.0)
    verdict = judge.gone({1, 2}, "its process has ended")
    assert verdict is not None
    assert verdict.text == (
        "rank 1 on host0, pid 101; rank 2 on host1, pid 102 is dead (its process has ended), after step 7, last seen at "
        "x.py:1\nlast lines of rank 1:\n    a\n    b"
    )
    assert verdict.speakers == (0,)
    judge.hear(beat(1, state="failed", error="OSError: disk full"), 2.0)
    failed = judge.gone({1, 2}, "its process has ended")
    assert failed is not None
    assert (failed.kind, failed.text) == ("failed", "rank 1 on host0, pid 101 failed after step 7: OSError: disk full")
    judge.hear(beat(1, state="finished"), 2.0)
    assert judge.gone({1}, "its process has ended") is None
    assert judge.gone(set(), "") is None


def test_a_rank_that_a_signal_ended_is_told_so() -> None:
    judge = Judge([0], 0.0, "", 0.0)
    judge.hear(beat(0, state="leaving"), 1.0)
    verdict = judge.gone({0}, "no answer")
    assert verdict is not None
    assert verdict.text.startswith("rank 0 on host0, pid 100 was ended by a signal, after step 7")
