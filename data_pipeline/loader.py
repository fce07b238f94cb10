"""Training batches in an order that no number of GPUs, workers or restarts can change.

The set is cut into lanes, contiguous ranges of samples. Each lane walks its own range for ever in shuffled
epochs, and every global batch takes equally many samples from each lane. Rank r of R serves lanes `[r*L/R,
(r+1)*L/R)`, so the whole state of the loader is one integer, the step. Shape suffixes: N samples of a batch,
L lanes, B samples of a rank's batch.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Generic, Self, TypeVar

import numpy as np
import torch

from data_pipeline.shard_set import EncodedSample, RawSample, ShardSet
from data_pipeline.tolerant import TolerantSet

_ROUNDS: Final = 12
_MIN_BITS: Final = 4
"""With fewer bits or rounds, permutations of a handful of samples are measurably not uniform."""

_GOLDEN: Final = np.uint64(0x9E3779B97F4A7C15)
Collated = TypeVar("Collated")


@dataclass(frozen=True)
class LaneOrder:
    """The order of samples `first` to `last - 1` of a set, as a function of seed, lanes and range alone.

    Raises ValueError for a range that leaves a lane without samples, or lanes below 1. Lane sizes differ by
    at most one.
    """

    first: int
    last: int
    lanes: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        if self.lanes < 1:
            raise ValueError(f"{self.lanes} lanes cannot hold samples: set at least 1")
        if not 0 <= self.first <= self.last:
            raise ValueError(f"samples {self.first} to {self.last} are no range: give 0 <= first <= last")
        if self.last - self.first < self.lanes:
            raise ValueError(
                f"{self.last - self.first} samples cannot fill {self.lanes} lanes: add samples, "
                f"or set lanes to at most {self.last - self.first}"
            )

    def __len__(self) -> int:
        return self.last - self.first

    def check(self, batch: int, ranks: int = 1) -> None:
        """Raise ValueError unless a global batch of `batch` samples divides into the lanes, and the lanes by
        ranks.
        """
        if batch < 1 or batch % self.lanes:
            nearest = max(1, (batch + self.lanes // 2) // self.lanes) * self.lanes
            raise ValueError(f"global batch {batch} is not divisible by {self.lanes} lanes; nearest: {nearest}")
        if ranks < 1 or self.lanes % ranks:
            counts = [n for n in range(1, self.lanes + 1) if self.lanes % n == 0]
            raise ValueError(
                f"{self.lanes} lanes cannot be shared by {ranks} ranks; rank counts that divide them: "
                f"{', '.join(map(str, counts))}"
            )

    def indices(self, step: int, batch: int, rank: int = 0, ranks: int = 1) -> np.ndarray:
        """Sample numbers of one rank's part of global batch `step`, int64 [batch // ranks], lane by lane.

        The parts of all ranks, joined in rank order, are the same batch for every `ranks`. Time and memory
        are proportional to the part alone. Raises ValueError as `check`.
        """
        self.check(batch, ranks)
        assert step >= 0, step
        assert 0 <= rank < ranks, (rank, ranks)
        each, share = batch // self.lanes, self.lanes // ranks
        lane_N = np.repeat(np.arange(rank * share, (rank + 1) * share, dtype=np.int64), each)
        place_N = np.tile(np.arange(step * each, (step + 1) * each, dtype=np.int64), share)
        # Splits len(self) as evenly as integers allow; Python's integers would not overflow, but neither do
        # these below 2**63 / lanes samples.
        start_N = len(self) * lane_N // self.lanes
        size_N = len(self) * (lane_N + 1) // self.lanes - start_N
        epoch_N, place_N = np.divmod(place_N, size_N)
        key_N = _keys(self.seed, lane_N, epoch_N)
        # The width of the network has to come from the lanes of all ranks, or it would depend on who asks.
        largest = -(-len(self) // self.lanes)
        sample_N: np.ndarray = self.first + start_N + permute(place_N, size_N, key_N, largest)
        return sample_N

    def epochs(self, step: int, batch: int) -> float:
        """How often, on average, each sample has been served before global batch `step`."""
        return step * batch / len(self)


def permute(place_N: np.ndarray, size_N: np.ndarray, key_N: np.ndarray, largest: int) -> np.ndarray:
    """Where each place goes in a keyed random permutation of `range(size)`, without storing the permutation.

    All are arrays [N]: int64 `place_N < size_N`, int64 sizes of at most `largest`, uint64 keys. For one size,
    key and `largest`, place to result is a bijection of `range(size)`. An alternating Feistel network
    permutes the next power of two, and whatever lands outside the range is sent on through it until it lands
    inside (cycle walking; Black and Rogaway 2002, "Ciphers with Arbitrary Finite Domains"), fewer than two
    passes on average for sizes near `largest`. Returns int64 [N].
    """
    bits = max(_MIN_BITS, (largest - 1).bit_length())
    result_N = place_N.astype(np.uint64)
    size_N = size_N.astype(np.uint64)
    walking = np.arange(len(result_N))
    while len(walking):
        moved = _feistel(result_N[walking], key_N[walking], bits)
        result_N[walking] = moved
        walking = walking[moved >= size_N[walking]]
    return result_N.astype(np.int64)


def _feistel(value_N: np.ndarray, key_N: np.ndarray, bits: int) -> np.ndarray:
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high_N, low_N = value_N >> low_bits, value_N & low_mask
    round_key_N = key_N
    for number in range(_ROUNDS):
        round_key_N = round_key_N + _GOLDEN
        # Each half is changed by a function of the other, so every round can be undone, whatever the
        # function.
        if number % 2:
            low_N = low_N ^ (_mix(high_N ^ round_key_N) & low_mask)
        else:
            high_N = high_N ^ (_mix(low_N ^ round_key_N) & high_mask)
    return (high_N << low_bits) | low_N


def _keys(seed: int, lane_N: np.ndarray, epoch_N: np.ndarray) -> np.ndarray:
    seed_1 = np.array([seed & 0xFFFFFFFFFFFFFFFF], np.uint64)
    return _mix(_mix(_mix(seed_1 + _GOLDEN) + lane_N.astype(np.uint64)) + epoch_N.astype(np.uint64))


def _mix(value_N: np.ndarray) -> np.ndarray:
    """Scramble uint64 [N] bijectively: the finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value_N = (value_N ^ (value_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value_N = (value_N ^ (value_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed_N: np.ndarray = value_N ^ (value_N >> np.uint64(31))
    return mixed_N


def collate_codes(samples: Sequence[RawSample | EncodedSample]) -> dict[str, Any]:
    """Join encoded samples to one batch.

    Returns `codes` int64 [B, *grid]; `captions`, list of B strings; `labels` int64 [B], or None when any sample has
    none; `states`, list of B bf16 tensors [length, channels], or None when no sample has any. A run that needs labels
    asks `Manifest.lacking` before it starts. Raises ValueError when grids differ, or only some samples have states.
    """
    encoded = [sample for sample in samples if isinstance(sample, EncodedSample)]
    assert len(encoded) == len(samples) > 0, "collate_codes joins encoded samples"
    first = encoded[0]
    for sample in encoded:
        if sample.codes.shape != first.codes.shape:
            raise ValueError(
                f"samples {first.key!r} and {sample.key!r} have codes of shapes {first.codes.shape} and "
                f"{sample.codes.shape}: encode the set with one grid"
            )
        if (sample.states is None) != (first.states is None):
            raise ValueError(
                f"one of samples {first.key!r} and {sample.key!r} has text states, the other has not: "
                "train on sets where all samples have them or none"
            )
    labels = [sample.label for sample in encoded if sample.label is not None]
    return {
        "codes": torch.from_numpy(np.stack([sample.codes for sample in encoded]).astype(np.int64)),
        "captions": [sample.caption for sample in encoded],
        "labels": torch.tensor(labels) if len(labels) == len(encoded) else None,
        "states": None if first.states is None else [sample.states for sample in encoded],
    }


class BatchLoader(Generic[Collated]):
    """Endless iterator of (step, collated batch) for one rank, read ahead by threads, always in step order.

    Whatever reading or collating raises comes out of `next` at its step, and again at every later call. Use
    as a context manager, or call `close`. `wait_seconds` is the total time that `next` has waited for a
    batch.
    """

    def __init__(
        self,
        shard_set: ShardSet | TolerantSet,
        order: LaneOrder,
        batch: int,
        rank: int,
        ranks: int,
        start_step: int,
        collate: Callable[[Sequence[RawSample | EncodedSample]], Collated],
        prefetch: int = 4,
        workers: int = 2,
    ) -> None:
        """`batch` is global; `prefetch` batches are read ahead by `workers` threads.

        Raises ValueError as `LaneOrder.check`, and when the order reaches past the end of the set.
        """
        order.check(batch, ranks)
        if order.last > len(shard_set):
            raise ValueError(
                f"the order runs to sample {order.last} but {shard_set.root} has {len(shard_set)}: end the range there"
            )
        assert prefetch >= 1 <= workers, (prefetch, workers)
        self._shard_set, self._order, self._batch = shard_set, order, batch
        self._rank, self._ranks, self._collate = rank, ranks, collate
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="batch-loader")
        self._step = start_step
        self._error: BaseException | None = None
        self._closed = False
        self.wait_seconds = 0.0
        self._ahead: deque[Future[Collated]] = deque(
            self._pool.submit(self._load, start_step + n) for n in range(prefetch)
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[int, Collated]:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StopIteration
        begun = time.perf_counter()
        try:
            collated = self._ahead.popleft().result()
        except BaseException as error:
            # Going on would skip the batch without a word.
            self._error = error
            self.close()
            raise
        finally:
            self.wait_seconds += time.perf_counter() - begun
        step = self._step
        self._step += 1
        self._ahead.append(self._pool.submit(self._load, step + 1 + len(self._ahead)))
        return step, collated

    def close(self) -> None:
        """Drop what was read ahead and end the threads; iteration then stops."""
        self._closed = True
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._ahead.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self, step: int) -> Collated:
        numbers_B = self._order.indices(step, self._batch, self._rank, self._ranks)
        return self._collate(self._shard_set.read_many(numbers_B))
