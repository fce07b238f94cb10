from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.index import ShardSet, build_index
from data_pipeline.loader import BatchLoader, LaneOrder
from data_pipeline.tolerant import TolerantSet


@pytest.fixture
def shards(raw_set: Callable[..., Path]) -> ShardSet:
    root = raw_set(2, 6)
    build_index(root, progress=False)
    shards = ShardSet(root)
    shards.read_many([0, 6])  # what changes later is noticed no more
    return shards


def damage(shards: ShardSet, *lost: int) -> None:
    """Overwrite the captions of samples on disk with bytes that are no text; sizes stay."""
    for number in lost:
        path = shards.root / shards.shard_of(number)
        caption = shards.read_raw(number).caption.encode()
        whole = path.read_bytes()
        assert whole.count(caption + b"\0") == 1
        path.write_bytes(whole.replace(caption + b"\0", b"\xff" * len(caption) + b"\0"))


def test_the_next_sample_stands_in_for_one_that_cannot_be_read(shards: ShardSet) -> None:
    damage(shards, 3, 4, 9)
    told: list[int] = []
    tolerant = TolerantSet(shards, 10, lambda number, error: told.append(number))
    keys = [tolerant.read(i).key for i in range(10)]
    wanted = [5 if i in (3, 4) else 0 if i == 9 else i for i in range(10)]
    assert keys == [shards.key(i) for i in wanted]
    assert [tolerant.place(i) for i in range(10)] == wanted
    assert told == [3, 4, 9]
    tolerant.read(3)
    assert told == [3, 4, 9]  # once


@pytest.mark.parametrize("lost", [(), (3,), (0, 3, 4, 9)])
def test_many_at_once_are_the_same_as_one_by_one(shards: ShardSet, lost: tuple[int, ...]) -> None:
    damage(shards, *lost)
    told: list[int] = []
    one_by_one = TolerantSet(shards, 10, lambda number, error: None)
    at_once = TolerantSet(shards, 10, lambda number, error: told.append(number))
    numbers = [9, 2, 3, 3, 11, 0, 4]
    assert at_once.read_many(numbers) == [one_by_one.read(number) for number in numbers]
    assert [at_once.place(i) for i in range(10)] == [one_by_one.place(i) for i in range(10)]
    assert sorted(told) == sorted({number for number in lost if number in numbers})


def test_the_loader_trains_on_the_same_for_every_number_of_ranks(shards: ShardSet) -> None:
    damage(shards, 3, 4, 9)
    order = LaneOrder(0, 12, 4)

    def batches(rank: int, ranks: int) -> list[list[str]]:
        tolerant = TolerantSet(shards, 12, lambda number, error: None)
        with BatchLoader(tolerant, order, 4, rank, ranks, 0, lambda samples: [s.key for s in samples]) as loader:
            return [next(loader)[1] for _ in range(3)]

    whole = batches(0, 1)
    assert whole == [a + b for a, b in zip(batches(0, 2), batches(1, 2), strict=True)]
    stands_in = {3: 5, 4: 5, 9: 10}
    numbers = [order.indices(step, 4).tolist() for step in range(3)]
    assert whole == [[f"{stands_in.get(i, i):06d}" for i in batch] for batch in numbers]


def test_a_set_of_which_nothing_can_be_read_is_an_error(shards: ShardSet) -> None:
    damage(shards, *range(12))
    tolerant = TolerantSet(shards, 10, lambda number, error: None)
    message = r"10 samples in a row cannot be read, the last one since: sample '000001' at byte"
    with pytest.raises(ValueError, match=message):
        tolerant.read(2)
    with pytest.raises(ValueError, match=message):
        tolerant.read_many([2])
