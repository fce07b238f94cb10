from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from t2i.batches import Batches, _mix
from t2i.config import Recipe
from t2i.recipes import shapes_tiny


def batches_of(recipe: Recipe, rank: int, ranks: int, batch: int) -> Batches:
    """Only what the random choices depend on: no engine, no process group."""
    engine = SimpleNamespace(global_batch=batch, runtime=SimpleNamespace(rank=rank, ranks=ranks))
    return Batches(recipe, None, None, engine)  # type: ignore[arg-type]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_dropped_conditions_do_not_depend_on_the_number_of_ranks(ranks: int) -> None:
    for step in (0, 1, 777):
        parts = [batches_of(shapes_tiny(), rank, ranks, 48)._unconditional(step) for rank in range(ranks)]
        whole = batches_of(shapes_tiny(), 0, 1, 48)._unconditional(step)
        assert whole is not None
        assert torch.equal(torch.cat([part for part in parts if part is not None]), whole)


def test_conditions_are_dropped_as_often_as_asked() -> None:
    batches = batches_of(shapes_tiny(), 0, 1, 1000)
    drops = [batches._unconditional(step) for step in range(20)]
    share = torch.stack([d for d in drops if d is not None]).float().mean()
    assert 0.09 < float(share) < 0.11
    assert len({tuple(d.tolist()) for d in drops if d is not None}) == 20
    never = replace(shapes_tiny(), model=replace(shapes_tiny().model, condition_dropout=0.0))
    assert batches_of(never, 0, 1, 1000)._unconditional(0) is None


def test_mixed_seeds_differ_and_stay_in_range() -> None:
    seeds = {_mix(seed, step, kind) for seed in range(5) for step in range(50) for kind in range(5)}
    assert len(seeds) == 5 * 50 * 5
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert _mix(1, 2, 3) == _mix(1, 2, 3)
