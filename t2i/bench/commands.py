"""`t2i bench decode`, `train` and `headline`. Handlers import what they need when they run, so that help is quick."""

from pathlib import Path
from typing import Literal

from tyro.extras import SubcommandApp

bench = SubcommandApp()


@bench.command(name="decode")
def bench_decode(
    sizes: tuple[str, ...] = ("L", "XL"),
    grids: tuple[int, ...] = (16, 32),
    batches: tuple[int, ...] = (1, 8),
    variants: tuple[Literal["nar", "raster", "zipar", "naive"], ...] = ("nar", "raster", "zipar", "naive"),
    guidance_scale: float = 7.5,
    caption: int = 20,
    window: int | None = None,
    repeats: int = 3,
    threads: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str | None = None,
    json: bool = False,
) -> None:
    """Time decoding with random weights: NAR, raster, ZipAR and the published way, alternately.

    Args:
        sizes: Models: B, M, L, XL, XXL.
        grids: Tokens a side.
        batches: Pictures at once.
        variants: What to compare.
        guidance_scale: Strength of classifier-free guidance; 1 runs no unconditional branch.
        caption: Tokens of the captions.
        window: ZipAR's window; half a row when not given.
        repeats: Timed runs of each; the median is reported.
        threads: Of the processor; one for each core when not given.
        dtype: Of weights and activations.
        device: Where to run; the first GPU or the processor when not given.
        json: Print JSON in place of the table.
    """
    import torch

    from t2i.bench.decode import bench_decode
    from t2i.devices import choose_device

    _use_threads(threads)
    bench_decode(
        sizes, grids, batches, variants, guidance_scale=guidance_scale, caption=caption, window=window,
        repeats=repeats, device=choose_device(device), dtype=getattr(torch, dtype), json=json,
    )  # fmt: skip


@bench.command(name="train")
def bench_train(
    sizes: tuple[str, ...] = ("L",),
    grid: int = 16,
    batch: int = 8,
    caption: int = 20,
    repeats: int = 3,
    activation_checkpointing: bool = False,
    threads: int | None = None,
    device: str | None = None,
    json: bool = False,
) -> None:
    """Time forward and backward of a training step with random weights, and the published way beside it.

    Args:
        sizes: Models: B, M, L, XL, XXL.
        grid: Tokens a side.
        batch: Pictures of a step.
        caption: Tokens of the captions.
        repeats: Timed runs of each; the median is reported.
        activation_checkpointing: Measure that as well.
        threads: Of the processor; one for each core when not given.
        device: Where to run; the first GPU or the processor when not given.
        json: Print JSON in place of the table.
    """
    from t2i.bench.train import bench_train
    from t2i.devices import choose_device

    _use_threads(threads)
    bench_train(
        sizes, grid, batch, caption=caption, repeats=repeats, activation_checkpointing=activation_checkpointing,
        device=choose_device(device), json=json,
    )  # fmt: skip


@bench.command(name="headline")
def bench_headline(
    out: Path,
    ways: tuple[str, ...] = ("ZeRO 2, one rank", "ZeRO 3, two ranks"),
    batch: int = 1,
    json: bool = False,
) -> None:
    """Train, save, resume, export and sample NAR-XL with random weights here: memory and time. Half an hour, 50 GB of disk.

    Args:
        out: Folder for all of it, given again to go on with the same data.
        ways: Arrangements of ranks and ZeRO stage.
        batch: Pictures of a rank's micro-batch.
        json: Print JSON in place of the table.
    """
    from t2i.bench.headline import bench_headline

    bench_headline(out, ways, batch=batch, json_output=json)


def _use_threads(threads: int | None) -> None:
    import torch

    from t2i.threads import cores_per_rank

    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; use at least 1")
    torch.set_num_threads(threads or cores_per_rank())
