"""Whether real runs take the memory and the disk that `t2i plan` says."""

import json
import sys
from typing import Any

import pytest

from t2i.config import ModelConfig, Recipe, TrainConfig, to_json
from t2i.costs import checkpoint_bytes, parameters
from t2i.memory import Arrangement, memory

from .conftest import execute

pytestmark = pytest.mark.slow

CAPTION = 20
MODEL = ModelConfig(
    grid=(16, 16), vocab_size=4096, n_layer=5, n_head=8, width=512, condition_dim=512, max_condition=32
)  # 27 million parameters
# ZeRO stage, ranks, micro-batch, accumulation, activation checkpointing. Weights, gradients and activations all count.
CASES = [
    (1, 1, 2, 1, False), (2, 1, 10, 1, True), (3, 1, 2, 1, False),
    (1, 2, 2, 1, False), (2, 2, 3, 2, False), (3, 2, 2, 1, False),
]  # fmt: skip


def recipe_of(checkpointing: bool) -> Recipe:
    train = TrainConfig(activation_checkpointing=checkpointing, ema_decay=0.99)
    return Recipe("measured", MODEL, "shapes", 256, frozen_text_encoder="some T5", train=train)


def config_of(stage: int, micro_batch: int, accumulation: int) -> dict[str, Any]:
    # A bucket as large as it is here would never be written to in full by a model as small as this.
    zero = {"stage": stage, "reduce_bucket_size": 5_000_000}
    return {
        "train_micro_batch_size_per_gpu": micro_batch, "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 1.0, "zero_optimization": zero,
    }  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, int]]:
    folder = tmp_path_factory.mktemp("measured")
    cases = [
        {
            "recipe": json.loads(to_json(recipe_of(checkpointing))), "ranks": ranks, "caption": CAPTION, "steps": 2,
            "deepspeed": config_of(stage, micro_batch, accumulation),
            "checkpoint": str(folder / f"zero{stage}") if ranks == 2 else "",
        }
        for stage, ranks, micro_batch, accumulation, checkpointing in CASES
    ]  # fmt: skip
    (folder / "cases.json").write_text(json.dumps(cases))
    # Freed memory goes back to the system, so that what counts is what is held.
    trim = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}
    done = execute([sys.executable, "-m", "integration.measured", folder / "cases.json"], timeout=900, **trim)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.parametrize("number", range(len(CASES)), ids=map(str, CASES))
def test_the_peak_of_a_real_run_is_within_15_percent_of_the_plans(number: int, measured: list[dict[str, int]]) -> None:
    stage, ranks, micro_batch, accumulation, checkpointing = CASES[number]
    arrangement = Arrangement.of(config_of(stage, micro_batch, accumulation))
    planned = memory(recipe_of(checkpointing), arrangement, ranks, CAPTION, processor=True)
    peak = measured[number]["peak"]
    print(f"measured {peak / 1e6:.0f} MB, planned {planned.peak / 1e6:.0f} MB, {planned.peak / peak - 1:+.1%}")
    assert planned.peak == pytest.approx(peak, rel=0.15), planned.moments


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_is_as_large_as_planned(stage: int, measured: list[dict[str, int]]) -> None:
    (number,) = (n for n, case in enumerate(CASES) if case[:2] == (stage, 2))
    recipe = recipe_of(False)
    count = sum(parameters(recipe).values())
    assert count > 20e6
    planned = checkpoint_bytes(count, stage, item=4, averaged=True)
    size = measured[number]["checkpoint"]
    print(f"measured {size / 1e6:.0f} MB, planned {planned / 1e6:.0f} MB")
    assert planned == pytest.approx(size, rel=0.02)
