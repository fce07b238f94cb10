"""What ranks of real training runs hold in memory, and write to disk: `python -m integration.measured CASES.json`.

One process imports everything once and forks itself for each rank of each case, {"recipe", "deepspeed", "ranks", "caption",
"steps", "checkpoint"}. The answer to each is a line of JSON: the most bytes that a rank held beyond what it held before its
model was built, and the size of the checkpoint, if there is to be one, in the folder that "checkpoint" names.
"""

import ctypes
import gc
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401, as in `forked`
import torch

from t2i.config import ModelConfig, Recipe, from_json
from t2i.engine import Engine, Runtime, start_runtime
from t2i.objective import build_model, parameter_groups
from t2i.optimizer import make_optimizer

from .conftest import free_port

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(field: str) -> int:
    """Bytes of a field of the process's status, such as VmRSS."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def train(recipe: Recipe, case: dict[str, Any], runtime: Runtime) -> Engine:
    """An engine that has taken the steps of a case on random tokens."""
    model, config = recipe.model, case["deepspeed"]
    engine = Engine(
        runtime,
        lambda: build_model(recipe, None),
        config,
        lambda module: make_optimizer(parameter_groups(module, recipe.train.weight_decay), recipe.train),
    )
    batch, caption = engine.micro_batch, case["caption"]
    for step in range(case["steps"]):
        torch.manual_seed(step)
        inputs = (
            torch.randint(model.vocab_size, (batch, *model.grid)),
            torch.randn(batch, caption, model.condition_dim),
            torch.ones(batch, caption, dtype=torch.bool),
            torch.zeros(batch, dtype=torch.bool),
        )
        engine.step([inputs] * engine.accumulation, 1e-4)
    return engine


def peak_of(case: dict[str, Any]) -> int:
    """Run one rank of a case and return the most that it held beyond what it held before."""
    recipe, runtime = from_json(Recipe, json.dumps(case["recipe"])), start_runtime()
    small = ModelConfig(grid=(2, 2), vocab_size=8, n_layer=1, n_head=1, width=8, condition_dim=8, max_condition=32)
    warm = {**case, "deepspeed": {**case["deepspeed"]}, "steps": 2}
    warm["deepspeed"]["zero_optimization"] = {**case["deepspeed"]["zero_optimization"], "reduce_bucket_size": 1000}
    # Code and libraries are loaded as they are first used, and are not what is measured here.
    train(replace(recipe, model=small), warm, runtime)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    CLEAR.write_text("5")
    before = resident("VmRSS")
    engine = train(recipe, case, runtime)
    peak = resident("VmHWM") - before
    if case["checkpoint"]:
        engine.deepspeed.save_checkpoint(case["checkpoint"], tag="saved", save_latest=False)
    return peak


def execute(case: dict[str, Any]) -> int:
    """The most that any rank of a case held."""
    port, pipes = str(free_port()), []
    for rank in range(case["ranks"]):
        read, write = os.pipe()
        if os.fork() == 0:
            code = 1
            os.environ.update(
                RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(case["ranks"]), MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            )  # fmt: skip
            try:
                os.write(write, str(peak_of(case)).encode())
                code = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                sys.stderr.flush()
                os._exit(code)
        os.close(write)
        pipes.append(read)
    peaks = [os.fdopen(read).read() for read in pipes]
    for _ in pipes:
        os.wait()
    return max(int(peak) for peak in peaks)


def main() -> None:
    """Measure the cases in the file that is the first argument."""
    for case in json.loads(Path(sys.argv[1]).read_text()):
        peak = execute(case)
        folder = case["checkpoint"]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file()) if folder else 0
        print(json.dumps({"peak": peak, "checkpoint": size}), flush=True)


if __name__ == "__main__":
    main()
