import itertools
import threading
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.index import EncodedSample, RawSample, ShardSet, build_index
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes, permute

RawSet = Callable[..., Path]


@st.composite
def orders(draw: st.DrawFn) -> LaneOrder:
    lanes = draw(st.integers(1, 12))
    first = draw(st.integers(0, 1000))
    return LaneOrder(
        first,
        first + lanes * draw(st.integers(1, 40)) + draw(st.integers(0, lanes - 1)),
        lanes,
        draw(st.integers(-(2**70), 2**70)),
    )


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1), st.integers(0, 3000))
def test_permute_is_a_bijection_of_any_size(size: int, key: int, slack: int) -> None:
    places = np.arange(size)
    keys = np.full(size, key, np.uint64)
    result = permute(places, np.full(size, size), keys, size + min(slack, size))
    assert np.array_equal(np.sort(result), places)
    assert result.dtype == np.int64


def test_permute_reaches_far_beyond_what_could_be_stored() -> None:
    size = 2**40 + 12345
    places = np.arange(0, size, size // 1000)
    result = permute(places, np.full(len(places), size), np.full(len(places), 7, np.uint64), size)
    assert len(set(result.tolist())) == len(places)
    assert 0 <= result.min() <= result.max() < size
    assert abs(result.mean() / size - 0.5) < 0.05


@pytest.mark.parametrize("size", [2, 3, 5, 8, 17, 33])
def test_every_sample_comes_first_equally_often(size: int) -> None:
    epochs = 20_000
    places, numbers = np.tile(np.arange(size), epochs), np.repeat(np.arange(epochs), size)
    keys = numbers.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(0xABCDEF)
    counts = np.zeros((size, size))
    np.add.at(counts, (places, permute(places, np.full(len(places), size), keys, size)), 1)
    expected = epochs / size
    # Chi-square over the table of a permutation's places has (size - 1)^2 degrees of freedom.
    freedom = (size - 1) ** 2
    chi_square = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom) + 10


@settings(max_examples=50)
@given(orders(), st.integers(0, 4))
def test_each_sample_comes_exactly_once_in_every_lane_epoch(order: LaneOrder, skipped_epochs: int) -> None:
    size = len(order) // order.lanes + (len(order) % order.lanes > 0)
    steps = (skipped_epochs + 3) * size
    served = np.stack([order.indices(step, order.lanes) for step in range(steps)])
    seen: list[int] = []
    for lane in range(order.lanes):
        own = served[:, lane]
        length = len(set(own.tolist()))
        assert length in (size, size - 1)
        for epoch in range(steps // length):
            walked = np.sort(own[epoch * length : (epoch + 1) * length])
            assert np.array_equal(walked, np.arange(walked[0], walked[0] + length)), "not its contiguous range"
        seen += np.unique(own).tolist()
    assert sorted(seen) == list(range(order.first, order.last))


@given(orders(), st.integers(0, 10**9), st.integers(1, 4))
def test_the_batches_of_any_number_of_ranks_are_the_same(order: LaneOrder, step: int, each: int) -> None:
    batch = order.lanes * each
    whole = order.indices(step, batch)
    assert whole.dtype == np.int64
    for ranks in (n for n in range(1, order.lanes + 1) if order.lanes % n == 0):
        parts = [order.indices(step, batch, rank, ranks) for rank in range(ranks)]
        assert {len(part) for part in parts} == {batch // ranks}
        assert np.array_equal(np.concatenate(parts), whole)


@given(orders(), st.integers(0, 1000), st.integers(1, 3))
def test_the_walk_does_not_depend_on_the_batch_size(order: LaneOrder, step: int, each: int) -> None:
    large = order.indices(step, order.lanes * each).reshape(order.lanes, each)
    small = [order.indices(step * each + n, order.lanes) for n in range(each)]
    assert np.array_equal(large, np.stack(small, axis=1))


def test_epochs_lanes_and_seeds_are_shuffled_differently() -> None:
    order = LaneOrder(0, 4000, 2, seed=1)
    walk = np.concatenate([order.indices(step, 500) for step in range(16)]).reshape(16, 2, 250).swapaxes(0, 1)
    epochs = {(lane, epoch): walk[lane].reshape(2, 2000)[epoch] - 2000 * lane for lane in (0, 1) for epoch in (0, 1)}
    other_seed = np.concatenate([LaneOrder(0, 4000, 2, seed=2).indices(s, 500)[:250] for s in range(8)])
    every = [np.arange(2000), *epochs.values(), other_seed]
    for i, one in enumerate(every):
        for two in every[:i]:
            assert (one == two).mean() < 0.005, "as many agreements as chance allows"
            assert abs(np.corrcoef(one, two)[0, 1]) < 0.1
    for one in every[1:]:
        assert abs(np.corrcoef(one[:-1], one[1:])[0, 1]) < 0.1, "neighbours in time are unrelated"
        assert (np.abs(np.diff(one)) == 1).mean() < 0.01


def test_the_order_is_pinned() -> None:
    """Resuming with another version of this package has to give the batches that the first one would have."""
    order = LaneOrder(10, 1010, 4, seed=3)
    assert order.indices(0, 8).tolist() == PINNED[0]
    assert order.indices(10**6, 8).tolist() == PINNED[1]


PINNED = [[31, 35, 429, 350, 516, 630, 993, 935], [192, 152, 332, 478, 544, 589, 883, 866]]


def test_nothing_proportional_to_the_set_is_kept() -> None:
    order = LaneOrder(0, 10**12, 64)
    order.indices(0, 512)
    tracemalloc.start()
    for step in range(5):
        order.indices(step * 10**7, 512)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000


def test_an_order_for_a_large_batch_is_quick() -> None:
    order = LaneOrder(0, 4_000_000, 64)
    begun = time.process_time()
    for step in range(10):
        order.indices(step, 4096)
    assert (time.process_time() - begun) / 10 < 0.1


@pytest.mark.parametrize(("batch", "nearest"), [(250, 256), (1, 64), (95, 64), (96, 128), (0, 64), (-5, 64)])
def test_a_batch_that_lanes_do_not_divide_is_refused(batch: int, nearest: int) -> None:
    with pytest.raises(ValueError, match=f"global batch {batch} is not divisible by 64 lanes; nearest: {nearest}$"):
        LaneOrder(0, 1000, 64).indices(0, batch)


def test_ranks_that_do_not_divide_the_lanes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"12 lanes .* 5 ranks; .*: 1, 2, 3, 4, 6, 12$"):
        LaneOrder(0, 1000, 12).indices(0, 12, rank=0, ranks=5)


def test_ranges_that_cannot_be_walked_are_refused() -> None:
    with pytest.raises(ValueError, match=r"50 samples cannot fill 64 lanes.*at most 50"):
        LaneOrder(10, 60, 64)
    with pytest.raises(ValueError, match="at least 1"):
        LaneOrder(0, 10, 0)
    with pytest.raises(ValueError, match="no range"):
        LaneOrder(10, 5, 1)


def test_epochs_counts_passes_over_the_set() -> None:
    assert LaneOrder(0, 1000, 10).epochs(step=50, batch=40) == 2.0


def keys(samples: Sequence[RawSample | EncodedSample]) -> list[str]:
    return [sample.key for sample in samples]


@pytest.fixture
def shards(raw_set: RawSet) -> ShardSet:
    root = raw_set(4, 10)
    build_index(root, progress=False)
    return ShardSet(root)


def take(
    shards: ShardSet, count: int, rank: int = 0, ranks: int = 1, start: int = 0, workers: int = 2
) -> list[list[str]]:
    order = LaneOrder(2, 39, 4, seed=5)
    with BatchLoader(shards, order, 8, rank, ranks, start, keys, workers=workers) as loader:
        taken = [next(loader) for _ in range(count)]
    assert [step for step, _ in taken] == list(range(start, start + count))
    return [batch for _, batch in taken]


def test_the_loader_gives_the_orders_batches(shards: ShardSet) -> None:
    order = LaneOrder(2, 39, 4, seed=5)
    expected = [[f"{i:06d}" for i in order.indices(step, 8)] for step in range(12)]
    assert take(shards, 12) == expected
    assert take(shards, 12, workers=5) == expected


def test_stopping_and_resuming_gives_the_batches_of_an_uninterrupted_run(shards: ShardSet) -> None:
    whole = take(shards, 12)
    for stop in (1, 5, 11):
        assert take(shards, stop) + take(shards, 12 - stop, start=stop) == whole


def test_resuming_on_another_number_of_ranks_gives_the_same_batches(shards: ShardSet) -> None:
    whole = take(shards, 9)
    joined: list[list[str]] = []
    for ranks, start in ((2, 0), (4, 3), (1, 6)):
        parts = [take(shards, 3, rank, ranks, start) for rank in range(ranks)]
        joined += [list(itertools.chain(*together)) for together in zip(*parts, strict=True)]
    assert joined == whole


def test_errors_reach_the_consumer_at_their_step_and_stay(shards: ShardSet) -> None:
    calls = iter(range(100))

    def collate(samples: Sequence[RawSample | EncodedSample]) -> int:
        if next(calls) == 3:
            raise RuntimeError("the fourth batch is bad")
        return len(samples)

    loader = BatchLoader(shards, LaneOrder(0, 40, 4), 8, 0, 1, 0, collate, workers=1)
    assert [next(loader)[0] for _ in range(3)] == [0, 1, 2]
    for _ in range(2):
        with pytest.raises(RuntimeError, match="fourth batch"):
            next(loader)
    loader.close()


def test_a_shard_damaged_while_training_stops_the_loader(shards: ShardSet) -> None:
    shards.read(20)
    (shards.root / "00002.tar").write_bytes(b"")
    loader = BatchLoader(shards, LaneOrder(0, 40, 4), 8, 0, 1, 0, keys)
    with pytest.raises(ValueError, match=r"of shard .*00002\.tar is unreadable"):
        next(loader)


def test_batches_are_read_ahead_and_waiting_is_measured(shards: ShardSet) -> None:
    third = threading.Event()
    seen = iter(range(100))

    def collate(samples: Sequence[RawSample | EncodedSample]) -> None:
        if next(seen) == 2:
            third.set()

    with BatchLoader(shards, LaneOrder(0, 40, 4), 8, 0, 1, 0, collate, prefetch=3, workers=1) as loader:
        assert third.wait(10), "three batches are made without anyone asking"
        assert loader.wait_seconds == 0
        next(loader)
        assert loader.wait_seconds < 1

    def slow(samples: Sequence[RawSample | EncodedSample]) -> None:
        time.sleep(0.05)

    with BatchLoader(shards, LaneOrder(0, 40, 4), 8, 0, 1, 0, slow, prefetch=1, workers=1) as waiting:
        for _ in range(3):
            next(waiting)
        assert waiting.wait_seconds > 0.1


def test_a_closed_loader_stops_and_leaves_no_threads(shards: ShardSet) -> None:
    before = threading.active_count()
    loader = BatchLoader(shards, LaneOrder(0, 40, 4), 8, 0, 1, 0, keys)
    next(loader)
    loader.close()
    loader.close()
    assert list(loader) == []
    assert threading.active_count() == before


def test_a_loader_refuses_what_cannot_work_before_reading(shards: ShardSet) -> None:
    with pytest.raises(ValueError, match=r"runs to sample 41 but .* has 40"):
        BatchLoader(shards, LaneOrder(0, 41, 4), 8, 0, 1, 0, keys)
    with pytest.raises(ValueError, match="not divisible"):
        BatchLoader(shards, LaneOrder(0, 40, 4), 7, 0, 1, 0, keys)


def sample(key: str, shape: tuple[int, ...] = (2, 3), label: int | None = None, length: int = 0) -> EncodedSample:
    codes = np.full(shape, 65535, np.uint16)
    states = torch.ones(length, 4, dtype=torch.bfloat16) if length else None
    return EncodedSample(key, codes, f"caption {key}", label, states)


def test_collate_joins_codes_captions_labels_and_states() -> None:
    batch = collate_codes([sample("a", label=3, length=2), sample("b", label=0, length=5)])
    assert batch["codes"].dtype == torch.int64
    assert batch["codes"].shape == (2, 2, 3)
    assert batch["codes"].max() == 65535
    assert batch["captions"] == ["caption a", "caption b"]
    assert batch["labels"].tolist() == [3, 0]
    assert [state.shape for state in batch["states"]] == [(2, 4), (5, 4)]
    plain = collate_codes([sample("a", (4, 2, 2)), sample("b", (4, 2, 2))])
    assert (plain["labels"], plain["states"], plain["codes"].shape) == (None, None, (2, 4, 2, 2))


def test_collate_refuses_what_does_not_go_together() -> None:
    with pytest.raises(ValueError, match="'a' and 'b' have codes of shapes"):
        collate_codes([sample("a"), sample("b", (3, 2))])
    with pytest.raises(ValueError, match="'a' and 'b' has text states"):
        collate_codes([sample("a"), sample("b", length=1)])


def test_labels_that_some_samples_lack_are_left_out() -> None:
    for labels in ((None, 1), (1, None)):
        batch = collate_codes([sample(key, label=label) for key, label in zip("ab", labels, strict=True)])
        assert batch["labels"] is None
        assert batch["captions"] == ["caption a", "caption b"]
