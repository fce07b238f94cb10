"""What the index of a large set takes: memory, and time from opening it to the first batch of a run that resumes.

t2i bench loader --caches --simulate 27
"""

import gc
import statistics
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import trange

from data_pipeline.index import ShardSet
from data_pipeline.loader import BatchLoader, LaneOrder, collate_codes
from data_pipeline.manifest import MANIFEST
from data_pipeline.shard_index import index_path
from t2i.bench import page_cache

Cache = Literal["warm", "cold"]
RESUMED_EPOCH = 3
"""Simulated runs resume at the last batch of this epoch, the first being 1."""


@dataclass(frozen=True)
class IndexRow:
    """What the index of a set of `samples` samples takes; seconds of each run."""

    samples: int
    shards: int
    size: int
    """Bytes of its tars."""
    memory: int
    """Bytes that an open set holds once every shard was touched."""
    open_warm: tuple[float, ...]
    first_batch_warm: tuple[float, ...]
    """From opening the set to the batch, opening included."""
    processor_warm: tuple[float, ...]
    """Of that, seconds of the processor, all threads together: waiting for them excluded."""
    open_cold: tuple[float, ...]
    first_batch_cold: tuple[float, ...]
    processor_cold: tuple[float, ...]


COLUMNS: dict[str, Callable[[IndexRow], str]] = {
    "samples": lambda r: f"{r.samples:,}",
    "GiB of tars": lambda r: f"{r.size / 2**30:.1f}",
    "shards": lambda r: f"{r.shards:,}",
    "memory, MiB": lambda r: f"{r.memory / 2**20:,.0f}",
    "per million samples": lambda r: f"{r.memory / 2**20 / (r.samples / 1e6):.1f}",
    "seconds to open": lambda r: f"{statistics.median(r.open_warm):.3f}",
    "to the first batch": lambda r: f"{statistics.median(r.first_batch_warm):.3f}",
    "processor time": lambda r: f"{statistics.median(r.processor_warm):.3f}",
    "to open, cold": lambda r: f"{statistics.median(r.open_cold):.3f}",
    "to the first batch, cold": lambda r: f"{statistics.median(r.first_batch_cold):.3f}",
    "processor time, cold": lambda r: f"{statistics.median(r.processor_cold):.3f}",
}


def files_of(root: Path) -> list[Path]:
    """Manifest, tars and indexes of a set."""
    tars = [root / shard.name for shard in ShardSet(root).manifest.shards]
    return [root / MANIFEST, *tars, *map(index_path, tars)]


def index_row(root: Path, batch: int, lanes: int, workers: int, repeats: int) -> IndexRow:
    """Measure the encoded set at `root`: its memory once, then opening and resuming, cold and warm in turn."""
    held = memory(root)
    files = files_of(root)
    opened: dict[Cache, list[float]] = {"cold": [], "warm": []}
    first: dict[Cache, list[float]] = {"cold": [], "warm": []}
    processor: dict[Cache, list[float]] = {"cold": [], "warm": []}
    for _ in trange(repeats, desc="resume", unit="run", leave=False):
        page_cache.drop(files)
        for cache in opened:  # the first run leaves in memory what the second needs
            begun, begun_processor = time.perf_counter(), time.process_time()
            found = ShardSet(root)
            opened[cache].append(time.perf_counter() - begun)
            order = LaneOrder(0, len(found), lanes)
            step = RESUMED_EPOCH * len(found) // batch - 1
            with BatchLoader(found, order, batch, 0, 1, step, collate_codes, workers=workers) as loader:
                next(loader)
                first[cache].append(time.perf_counter() - begun)
                processor[cache].append(time.process_time() - begun_processor)
    manifest = ShardSet(root).manifest
    size = sum(shard.bytes for shard in manifest.shards)
    return IndexRow(
        manifest.samples, len(manifest.shards), size, held,
        *(tuple(of[cache]) for cache in ("warm", "cold") for of in (opened, first, processor)),
    )  # fmt: skip


def memory(root: Path) -> int:
    """Bytes that the set at `root` holds once every shard was touched, as Python and numpy count them."""
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
