"""What one rank trains on, step by step: samples in their order, and what is dropped of their conditions.

Everything random is a function of (seed, step), and nothing of the number of ranks but dropout inside the model.
"""

import math
import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data_pipeline.index import ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.tolerant import TolerantSet
from t2i.config import Recipe
from t2i.engine import Engine
from t2i.objective import condition_tensors

MicroBatch = tuple[Tensor, Tensor, Tensor | None]
"""Tokens [B, *grid], condition, condition mask."""


class Batches:
    """The batches of one run on one rank."""

    def __init__(self, recipe: Recipe, shards: ShardSet, order: LaneOrder, engine: Engine) -> None:
        self.recipe, self.order = recipe, order
        self._engine, self._runtime = engine, engine.runtime
        self.samples: ShardSet | TolerantSet = shards
        """Those that are trained on."""
        self.all_samples: ShardSet | TolerantSet = shards
        """Those that are kept for validation as well."""
        if recipe.data.unreadable == "replace":
            self.samples = TolerantSet(shards, order.last, self._report)
            self.all_samples = TolerantSet(shards, len(shards), self._report)

    def _report(self, number: int, error: ValueError) -> None:
        rank = self._runtime.rank
        print(f"\nrank {rank} takes another sample in place of number {number}: {error}", file=sys.stderr)

    def loader(self, step: int) -> BatchLoader[list[MicroBatch]]:
        """What reads ahead from a step on."""
        workers = self.recipe.data.workers
        return BatchLoader(
            self.samples, self.order, self._engine.global_batch, self._runtime.rank, self._runtime.ranks, step,
            self._micro_batches, prefetch=max(4, 2 * workers), workers=workers,
        )  # fmt: skip

    def _micro_batches(self, samples: Sequence[Any]) -> list[MicroBatch]:
        size = self._engine.micro_batch
        return [self.collate(samples[start : start + size]) for start in range(0, len(samples), size)]

    def collate(self, samples: Sequence[Any]) -> MicroBatch:
        """Encoded samples as the model takes them."""
        batch = collate_codes(samples)
        return batch["codes"], *condition_tensors(batch, self.recipe, self._engine.module.text_encoder)

    def inputs(self, step: int, micro_batches: Sequence[MicroBatch]) -> list[tuple[Tensor | None, ...]]:
        """What the model is given in a step; all generators start from its seed."""
        # Dropout differs from rank to rank and from step to step, and not from run to run.
        seed = _mix(self.recipe.train.seed, step, 2 + self._runtime.rank)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        unconditional = self._unconditional(step)
        parts: Sequence[Tensor | None] = (
            [None] * len(micro_batches) if unconditional is None else unconditional.split(self._engine.micro_batch)
        )
        return [(*batch, part) for batch, part in zip(micro_batches, parts, strict=True)]

    def _unconditional(self, step: int) -> Tensor | None:
        """Which samples of this rank's part of a batch lose their condition: bool [batch / ranks]."""
        share = self.recipe.model.condition_dropout
        if share == 0:
            return None
        # Drawn for the global batch, so that it does not depend on the number of ranks.
        generator = torch.Generator().manual_seed(_mix(self.recipe.train.seed, step, 1))
        dropped = torch.rand(self._engine.global_batch, generator=generator) < share
        return dropped.chunk(self._runtime.ranks)[self._runtime.rank]

    def _numbers(self, step: int) -> list[int]:
        runtime = self._runtime
        return self.order.indices(step, self._engine.global_batch, runtime.rank, runtime.ranks).tolist()

    def _place(self, number: int) -> int:
        """The sample that was read in the place of sample `number`; a rank knows that of its own ones alone."""
        return self.samples.place(number) if isinstance(self.samples, TolerantSet) else number

    def replaced(self, step: int) -> int:
        """How many samples of this rank's part of a batch, which it has read, stand in the place of others."""
        if not isinstance(self.samples, TolerantSet):
            return 0
        return sum(self._place(number) != number for number in self._numbers(step))

    def suspects(self, step: int, losses_A: Sequence[float]) -> list[int]:
        """Samples of the micro-batches whose loss is no finite number, or else of the one with the highest, or of all where a
        step of finite losses was left out; given this rank's losses. The same on all ranks, which all have to call it."""
        placed = np.array([self._place(number) for number in self._numbers(step)])
        own = [(loss, part.tolist()) for loss, part in zip(losses_A, np.split(placed, len(losses_A)), strict=True)]
        parts: list[tuple[float, list[int]]] = [part for rank in self._engine.gather(own) for part in rank]
        odd = [part for loss, part in parts if not math.isfinite(loss)]
        if not odd:
            odd = [part for _, part in parts] if self._engine.skipped else [max(parts)[1]]
        return [number for part in odd for number in part]


def _mix(*numbers: int) -> int:
    """A seed from several numbers, far apart for neighbouring ones."""
    value = 0
    for number in numbers:
        value = (value * 6364136223846793005 + number + 1442695040888963407) % 2**63
        value ^= value >> 29
    return value
