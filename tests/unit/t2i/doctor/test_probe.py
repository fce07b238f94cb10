import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t2i.doctor import probe
from t2i.engine import Runtime

CPU = torch.device("cpu")


@given(ranks=st.integers(1, 100), size=st.integers(1, 20))
def test_expected_sums(ranks: int, size: int) -> None:
    total = sum((probe.pattern(rank, size) for rank in range(ranks)), torch.zeros(size, dtype=torch.int64))
    assert torch.equal(probe.expected_sum(ranks, size), total)


def reduce_over(monkeypatch: pytest.MonkeyPatch, ranks: list[int]) -> None:
    """An all-reduce that adds up what these ranks have."""

    def all_reduce(values: torch.Tensor) -> None:
        values.copy_(
            sum((probe.pattern(rank, len(values)).to(values.dtype) for rank in ranks), torch.zeros_like(values))
        )

    monkeypatch.setattr(probe.dist, "all_reduce", all_reduce)
    monkeypatch.setattr(probe, "SIZES", (1, 7, 100))


def test_right_sums_of_hundreds_of_ranks_are_exact_in_16_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    reduce_over(monkeypatch, list(range(500)))
    assert probe.wrong_sums(Runtime(3, 500, CPU)) == {}


@pytest.mark.parametrize("ranks", [[0, 1, 2], [0, 1, 2, 2], [0, 1, 3], [1, 2, 3], []])
def test_a_rank_left_out_or_taken_twice_is_noticed(monkeypatch: pytest.MonkeyPatch, ranks: list[int]) -> None:
    reduce_over(monkeypatch, ranks)
    wrong = probe.wrong_sums(Runtime(0, 4, CPU))
    assert {"100 numbers of float32", "100 numbers of bfloat16", "100 numbers of int64"} <= wrong.keys()


@pytest.mark.parametrize("offset", [0.0, 100.0, -5000.0])
def test_a_clock_is_known_to_within_half_the_fastest_answer(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    now = [1e9]
    delays = itertools.cycle([(0.9, 0.1), (0.02, 0.08), (0.5, 0.5)])
    state: dict[str, Any] = {}

    def send(values: torch.Tensor, peer: int) -> None:
        there, state["back"] = next(delays)
        now[0] += there
        state["told"] = now[0] + offset

    def recv(values: torch.Tensor, peer: int) -> None:
        values.fill_(state["told"])
        now[0] += state["back"]

    monkeypatch.setattr(probe.dist, "send", send)
    monkeypatch.setattr(probe.dist, "recv", recv)
    monkeypatch.setattr(probe.time, "time", lambda: now[0])
    clock = probe.ask_the_time(Runtime(0, 4, CPU), peer=2, node=1)
    assert clock.round_trip == pytest.approx(0.1)
    assert clock.uncertainty == pytest.approx(0.05)
    assert abs(clock.offset - offset) <= clock.uncertainty
    assert clock.offset != pytest.approx(offset)  # ways there and back differ, which is what the uncertainty is for
