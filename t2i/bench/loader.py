"""How fast encoded samples come off a disk, by our loader and by plain webdataset, and what the index of a large set takes.

    t2i bench loader --samples 40000 --workers 1 2

Both read the same tars and give the same samples, decoded and joined by the same functions. Ours goes through index and step,
in threads, in an order that resumes anywhere; webdataset from the start of each tar to its end, in the worker processes of
torch's DataLoader, with shards and a buffer of samples shuffled.
"""

import gc
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import webdataset
from tqdm import trange

from data_pipeline.index import EncodedSample, ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.manifest import MANIFEST
from data_pipeline.shard_index import index_path
from data_pipeline.shard_set import encoded_sample
from t2i.bench import page_cache
from t2i.bench.measure import alternate, as_json, environment, report
from t2i.bench.sets import simulate_set, write_set

Cache = Literal["warm", "cold"]
Batches = Iterator[dict[str, Any]]
CPU = torch.device("cpu")
RESUMED_EPOCH = 3
"""Simulated runs resume at the last batch of this epoch, the first being 1."""


@dataclass(frozen=True)
class LoaderRow:
    """What was measured of one way to read; `first_batch` and `seconds` are of each run."""

    variant: str
    workers: int
    cache: Cache
    samples_per_s: float
    """Median over the runs, from the first batch to the last."""
    shards_per_s: float
    mib_per_s: float
    """Of the tars."""
    first_batch: tuple[float, ...]
    """Seconds from making the loader to its first batch."""
    seconds: tuple[float, ...]
    """From there to the last."""
    samples: int
    """Samples in that time."""
    of_webdataset: float | None = None
    """Samples per second over those of webdataset with as many workers."""


@dataclass(frozen=True)
class IndexRow:
    """What the index of a set of `samples` samples takes; seconds of each run."""

    samples: int
    shards: int
    memory: int
    """Bytes that an open set holds once every shard was touched."""
    open_warm: tuple[float, ...]
    first_batch_warm: tuple[float, ...]
    """From opening the set to the batch, opening included."""
    open_cold: tuple[float, ...]
    first_batch_cold: tuple[float, ...]


def ours(root: Path, batch: int, lanes: int, workers: int) -> Batches:
    """One epoch through index and step, in whole batches, read by so many threads."""
    shards = ShardSet(root)
    order = LaneOrder(0, len(shards) // batch * batch, lanes)
    with BatchLoader(shards, order, batch, 0, 1, 0, collate_codes, workers=workers) as loader:
        for _ in range(len(order) // batch):
            yield next(loader)[1]


def plain_webdataset(root: Path, batch: int, buffer: int, workers: int) -> Batches:
    """One epoch of webdataset in its usual form, read by so many processes."""
    tars = [str(root / shard.name) for shard in ShardSet(root).manifest.shards]
    samples = webdataset.WebDataset(tars, shardshuffle=len(tars), seed=0).shuffle(buffer).map(_decoded)
    batches = samples.batched(batch, collation_fn=collate_codes)
    yield from webdataset.WebLoader(batches, batch_size=None, num_workers=workers)


def _decoded(sample: dict[str, Any]) -> EncodedSample:
    return encoded_sample(sample["__key__"], sample)


def bench_loader(
    data: Path | None,
    *,
    samples: int,
    shard_samples: int,
    grid: int,
    states_dim: int,
    batch: int,
    lanes: int,
    workers: Sequence[int],
    caches: Sequence[Cache],
    buffer: int,
    simulate: Sequence[float],
    repeats: int,
    json: bool,
) -> tuple[list[LoaderRow], list[IndexRow]]:
    """Measure reading, then the index, and print two tables, or JSON.

    `data` is an encoded set; without it one is made, of `samples` samples in shards of `shard_samples`, with codes
    [grid, grid] and, unless `states_dim` is 0, text states of so many channels. `buffer` is webdataset's, in samples.
    `simulate` has the sizes, in millions of samples, of sets that have an index and data for one shard only. Raises
    ValueError for numbers that cannot be, and for `data` that is no encoded set or has fewer than three batches.
    """
    if not workers or min(samples, shard_samples, grid, batch, lanes, repeats, *workers) < 1:
        raise ValueError("samples, shard samples, grid, batch, lanes, workers and repeats have to be at least 1")
    if min(states_dim, buffer, *simulate, 0) < 0:
        raise ValueError("the channels of text states, the shuffle buffer and simulated sizes have to be at least 0")
    count, kind = samples, "encoded"
    if data is not None:
        manifest = ShardSet(data).manifest
        count, kind = manifest.samples, manifest.kind
    if kind != "encoded":
        raise ValueError(f"{data} holds raw pictures; give a set that `t2i encode` made of it")
    if caches and count < 3 * batch:
        raise ValueError(
            f"{count} samples are fewer than three batches of {batch}; give a larger set or a smaller batch"
        )
    LaneOrder(0, max(count, lanes), lanes).check(batch)
    rows: list[LoaderRow] = []
    header = environment(CPU) | {
        "webdataset": webdataset.__version__,
        "batch": batch,
        "lanes": lanes,
        "repeats": repeats,
    }
    large = []
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as folder:
        if caches:
            root = data or Path(folder) / "set"
            if data is None:
                write_set(root, samples, shard_samples, grid, states_dim)
            header |= _described(ShardSet(root)) | {"shuffle buffer": buffer}
            for cache in caches:
                header |= {"in memory when cold": f"{_forgotten(root):.1%}"} if cache == "cold" else {}
                rows += _reading(root, batch, lanes, workers, cache, buffer, repeats)
        for millions in simulate:
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                simulate_set(Path(inner), round(millions * 1e6), shard_samples, grid)
                large.append(_index_row(Path(inner), batch, lanes, max(workers), repeats))
    if json:
        print(as_json(header, rows, index=large))
        return rows, large
    if rows:
        report("t2i bench loader", header, rows, COLUMNS)
    if large:
        about = {"tars": f"links to one of {shard_samples:,} samples", "batch": batch, "lanes": lanes}
        about |= {"threads": max(workers), "resumed at": f"the last batch of epoch {RESUMED_EPOCH}"}
        report("index of large sets", about if rows else header | about, large, INDEX_COLUMNS)
    return rows, large


COLUMNS: dict[str, Callable[[LoaderRow], str]] = {
    "variant, workers, files": lambda r: f"{r.variant}, {r.workers}, {r.cache}",
    "samples/s": lambda r: f"{r.samples_per_s:,.0f}",
    "slowest to fastest": lambda r: f"{r.samples / max(r.seconds):,.0f} to {r.samples / min(r.seconds):,.0f}",
    "shards/s": lambda r: f"{r.shards_per_s:.2f}",
    "MiB/s": lambda r: f"{r.mib_per_s:.1f}",
    "first batch, s": lambda r: f"{statistics.median(r.first_batch):.3f}",
    "times webdataset": lambda r: "-" if r.of_webdataset is None else f"{r.of_webdataset:.2f}",
}

INDEX_COLUMNS: dict[str, Callable[[IndexRow], str]] = {
    "samples": lambda r: f"{r.samples:,}",
    "shards": lambda r: f"{r.shards:,}",
    "memory, MiB": lambda r: f"{r.memory / 2**20:,.0f}",
    "per million samples": lambda r: f"{r.memory / 2**20 / (r.samples / 1e6):.1f}",
    "seconds to open": lambda r: f"{statistics.median(r.open_warm):.3f}",
    "to the first batch": lambda r: f"{statistics.median(r.first_batch_warm):.3f}",
    "to open, cold": lambda r: f"{statistics.median(r.open_cold):.3f}",
    "to the first batch, cold": lambda r: f"{statistics.median(r.first_batch_cold):.3f}",
}


def _described(shards: ShardSet) -> dict[str, Any]:
    manifest = shards.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    return {"samples": f"{len(shards):,}", "shards": len(manifest.shards), "bytes a sample": round(size / len(shards))}


def _files(root: Path) -> list[Path]:
    tars = [root / shard.name for shard in ShardSet(root).manifest.shards]
    return [root / MANIFEST, *tars, *map(index_path, tars)]


def _forgotten(root: Path) -> float:
    """Share of the set that stays in memory all the same."""
    page_cache.drop(_files(root))
    return page_cache.share_in_memory(_files(root))


def _reading(
    root: Path, batch: int, lanes: int, workers: Sequence[int], cache: Cache, buffer: int, repeats: int
) -> list[LoaderRow]:
    runs: dict[str, list[tuple[float, float, int]]] = {}

    def measured(name: str, begin: Callable[[], Batches]) -> None:
        begun = first = last = time.perf_counter()
        count = 0
        for number, joined in enumerate(begin()):
            last = time.perf_counter()
            if number == 0:
                first = last
            else:
                count += len(joined["captions"])
        runs.setdefault(name, []).append((first - begun, last - first, count))

    ways: dict[str, tuple[str, int, Callable[[], Batches]]] = {}
    for n in workers:
        ways[f"ours {n}"] = ("ours", n, partial(ours, root, batch, lanes, n))
        ways[f"webdataset {n}"] = ("webdataset", n, partial(plain_webdataset, root, batch, buffer, n))
    variants = {name: partial(measured, name, begin) for name, (_, _, begin) in ways.items()}
    for run in variants.values():
        run()
    runs.clear()
    files = _files(root)
    alternate(variants, repeats, CPU, cache, partial(page_cache.drop, files if cache == "cold" else []))
    shards = ShardSet(root)
    size = sum(shard.bytes for shard in shards.manifest.shards)
    rows = {}
    for name, (variant, n, _) in ways.items():
        first, seconds, counts = zip(*runs[name], strict=True)
        rate = statistics.median(count / s for _, s, count in runs[name])
        share = rate / len(shards)
        rows[name] = LoaderRow(
            variant,
            n,
            cache,
            rate,
            share * len(shards.manifest.shards),
            share * size / 2**20,
            first,
            seconds,
            counts[0],
        )
    for n in workers:
        times = rows[f"ours {n}"].samples_per_s / rows[f"webdataset {n}"].samples_per_s
        rows[f"ours {n}"] = replace(rows[f"ours {n}"], of_webdataset=times)
    return list(rows.values())


def _index_row(root: Path, batch: int, lanes: int, workers: int, repeats: int) -> IndexRow:
    memory = _memory(root)
    files = _files(root)
    opened: dict[Cache, list[float]] = {"cold": [], "warm": []}
    first: dict[Cache, list[float]] = {"cold": [], "warm": []}
    samples = shards = 0
    for _ in trange(repeats, desc="resume", unit="run", leave=False):
        page_cache.drop(files)
        for cache in opened:  # the first run leaves in memory what the second needs
            begun = time.perf_counter()
            found = ShardSet(root)
            opened[cache].append(time.perf_counter() - begun)
            samples, shards = len(found), len(found.manifest.shards)
            order = LaneOrder(0, samples, lanes)
            step = RESUMED_EPOCH * samples // batch - 1
            with BatchLoader(found, order, batch, 0, 1, step, collate_codes, workers=workers) as loader:
                next(loader)
                first[cache].append(time.perf_counter() - begun)
    return IndexRow(
        samples,
        shards,
        memory,
        tuple(opened["warm"]),
        tuple(first["warm"]),
        tuple(opened["cold"]),
        tuple(first["cold"]),
    )


def _memory(root: Path) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        shards, start = ShardSet(root), 0
        for shard in shards.manifest.shards:
            shards.key(start)
            start += shard.samples
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
