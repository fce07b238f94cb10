"""How fast encoded samples come off a disk, by our loader and by plain webdataset, and what the index of a large set takes.

    t2i bench loader --workers 1 2

Both read the same tars and give the same samples, decoded and joined by the same functions. Ours goes through index and step,
in threads, in an order that resumes anywhere; webdataset from the start of each tar to its end, in the worker processes of
torch's DataLoader, with shards and a buffer of samples shuffled.
"""

import hashlib
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import webdataset

from data_pipeline.index import EncodedSample, ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.shard_set import encoded_sample
from t2i.bench import large_sets, page_cache
from t2i.bench.large_sets import Cache, files_of
from t2i.bench.measure import alternate, as_json, environment, report
from t2i.bench.sets import simulate_set, write_set

Batches = Iterator[dict[str, Any]]
Ways = dict[str, tuple[str, int, Callable[[], Batches]]]
"""By name: variant, workers, and what starts an epoch."""
CPU = torch.device("cpu")


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


def contents(batches: Batches) -> Counter[bytes]:
    """How often each sample came, by a digest of its codes, caption, class and text states."""
    found: Counter[bytes] = Counter()
    for joined in batches:
        codes, labels, states = joined["codes"].numpy(), joined["labels"], joined["states"]
        for n, caption in enumerate(joined["captions"]):
            label = None if labels is None else int(labels[n])
            shape = None if states is None else tuple(states[n].shape)
            digest = hashlib.blake2b(repr((caption, label, codes[n].shape, shape)).encode(), digest_size=16)
            digest.update(codes[n].tobytes())
            digest.update(b"" if states is None else states[n].view(torch.int16).numpy().tobytes())
            found[digest.digest()] += 1
    return found


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
) -> tuple[list[LoaderRow], list[large_sets.IndexRow]]:
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
    count, shards = samples, -(-samples // shard_samples)
    if data is not None:
        manifest = ShardSet(data).manifest
        count, shards = manifest.samples, len(manifest.shards)
        if manifest.kind != "encoded":
            raise ValueError(f"{data} holds raw pictures; give a set that `t2i encode` made of it")
        if manifest.quarantined:
            raise ValueError(
                f"{data} has quarantined samples, which plain webdataset would read; give a set without any"
            )
        if (labelled := manifest.members.get("cls", 0)) not in (0, count):
            raise ValueError(
                f"{labelled} of {count} samples of {data} have classes; give a set where all have, or none"
            )
    if caches and shards < max(workers):
        raise ValueError(f"{shards} shards are fewer than {max(workers)} workers, and webdataset gives each its own")
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
            ways: Ways = {}
            for n in workers:
                ways[f"ours {n}"] = ("ours", n, partial(ours, root, batch, lanes, n))
                ways[f"webdataset {n}"] = ("webdataset", n, partial(plain_webdataset, root, batch, buffer, n))
            _refuse_differences(root, batch, ways)
            for cache in caches:
                header |= {"in memory when cold": f"{_forgotten(root):.1%}"} if cache == "cold" else {}
                rows += _reading(root, ways, cache, repeats)
        for millions in simulate:
            with tempfile.TemporaryDirectory(dir=folder) as inner:
                simulate_set(Path(inner), round(millions * 1e6), shard_samples, grid)
                large.append(large_sets.index_row(Path(inner), batch, lanes, max(workers), repeats))
    if json:
        print(as_json(header, rows, index=large))
        return rows, large
    if rows:
        report("t2i bench loader", header, rows, COLUMNS)
    if large:
        about = {"tars": f"links to one of {shard_samples:,} samples", "batch": batch, "lanes": lanes}
        about |= {"threads": max(workers), "resumed at": f"the last batch of epoch {large_sets.RESUMED_EPOCH}"}
        report("index of large sets", about if rows else header | about, large, large_sets.COLUMNS)
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


def _described(shards: ShardSet) -> dict[str, Any]:
    manifest = shards.manifest
    size = sum(shard.bytes for shard in manifest.shards)
    return {"samples": f"{len(shards):,}", "shards": len(manifest.shards), "bytes a sample": round(size / len(shards))}


def _forgotten(root: Path) -> float:
    """Share of the set that stays in memory all the same."""
    page_cache.drop(files_of(root))
    return page_cache.share_in_memory(files_of(root))


def _refuse_differences(root: Path, batch: int, ways: Ways) -> None:
    """Read an epoch in every way and compare what came; this also warms up."""
    count = len(ShardSet(root))
    whole: Counter[bytes] = Counter()
    for variant, n, begin in reversed(ways.values()):
        found = contents(begin())
        whole = whole or found
        wanted = count // batch * batch if variant == "ours" else count
        assert found.total() == wanted, f"{variant}, {n} gave {found.total()} samples in place of {wanted}"
        assert found <= whole, f"{variant}, {n} gave {(found - whole).total()} samples that webdataset did not"


def _reading(root: Path, ways: Ways, cache: Cache, repeats: int) -> list[LoaderRow]:
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

    variants = {name: partial(measured, name, begin) for name, (_, _, begin) in ways.items()}
    shards = ShardSet(root)
    files = files_of(root)
    alternate(variants, repeats, CPU, cache, partial(page_cache.drop, files if cache == "cold" else []))
    size = sum(shard.bytes for shard in shards.manifest.shards)
    rows = {}
    for name, (variant, n, _) in ways.items():
        first, seconds, counts = zip(*runs[name], strict=True)
        rate = statistics.median(count / s for _, s, count in runs[name])
        share = rate / len(shards)
        rows[name] = LoaderRow(
            variant, n, cache, rate, share * len(shards.manifest.shards), share * size / 2**20, first, seconds, counts[0]
        )  # fmt: skip
    for n in {n for _, n, _ in ways.values()}:
        times = rows[f"ours {n}"].samples_per_s / rows[f"webdataset {n}"].samples_per_s
        rows[f"ours {n}"] = replace(rows[f"ours {n}"], of_webdataset=times)
    return list(rows.values())
