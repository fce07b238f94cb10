"""How long one batch of pictures takes to decode: NAR, raster, ZipAR and the published way, each above its floor.

    t2i bench decode --sizes L XL --grids 16 32 --batches 1 8

Models have random weights: what a pass costs does not depend on what it predicts. Seeds are fixed, so the published way has
to draw the very tokens that ours draws, and the table says whether it did.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from t2i.bench.floor import Products
from t2i.bench.measure import Timing, alternate, as_json, environment, mebibytes, report
from t2i.bench.naive import NaiveNAR
from t2i.config import ModelConfig
from t2i.model import NAR
from t2i.recipes import PRESETS
from t2i.sampling import Sampler, generate
from t2i.wavefronts import wavefront_sizes
from t2i.zipar import generate_zipar, passes_needed

Variant = Literal["nar", "raster", "zipar", "naive"]
FLOOR = " floor"


@dataclass(frozen=True)
class DecodeRow:
    """What was measured of one variant; `timing.seconds` is of one batch, `floor` of its products alone."""

    size: str
    grid: int
    batch: int
    variant: str
    passes: int
    tokens_per_s: float
    timing: Timing
    floor: Timing | None
    gflop: float | None
    same_tokens: float | None
    """Share of the published way's tokens that are ours."""

    @property
    def name(self) -> str:
        return f"{self.size} {self.grid}x{self.grid}, batch {self.batch}, {self.variant}"


def random_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> NAR:
    """A model with random weights, its heads too."""
    torch.manual_seed(0)
    with torch.device(device):
        model = NAR(config).to(dtype)
    torch.nn.init.normal_(model.heads.weight, std=config.init_std)
    return model.eval()


def bench_decode(
    sizes: Sequence[str],
    grids: Sequence[int],
    batches: Sequence[int],
    variants: Sequence[Variant],
    *,
    guidance_scale: float,
    caption: int,
    window: int | None,
    repeats: int,
    device: torch.device,
    dtype: torch.dtype,
    json: bool,
) -> list[DecodeRow]:
    """Measure every combination and print one table, or JSON.

    `caption` is in tokens; `window` is ZipAR's, half a row where not given. Raises ValueError for sizes that do not exist
    and numbers that cannot be.
    """
    if unknown := [size for size in sizes if size not in PRESETS]:
        raise ValueError(f"no size {unknown[0]!r}; sizes are {', '.join(PRESETS)}")
    if min(*grids, *batches, repeats, caption) < 1:
        raise ValueError("grids, batches, repeats and the caption have to be at least 1")
    if not variants:
        raise ValueError("no variants; give at least one of nar, raster, zipar, naive")
    if (device.type != "cpu" or dtype != torch.float32) and "naive" in variants:
        raise ValueError(
            "the published way is computed in float32 on the processor only; leave `naive` out, or use --device cpu --dtype "
            "float32"
        )
    if caption > ModelConfig.max_condition:
        raise ValueError(f"a caption of {caption} tokens is longer than the {ModelConfig.max_condition} of the models")
    rows: list[DecodeRow] = []
    for size in sizes:
        for grid in grids:
            rows += _one_model(
                size, grid, batches, variants, guidance_scale=guidance_scale, caption=caption,
                window=window or max(1, grid // 2), repeats=repeats, device=device, dtype=dtype,
            )  # fmt: skip
    header = environment(device) | {"dtype": str(dtype).removeprefix("torch."), "guidance": guidance_scale}
    header |= {"caption": f"{caption} tokens", "repeats": repeats, "ZipAR window": window or "half a row"}
    if json:
        print(as_json(header, rows))
    else:
        report("t2i bench decode", header, rows, COLUMNS)
    return rows


COLUMNS: dict[str, Callable[[DecodeRow], str]] = {
    "model, grid, batch, variant": lambda r: r.name,
    "passes": lambda r: str(r.passes),
    "seconds": lambda r: f"{r.timing.median:.2f}",
    "fastest to slowest": lambda r: f"{min(r.timing.seconds):.2f} to {max(r.timing.seconds):.2f}",
    "tokens/s": lambda r: f"{r.tokens_per_s:.1f}",
    "floor": lambda r: "-" if r.floor is None else f"{r.floor.median:.2f}",
    "of the floor": lambda r: "-" if r.floor is None else f"{r.timing.median / r.floor.median:.2f}",
    "GFLOP/s": lambda r: "-" if r.gflop is None else f"{r.gflop / r.timing.median:.0f}",
    "MiB beyond weights": lambda r: mebibytes(r.timing.extra),
    "same tokens": lambda r: "-" if r.same_tokens is None else f"{r.same_tokens:.1%}",
}


def _one_model(
    size: str, grid: int, batches: Sequence[int], variants: Sequence[Variant], *, guidance_scale: float, caption: int,
    window: int, repeats: int, device: torch.device, dtype: torch.dtype,
) -> list[DecodeRow]:  # fmt: skip
    config = replace(PRESETS[size](), grid=(grid, grid))
    raster = replace(config, order="raster")
    models = {
        kind: random_model(kind, device, dtype)
        for kind, users in ((config, {"nar", "naive"}), (raster, {"raster", "zipar"}))
        if users & set(variants)
    }
    for model in models.values():
        model.pack()
    naive = NaiveNAR(models[config]) if "naive" in variants else None
    passes = {
        "nar": len(wavefront_sizes(config.schedule)), "naive": len(wavefront_sizes(config.schedule)),
        "raster": len(wavefront_sizes(raster.schedule)), "zipar": passes_needed(grid, grid, window),
    }  # fmt: skip
    rows = []
    for batch in batches:
        generator = torch.Generator().manual_seed(1)
        states = torch.randn(batch, caption, config.condition_dim, generator=generator).to(device, dtype)
        mask = torch.ones(batch, caption, dtype=torch.bool, device=device)
        options: dict[str, Any] = {"guidance_scale": guidance_scale, "seeds": range(batch)}
        drawn: dict[str, Tensor] = {}
        ways: dict[str, Callable[[], Tensor]] = {
            "nar": lambda: generate(models[config], states, mask, **options),  # noqa: B023  (used before the next batch)
            "raster": lambda: generate(models[raster], states, mask, **options),  # noqa: B023
            "zipar": lambda: generate_zipar(models[raster], states, mask, window=window, **options),  # noqa: B023
        }
        if naive is not None:
            ways["naive"] = lambda: naive.generate(states, mask, Sampler(batch, device, **options))  # noqa: B023
        runs: dict[str, Callable[[], object]] = {}
        floors: dict[str, Products] = {}
        for variant in variants:
            model = models[raster if variant in ("raster", "zipar") else config]
            runs[variant] = ways[variant]
            if variant == "naive":
                drawn[variant] = ways[variant]()  # this also warms up
                continue
            with torch.no_grad(), Products(list(model.parameters())) as products:
                drawn[variant] = ways[variant]()
            if products.products:  # attention on a GPU is another operation
                floors[variant] = products
                runs[variant + FLOOR] = products.repeat
        timings = alternate(runs, repeats, device, f"{size} {grid}x{grid} batch {batch}")
        for variant in variants:
            timing, products_of = timings[variant], floors.get(variant)
            same = None
            if variant == "naive" and "nar" in drawn:
                same = float((drawn["naive"] == drawn["nar"]).float().mean())
            rows.append(
                DecodeRow(
                    size, grid, batch, variant, passes[variant], batch * grid * grid / timing.median, timing,
                    timings.get(variant + FLOOR), None if products_of is None else products_of.flops / 1e9, same,
                )
            )  # fmt: skip
    return rows
