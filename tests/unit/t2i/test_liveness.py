import json
import random
from collections.abc import Iterator
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2i.beats import EXIT_DEAD_RANK, EXIT_HANG, Beat, Verdict, beat_from, speaker, verdict_from, verdict_to_json
from t2i.liveness import (
    BEAT_SECONDS,
    FOLLOW_UP_SECONDS,
    NEVER_HEARD_SECONDS,
    SILENT_AT_START_SECONDS,
    SILENT_SECONDS,
    UNUSUAL_FACTOR,
    Judge,
    hanging,
)

TICK = 0.5
WATCHDOG = 60.0


def beat(rank: int, **changes: object) -> Beat:
    """Of a rank in training, of two on each host."""
    values = {"local_rank": rank % 2, "host": f"host{rank // 2}", "pid": 100 + rank, "step": 7, "ticks": 7}
    return replace(Beat(rank), **(values | changes))  # type: ignore[arg-type]


def judge(ranks: int, watchdog: float = WATCHDOG) -> Judge:
    found = Judge(range(ranks), watchdog, "logs/rank-*.stacks", now=0.0)
    for rank in range(ranks):
        found.hear(beat(rank), 0.0)
    return found


def ticks(begin: float, end: float) -> Iterator[float]:
    for number in range(round((end - begin) / TICK) + 1):
        yield begin + number * TICK


def first_verdict(of: Judge, beats: list[Beat], begin: float, end: float) -> tuple[float, Verdict | None]:
    """The first verdict while `beats` go on as they are, and when it comes."""
    for now in ticks(begin, end):
        if now % BEAT_SECONDS == 0:
            for one in beats:
                of.hear(one, now)
        if (verdict := of.verdict(now)) is not None:
            return now, verdict
    return end, None


texts = st.text(max_size=20)
beats = st.builds(
    Beat, st.integers(0, 999), st.integers(0, 7), texts, st.integers(0, 2**22), texts,
    state=st.sampled_from(("running", "failed", "finished")), step=st.none() | st.integers(0), ticks=st.integers(0),
    phase=texts, where=texts, waits=st.booleans(), error=texts, follow_up=st.booleans(),
    lines=st.lists(texts, max_size=5).map(tuple),
)  # fmt: skip


@given(
    gone=st.lists(beats, max_size=3).map(tuple), kind=st.sampled_from(("died", "silent", "failed", "hangs")), text=texts
)
def test_what_is_sent_is_a_line_and_arrives_as_it_was(gone: tuple[Beat, ...], kind: str, text: str) -> None:
    verdict = Verdict(kind, gone, text)  # type: ignore[arg-type]
    line = verdict_to_json(verdict)
    assert "\n" not in line
    assert verdict_from(json.loads(line)) == verdict
    for one in gone:
        assert beat_from(json.loads(json.dumps(asdict(one)))) == one


@given(ranks=st.integers(1, 5), seed=st.integers())
def test_ranks_that_are_well_are_left_alone(ranks: int, seed: int) -> None:
    """Beats at the times at which they may come, steps within the watchdog, and an end in any order."""
    draw = random.Random(seed)
    found = judge(ranks)
    states = [beat(rank) for rank in range(ranks)]
    heard = [0.0] * ranks
    ends = [draw.uniform(0, 120) for _ in range(ranks)]
    moved = [0.0] * ranks
    for now in ticks(TICK, 200):
        for rank, state in enumerate(states):
            if state.state == "finished" or now - heard[rank] < draw.uniform(BEAT_SECONDS, 2 * BEAT_SECONDS):
                continue
            if now > ends[rank]:
                states[rank] = replace(state, state="finished")
            elif now - moved[rank] > draw.uniform(0, WATCHDOG - 3 * BEAT_SECONDS):
                states[rank], moved[rank] = replace(state, step=(state.step or 0) + 1, ticks=state.ticks + 1), now
            found.hear(states[rank], now)
            heard[rank] = now
            if states[rank].state == "finished":
                found.end(rank, now)
        assert found.verdict(now) is None
    assert found.all_finished()


@given(st.data())
def test_the_first_cause_is_named_and_not_its_echoes(data: st.DataObject) -> None:
    """A rank dies; the calls of any of the others break shortly before or after that is noticed."""
    ranks = data.draw(st.integers(2, 8))
    dead = data.draw(st.integers(0, ranks - 1))
    noticed = data.draw(st.floats(0, 4))
    echoes = {rank: data.draw(st.none() | st.floats(0, 4)) for rank in range(ranks) if rank != dead}
    found = judge(ranks)
    ended = False
    for now in ticks(TICK, 10):
        if now >= noticed and not ended:
            found.end(dead, now)
            ended = True
        for rank, at in echoes.items():
            broken = at is not None and now >= at
            error = {"state": "failed", "error": "Connection closed by peer", "follow_up": True} if broken else {}
            found.hear(beat(rank, **error), now)
        if (verdict := found.verdict(now)) is not None:
            break
    assert verdict is not None
    assert (verdict.kind, verdict.gone) == ("died", (beat(dead),))
    assert verdict.text == f"rank {dead} on host{dead // 2}, pid {100 + dead} died after step 7 without a word"
    assert verdict.exit_code == EXIT_DEAD_RANK


def test_a_dead_host_is_one_verdict_with_the_last_lines_of_its_ranks() -> None:
    found = judge(6)
    found.hear(beat(2, lines=("loss 3.2", "loss 3.1")), 0.5)
    found.end(2, 1.0)
    assert found.verdict(1.5) is None
    found.end(3, 1.5)
    verdict = found.verdict(2.0)
    assert verdict is not None
    assert [one.rank for one in verdict.gone] == [2, 3]
    assert verdict.text.splitlines() == [
        "rank 2 on host1, pid 102, rank 3 on host1, pid 103 died after step 7 without a word",
        "last lines of rank 2:",
        "    loss 3.2",
        "    loss 3.1",
    ]


@pytest.mark.parametrize(
    ("of", "patience"),
    [
        (beat(1), SILENT_SECONDS),
        (beat(1, step=None, ticks=0), SILENT_AT_START_SECONDS),
        (Beat(1), NEVER_HEARD_SECONDS),
    ],
    ids=["in training", "before the first step", "never heard"],
)
def test_a_silent_rank_is_dead_when_its_time_is_over(of: Beat, patience: float) -> None:
    found = Judge(range(3), 0.0, "", now=0.0)
    if of.pid:
        found.hear(of, 0.0)
    at, verdict = first_verdict(found, [beat(0), beat(2)], TICK, 200)
    assert at == patience + TICK
    assert verdict is not None
    assert (verdict.kind, [one.rank for one in verdict.gone]) == ("silent", [1])
    assert verdict.text.startswith(f"nothing heard of {of} for ")


def test_a_job_ends_within_thirty_seconds_of_a_silence_in_training() -> None:
    assert SILENT_SECONDS + BEAT_SECONDS + TICK < 30


def test_a_rank_is_not_held_to_blame_for_a_judge_that_slept() -> None:
    """All of a job is stopped for an hour and goes on, as schedulers do it."""
    found = judge(2)
    assert found.verdict(1.0) is None
    assert found.verdict(3600.0) is None
    at, verdict = first_verdict(found, [beat(0), beat(1, ticks=8)], 3600.5, 3660)
    assert verdict is None
    # And what happens afterwards is noticed as ever.
    found.end(1, at)
    assert first_verdict(found, [beat(0)], at + TICK, at + 10)[1] is not None


def test_an_error_of_ones_own_comes_first_and_after_all_had_time_for_theirs() -> None:
    found = judge(3)
    found.hear(beat(2, state="failed", error="OSError: disk full"), 1.0)
    assert found.verdict(1.5) is None
    found.hear(beat(0, state="failed", error="RuntimeError: Connection closed by peer", follow_up=True), 1.5)
    found.hear(beat(1, state="failed", error="OSError: disk full"), 1.6)
    verdict = found.verdict(2.0)
    assert verdict is not None
    assert (verdict.kind, [one.rank for one in verdict.gone]) == ("failed", [2])
    assert verdict.text == "rank 2 on host1, pid 102 failed after step 7: OSError: disk full"


def test_one_process_need_not_wait_for_others() -> None:
    found = judge(1)
    found.hear(beat(0, state="failed", error="OSError: disk full"), 1.0)
    assert found.verdict(1.0) is not None


def test_a_broken_collective_waits_for_its_cause_and_is_named_where_there_is_none() -> None:
    echo = beat(0, state="failed", error="RuntimeError: NCCL error", follow_up=True)
    found = judge(2)
    at, verdict = first_verdict(found, [echo, beat(1)], 0.0, 30)
    assert FOLLOW_UP_SECONDS < at < 2 * FOLLOW_UP_SECONDS
    assert verdict is not None
    assert verdict.text.startswith("rank 0 on host0, pid 100 failed in a collective after step 7, and no other rank")
    # Where another rank has fallen silent at the same time, that is the cause.
    found = judge(2)
    at, verdict = first_verdict(found, [echo], 0.0, 30)
    assert at < 2 * FOLLOW_UP_SECONDS
    assert verdict is not None
    assert (verdict.kind, [one.rank for one in verdict.gone]) == ("silent", [1])


def test_a_host_that_fell_silent_is_named_beside_a_rank_that_broke_on_it() -> None:
    """Without power nothing ends a connection, and some libraries end the process that waits for the other."""
    found = judge(3)
    for now in ticks(TICK, 12):
        found.hear(beat(0), now)
        found.hear(beat(1), now)
        assert found.verdict(now) is None
    found.end(1, 12.0)
    assert found.verdict(12.5) is None
    verdict = found.verdict(13.0)
    assert verdict is not None
    assert [one.rank for one in verdict.gone] == [1, 2]
    assert "rank 1 on host0, pid 101 died" in verdict.text
    assert "nothing heard of rank 2 on host1, pid 102" in verdict.text


@pytest.mark.parametrize(
    ("changes", "allowance"),
    [({}, 1), ({"phase": "saving"}, UNUSUAL_FACTOR), ({"step": None, "ticks": 0}, UNUSUAL_FACTOR)],
    ids=["a step", "saving", "before the first step"],
)
def test_the_watchdog_counts_from_the_last_progress(changes: dict[str, object], allowance: int) -> None:
    found = judge(2)
    begin = 2.0
    running = [beat(0, waits=True, where="all_reduce", **changes), beat(1, where="loader.py:1 (read)", **changes)]
    running = [replace(one, ticks=one.ticks + 1) for one in running]
    at, verdict = first_verdict(found, running, begin, 1000)
    assert begin + allowance * WATCHDOG < at < begin + allowance * WATCHDOG + 3 * BEAT_SECONDS
    assert verdict is not None
    assert (verdict.kind, verdict.gone, verdict.exit_code) == ("hangs", (), EXIT_HANG)
    assert "rank 1 on host0, pid 101 is at loader.py:1 (read) and the others wait for it" in verdict.text
    assert "stacks are in logs/rank-*.stacks" in verdict.text


def test_no_watchdog_waits_for_ever() -> None:
    assert first_verdict(judge(2, watchdog=0), [beat(0), beat(1)], TICK, 10_000)[1] is None


def test_a_rank_that_is_stopped_is_told_from_one_that_hangs() -> None:
    found = judge(2, watchdog=5)
    _, verdict = first_verdict(found, [beat(0)], TICK, 60)
    assert verdict is not None
    assert (verdict.kind, [one.rank for one in verdict.gone]) == ("hangs", [1])
    assert "nothing heard of rank 1 on host0, pid 101 either, which cannot write its stacks" in verdict.text


@pytest.mark.parametrize(
    ("running", "expected"),
    [
        ([{"waits": True}, {"waits": False}, {"waits": True}], [1]),
        ([{"waits": True}, {"waits": True}, {"waits": True, "step": 6}], [2]),
        ([{"where": "a"}, {"where": "a"}, {"where": "b"}], [2]),
        ([{"where": "a"}, {"where": "b"}], []),
        ([{"where": "a"}] * 3, []),
        ([{"where": "a"}], [0]),
    ],
)
def test_who_is_waited_for(running: list[dict[str, object]], expected: list[int]) -> None:
    found = hanging([beat(rank, **changes) for rank, changes in enumerate(running)])
    assert [one.rank for one in found] == expected


@given(gone=st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 7)), unique=True))
def test_on_each_host_the_first_rank_that_is_well_speaks(gone: list[tuple[str, int]]) -> None:
    verdict = Verdict("died", tuple(Beat(0, local_rank, host) for host, local_rank in gone), "")
    for host in "ab":
        well = [number for number in range(9) if (host, number) not in gone]
        assert speaker(host, verdict) == well[0]
