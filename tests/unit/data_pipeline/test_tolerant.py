from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.index import ShardSet, build_index
from data_pipeline.tolerant import TolerantSet


class Damaged(ShardSet):
    """A set of which some samples cannot be read any more."""

    lost: frozenset[int] = frozenset()

    def read_raw(self, i, suffixes=None):  # type: ignore[no-untyped-def]
        if i in self.lost:
            raise ValueError(f"sample {i} is unreadable")
        return super().read_raw(i, suffixes)


@pytest.fixture
def shards(raw_set: Callable[..., Path]) -> Damaged:
    root = raw_set(2, 6)
    build_index(root, progress=False)
    return Damaged(root)


def test_the_next_sample_stands_in_for_one_that_cannot_be_read(shards: Damaged) -> None:
    shards.lost = frozenset({3, 4, 9})
    told: list[int] = []
    tolerant = TolerantSet(shards, 10, lambda number, error: told.append(number))
    keys = [tolerant.read(i).key for i in range(10)]
    wanted = [5 if i in (3, 4) else 0 if i == 9 else i for i in range(10)]
    assert keys == [shards.key(i) for i in wanted]
    assert tolerant.replaced == 3
    assert told == [3, 4, 9]
    tolerant.read(3)
    assert (tolerant.replaced, told) == (4, [3, 4, 9])  # counted again, told once


def test_a_set_of_which_nothing_can_be_read_is_an_error(shards: Damaged) -> None:
    shards.lost = frozenset(range(12))
    with pytest.raises(
        ValueError, match=r"10 samples in a row cannot be read, the last one since: sample 1 is unreadable"
    ):
        TolerantSet(shards, 10, lambda number, error: None).read(2)
