"""How long one training step takes, forward and backward, and what it holds: ours and the published way.

    t2i bench train --sizes L --batch 8

Same weights, same batch: the table gives how far loss and gradients are apart. The optimizer's step is not in it, it is
the same for both.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from t2i.bench.decode import random_model
from t2i.bench.floor import Products
from t2i.bench.measure import Timing, alternate, as_json, environment, mebibytes, report
from t2i.bench.naive import NaiveNAR
from t2i.config import ModelConfig
from t2i.model import NAR
from t2i.recipes import PRESETS

FLOOR = " floor"


@dataclass(frozen=True)
class TrainRow:
    """What was measured of one way to compute a step; `loss_error` is relative to the published way's loss, and
    `gradient_error` the largest difference of any parameter's gradient, relative to its largest entry."""

    size: str
    grid: int
    batch: int
    variant: str
    tokens_per_s: float
    timing: Timing
    floor: Timing | None
    loss: float
    loss_error: float | None
    gradient_error: float | None

    @property
    def name(self) -> str:
        return f"{self.size} {self.grid}x{self.grid}, batch {self.batch}, {self.variant}"


COLUMNS: dict[str, Callable[[TrainRow], str]] = {
    "model, grid, batch, variant": lambda r: r.name,
    "seconds": lambda r: f"{r.timing.median:.2f}",
    "fastest to slowest": lambda r: f"{min(r.timing.seconds):.2f} to {max(r.timing.seconds):.2f}",
    "tokens/s": lambda r: f"{r.tokens_per_s:.0f}",
    "of the floor": lambda r: "-" if r.floor is None else f"{r.timing.median / r.floor.median:.2f}",
    "peak MiB": lambda r: mebibytes(r.timing.peak),
    "beyond weights": lambda r: mebibytes(r.timing.extra),
    "loss": lambda r: f"{r.loss:.5f}",
    "loss off by": lambda r: "-" if r.loss_error is None else f"{r.loss_error:.1e}",
    "gradients off by": lambda r: "-" if r.gradient_error is None else f"{r.gradient_error:.1e}",
}


def bench_train(
    sizes: Sequence[str],
    grid: int,
    batch: int,
    *,
    caption: int,
    repeats: int,
    activation_checkpointing: bool,
    device: torch.device,
    json: bool,
) -> list[TrainRow]:
    """Measure every size and print one table, or JSON. `caption` is in tokens.

    Raises ValueError for sizes that do not exist and numbers that cannot be.
    """
    if unknown := [size for size in sizes if size not in PRESETS]:
        raise ValueError(f"no size {unknown[0]!r}; sizes are {', '.join(PRESETS)}")
    if min(grid, batch, repeats, caption) < 1:
        raise ValueError("grid, batch, repeats and the caption have to be at least 1")
    if caption > ModelConfig.max_condition:
        raise ValueError(f"a caption of {caption} tokens is longer than the {ModelConfig.max_condition} of the models")
    rows = [
        row
        for size in sizes
        for row in _one_size(size, grid, batch, caption, repeats, activation_checkpointing, device)
    ]
    header = environment(device) | {"dtype": "float32", "caption": f"{caption} tokens", "repeats": repeats}
    if json:
        print(as_json(header, rows))
    else:
        report("t2i bench train", header, rows, COLUMNS)
    return rows


def _one_size(
    size: str, grid: int, batch: int, caption: int, repeats: int, checkpointing: bool, device: torch.device
) -> list[TrainRow]:
    # Without dropout, so that both ways compute the same.
    config = replace(PRESETS[size](), grid=(grid, grid), dropout=0.0)
    model = random_model(config, device, torch.float32).train()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(config.vocab_size, (batch, grid * grid), generator=generator).to(device)
    states = torch.randn(batch, caption, config.condition_dim, generator=generator).to(device)
    mask = torch.ones(batch, caption, dtype=torch.bool, device=device)
    unconditional = torch.zeros(batch, dtype=torch.bool, device=device)

    naive: NaiveNAR | None = None

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        if naive is not None:
            naive.zero_grad()

    def step(loss: Callable[..., Tensor], checkpoint: bool = False) -> Callable[[], float]:
        def run() -> float:
            model.activation_checkpointing = checkpoint
            value = loss(tokens, states, mask, unconditional)
            value.backward()
            return float(value.detach())

        return run

    ways = {"ours": step(model)}
    if checkpointing:
        ways["ours, checkpointed"] = step(model, checkpoint=True)
    label = f"{size} {grid}x{grid} batch {batch}"
    # Before anything else is held that is not the step's.
    memory = alternate(ways, 1, device, label, reset)
    if device.type == "cpu":
        naive = NaiveNAR(model)
        ways["naive"] = step(naive.loss)
        memory |= alternate({"naive": ways["naive"]}, 1, device, label, reset)
    losses, errors = _compare(ways, model, naive, reset)
    with Products(list(model.parameters())) as products:
        ways["ours"]()
    runs: dict[str, Callable[[], object]] = dict(ways)
    if products.products:
        runs["ours" + FLOOR] = products.repeat
    timings = alternate(runs, repeats, device, label, reset)
    return [
        TrainRow(
            size, grid, batch, name, batch * grid * grid / timings[name].median,
            replace(memory[name], seconds=timings[name].seconds), timings.get(name + FLOOR), losses[name],
            None if naive is None or name == "naive" else abs(losses[name] / losses["naive"] - 1), errors.get(name),
        )
        for name in ways
    ]  # fmt: skip


def _compare(
    ways: dict[str, Callable[[], float]], model: NAR, naive: NaiveNAR | None, reset: Callable[[], None]
) -> tuple[dict[str, float], dict[str, float]]:
    """Loss of each way, and how far its gradients are from the published way's."""
    reset()
    losses, errors = {}, {}
    expected: dict[str, Tensor] = {}
    if naive is not None:
        losses["naive"] = ways["naive"]()
        expected = naive.gradients()
        reset()
    for name in ways.keys() - {"naive"}:
        losses[name] = ways[name]()
        if expected:
            errors[name] = max(
                float((p.grad - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-30))
                for key, p in model.named_parameters()
                if p.grad is not None
            )
        reset()
    return losses, errors
