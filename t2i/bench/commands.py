"""`t2i bench decode`, `train`, `loader` and `headline`. Handlers import what they need when they run: help is quick."""

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


@bench.command(name="loader")
def bench_loader(
    data: Path | None = None,
    samples: int = 40_960,
    shard_samples: int = 10_240,
    grid: int = 16,
    states_dim: int = 0,
    batch: int = 256,
    lanes: int = 64,
    workers: tuple[int, ...] = (1, 2),
    caches: tuple[Literal["warm", "cold"], ...] = ("warm", "cold"),
    shuffle_buffer: int = 1000,
    simulate: tuple[float, ...] = (),
    repeats: int = 5,
    json: bool = False,
) -> None:
    """Time reading of encoded samples by our loader and by plain webdataset, alternately, and the index of large sets.

    Args:
        data: An encoded set to read; a made-up one in a temporary folder when not given.
        samples: Samples of the made-up set.
        shard_samples: Samples of its shards, and of those of simulated sets.
        grid: Tokens a side.
        states_dim: Channels of its text states, 10 to 40 tokens each; without any when 0. Each takes one of
            webdataset's file descriptors (`ulimit -n`) while its batch is on the way.
        batch: Samples of a batch.
        lanes: Parts of the set that our order reads side by side; a divisor of the batch.
        workers: Reader threads of ours, worker processes of webdataset; each number is measured.
        caches: With files in memory (warm), or forgotten before every run (cold); none leaves reading out.
        shuffle_buffer: Samples that webdataset shuffles at a time.
        simulate: Sizes, in millions of samples, of large sets whose index is made and measured (45 needs 4 GB of disk).
        repeats: Timed runs of each; the median is reported.
        json: Print JSON in place of the tables.
    """
    from t2i.bench.loader import bench_loader

    bench_loader(
        data, samples=samples, shard_samples=shard_samples, grid=grid, states_dim=states_dim, batch=batch, lanes=lanes,
        workers=workers, caches=caches, buffer=shuffle_buffer, simulate=simulate, repeats=repeats, json=json,
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
