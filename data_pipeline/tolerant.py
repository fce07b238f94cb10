"""Samples in the place of those that cannot be read, for runs that must not end because of one of them."""

import threading
from collections.abc import Callable, Sequence
from typing import Final

import numpy as np

from data_pipeline.shard_set import EncodedSample, RawSample, ShardSet

_TRIES: Final = 1000
"""Unreadable samples in a row after which the shards are taken for lost."""


class TolerantSet:
    """The samples of a set up to number `last`; in the place of one that cannot be read stands the next one that can.

    Which one depends on the number alone, so every rank, and every number of ranks, trains on the same. `report` is called
    with number and error of each sample at its first time, from reader threads.
    """

    def __init__(self, shards: ShardSet, last: int, report: Callable[[int, ValueError], None]) -> None:
        self.root, self._shards, self._last, self._report = shards.root, shards, last, report
        self._lock = threading.Lock()
        self._known: set[int] = set()
        self._places: dict[int, int] = {}

    def __len__(self) -> int:
        return self._last

    def read(self, number: int) -> RawSample | EncodedSample:
        """Sample `number`, or the next. Raises ValueError where very many in a row cannot be read."""
        for offset in range(min(_TRIES, self._last)):
            other = (number + offset) % self._last
            try:
                sample = self._shards.read(other)
            except ValueError as error:
                with self._lock:
                    is_new = other not in self._known
                    self._known.add(other)
                if is_new:
                    self._report(other, error)
                last_error = error
                continue
            if offset:
                with self._lock:
                    self._places[number] = other
            return sample
        raise ValueError(f"{min(_TRIES, self._last)} samples in a row cannot be read, the last one since: {last_error}")

    def place(self, number: int) -> int:
        """The number of the sample that was read in the place of sample `number`, which is itself as a rule."""
        return self._places.get(number, number)

    def read_many(self, numbers: Sequence[int] | np.ndarray) -> list[RawSample | EncodedSample]:
        """The samples of these numbers, in their order, each as `read` gives it. Raises as `read`."""
        numbers_B = np.asarray(numbers, np.int64) % self._last
        try:
            return self._shards.read_many(numbers_B)
        except ValueError:  # of one of them; whether of others too, and what stands in for them, `read` finds out
            return [self.read(number) for number in numbers_B.tolist()]
