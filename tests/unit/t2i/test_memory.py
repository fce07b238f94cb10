from dataclasses import replace
from typing import Any

import pytest

from t2i import heads
from t2i.config import ModelConfig, Recipe, TrainConfig
from t2i.costs import parameter_list, parameters
from t2i.memory import LOSS_ROWS, Arrangement, memory
from t2i.recipes import nar_xl_256, shapes_tiny

GB = 10**9
RANKS = 8


def config(stage: int, micro_batch: int = 4, **zero: Any) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": micro_batch, "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "reduce_bucket_size": 50_000_000, **zero},
    }  # fmt: skip


def of(stage: int, micro_batch: int = 4, ranks: int = RANKS, recipe: Recipe | None = None, **zero: Any) -> Any:
    arrangement = Arrangement.of(config(stage, micro_batch, **zero))
    return memory(recipe or nar_xl_256(), arrangement, ranks, 120)


def test_the_losss_rows_are_those_of_the_heads() -> None:
    assert LOSS_ROWS == heads.LOSS_ROWS


def test_what_is_sharded_is_a_share_and_what_is_not_is_whole() -> None:
    count = sum(parameters(nar_xl_256()).values())
    for stage in (1, 2, 3):
        found = of(stage)
        share = pytest.approx(count / RANKS, rel=1e-6)
        assert found.largest("master") / 4 == share
        assert found.largest("moments") / 8 == share
        assert found.largest("average") / 4 == share
        assert found.offloaded == 0
    assert of(1).largest("weights") == of(2).largest("weights") == 2 * count
    # Its own, small ones that all have, and those that a pass has gathered.
    assert 2 * count / RANKS < of(3, stage3_max_reuse_distance=0).largest("weights") < 0.6 * count
    assert of(1, overlap_comm=False).largest("gradients") >= 2 * count > 2 * of(2).largest("gradients")


def test_without_an_average_there_is_none() -> None:
    recipe = nar_xl_256()
    without = replace(recipe, train=replace(recipe.train, ema_decay=0.0))
    assert of(2, recipe=without).largest("average") == 0
    assert of(2).peak - of(2, recipe=without).peak == of(2).largest("average")


def test_offload_moves_memory_to_the_processor() -> None:
    cpu = {"device": "cpu"}
    for stage in (2, 3):
        here, off = of(stage), of(stage, offload_optimizer=cpu)
        assert off.peak < here.peak
        assert off.offloaded > sum(here.largest(kind) for kind in ("master", "moments", "average"))
        assert off.largest("master") == off.largest("moments") == off.largest("average") == 0
    everything = of(3, offload_optimizer=cpu, offload_param=cpu)
    assert everything.offloaded > of(3, offload_optimizer=cpu).offloaded
    assert everything.peak < of(3, offload_optimizer=cpu).peak
    assert of(3, offload_param={"device": "none"}) == of(3)


def test_checkpointing_keeps_an_input_of_each_block() -> None:
    recipe = nar_xl_256()
    again = replace(recipe, train=replace(recipe.train, activation_checkpointing=True))
    kept, recomputed = of(2, 16), of(2, 16, recipe=again)
    assert recomputed.largest("activations") < 0.15 * kept.largest("activations")
    assert recomputed.largest("weights") == kept.largest("weights")


def test_activations_grow_with_the_micro_batch_and_nothing_sharded_does() -> None:
    small, large = of(2, 2), of(2, 8)
    assert large.largest("activations") == pytest.approx(4 * small.largest("activations"), rel=1e-3)
    for kind in ("weights", "master", "moments", "average", "gradients"):
        assert large.largest(kind) == small.largest(kind)


def test_what_accumulates_takes_gradients_of_its_own() -> None:
    for stage, factor in ((1, 2), (2, 1.5)):
        once, twice = config(stage, overlap_comm=True), config(stage, overlap_comm=True)
        twice["gradient_accumulation_steps"] = 2
        first, second = (memory(nar_xl_256(), Arrangement.of(c), RANKS, 120) for c in (once, twice))
        assert second.largest("gradients") > factor * first.largest("gradients")


def test_the_bucket_is_deepspeeds_own_where_none_is_given() -> None:
    given = config(2)
    del given["zero_optimization"]["reduce_bucket_size"]
    assert Arrangement.of(given).reduce_bucket == 500_000_000
    assert Arrangement.of(given).overlap is False
    assert Arrangement.of(config(3)).overlap is True
    assert not Arrangement.of({**config(3), "bf16": {"enabled": False}}).half


def test_the_whole_is_the_sum_of_one_moment() -> None:
    found = of(2)
    assert found.peak == sum(found.moments[found.peak_moment].values())
    assert found.peak == max(sum(kinds.values()) for kinds in found.moments.values())


@pytest.mark.parametrize("grid", [(8, 8), (4, 8, 8)])
def test_other_recipes_have_a_peak_too(grid: tuple[int, ...]) -> None:
    model = ModelConfig(grid=grid, condition="class", positions="learned", n_layer=2, n_head=4, width=128)
    recipe = Recipe("small", model, "shapes", 64, train=TrainConfig())
    assert of(2, recipe=recipe).peak > 4 * sum(p.size for p in parameter_list(recipe))
    assert of(2, recipe=shapes_tiny()).peak > 0
