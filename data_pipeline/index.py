"""Index and verify a folder of image-text tars: `t2i data index FOLDER`.

Two kinds of webdataset shards:

- raw: `KEY.{jpg,jpeg,png,webp}` and a caption in `KEY.txt` or a field of `KEY.json`, optionally a class in
  `KEY.cls`;
- encoded (see `data_pipeline.encode`): `KEY.codes.npy`, `KEY.txt`, optionally `KEY.cls`,
  `KEY.states.safetensors`.

Indexing reads every sample once and leaves, beside each `NAME.tar`, `NAME.tar.idx.npz` (where the good
samples' members lie), and at the root `manifest.json` (shards, counts, sizes, checksums) and
`quarantine.jsonl` (each sample set aside, with its cause). `ShardSet` then reads any sample with one `pread`.
"""

import multiprocessing
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipeline.atomic import remove_leftovers
from data_pipeline.manifest import (
    Manifest,
    ShardInfo,
    count_causes,
    load_manifest,
    load_quarantine,
    print_table,
    save_manifest,
)
from data_pipeline.shard_index import Rejected, Settings, ShardIndex, load_current, save_shard_index
from data_pipeline.shard_set import EncodedSample, RawSample, ShardSet
from data_pipeline.tars import tar_names
from data_pipeline.verify import CAUSES, verify_shard

__all__ = [
    "CAUSES",
    "EncodedSample",
    "Manifest",
    "RawSample",
    "Rejected",
    "ShardInfo",
    "ShardSet",
    "build_index",
    "find_shards",
    "index_shard",
    "load_manifest",
    "load_quarantine",
    "print_table",
]


def build_index(
    root: Path, *, caption_key: str = "caption", min_size: int = 16, progress: bool = True, workers: int = 1
) -> Manifest:
    """Verify every sample of every tar under `root` and write the index; returns the manifest.

    `caption_key`: with `caption`, KEY.txt or else that field of KEY.json; any other name reads only that
    field. `min_size`: pixels of the shorter side below which a picture is set aside. `workers`: processes, a
    shard each. A shard that is unchanged since it was last indexed with the same settings is not read again,
    so an interrupted indexing continues where it stopped. Keys are unique in the set: of several samples with
    one key, the first (by shard name, then place in the tar) is kept. Raises ValueError when `root` holds no
    tars, or raw and encoded or differently encoded shards together.
    """
    root = Path(root)
    names = find_shards(root)
    remove_leftovers(root)
    settings = Settings(caption_key, min_size)
    indexes: dict[str, ShardIndex] = {}
    with tqdm(total=len(names), desc="index", unit="shard", disable=not progress) as bar:
        for index in _each_index(root, names, settings, workers):
            indexes[index.name] = index
            bar.update()
    ordered = [indexes[name] for name in names]
    encoding = _one_encoding(root, ordered)
    ordered, repeated = _mark_duplicates(root, ordered)
    rejected = [entry for index in ordered for entry in (*index.rejected, *repeated.get(index.name, []))]
    shards = tuple(
        ShardInfo(i.name, int((~i.duplicate_N).sum()), i.read, i.bytes, i.mtime_ns, i.sha256) for i in ordered
    )
    manifest = Manifest(
        kind="raw" if encoding is None else "encoded",
        settings=settings,
        members=_count_members(ordered),
        shards=shards,
        samples=sum(shard.samples for shard in shards),
        read=sum(shard.read for shard in shards),
        quarantined=count_causes(rejected),
        ignored=sum(index.ignored for index in ordered),
        encoding=encoding,
        reused=sum(index.reused for index in ordered),
    )
    save_manifest(root, manifest, rejected)
    return manifest


def find_shards(root: Path) -> list[str]:
    """Names, relative to `root` and sorted, of the tars under it. Raises ValueError when there are none."""
    if not root.is_dir():
        raise ValueError(f"{root} is not a folder: give the one that holds the tars")
    names = tar_names(root)
    if not names:
        packed = [path.name for pattern in ("*.tar.gz", "*.tgz", "*.tar.zst") for path in root.rglob(pattern)]
        hint = f"unpack {min(packed)} and its like, compressed tars cannot be read at random" if packed else (
            "make some with `t2i data ingest` or `t2i data shapes`"
        )  # fmt: skip
        raise ValueError(f"{root} has no .tar files: {hint}")
    return names


def _each_index(root: Path, names: list[str], settings: Settings, workers: int) -> Iterator[ShardIndex]:
    if workers <= 1 or len(names) == 1:
        yield from (index_shard(root, name, settings) for name in names)
        return
    # Spawned, because forking a process in which torch has started its threads can hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(names)), mp_context=context) as pool:
        futures = [pool.submit(index_shard, root, name, settings) for name in names]
        try:
            yield from (future.result() for future in as_completed(futures))
        finally:
            pool.shutdown(cancel_futures=True)


def index_shard(root: Path, name: str, settings: Settings) -> ShardIndex:
    """The index of one shard of a set: the one beside it if that is still right, else made by reading the
    shard.
    """
    tar = root / name
    index = load_current(tar, name, settings)
    if index is None:
        index = verify_shard(tar, name, settings)
        save_shard_index(tar, index)
    return index


def _one_encoding(root: Path, indexes: list[ShardIndex]) -> dict[str, Any] | None:
    first = indexes[0]
    for other in indexes:
        if (first.encoding is None) != (other.encoding is None):
            raise ValueError(f"{root} mixes raw and encoded shards ({first.name}, {other.name}): keep them apart")
        if first.encoding != other.encoding:
            raise ValueError(f"{first.name} and {other.name} of {root} were encoded differently: keep them apart")
    return first.encoding


def _count_members(indexes: list[ShardIndex]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for index in indexes:
        has_NM = index.offsets_NM[~index.duplicate_N] >= 0
        counts.update(dict(zip(index.suffixes, has_NM.sum(0).tolist(), strict=True)))
    return {suffix: counts[suffix] for suffix in sorted(counts) if counts[suffix]}


def _mark_duplicates(root: Path, indexes: list[ShardIndex]) -> tuple[list[ShardIndex], dict[str, list[Rejected]]]:
    """Find samples whose key an earlier shard has; returns the indexes with `duplicate_N` up to date, and the samples by
    shard.

    Keys are compared by 64-bit hash first, so that a set of millions needs no dictionary of strings.
    """
    hashes = [np.array([hash(key) for key in index.all_keys()], np.int64) for index in indexes]
    every = np.concatenate(hashes)
    _, inverse, counts = np.unique(every, return_inverse=True, return_counts=True)
    suspect = counts[inverse] > 1
    seen: dict[str, str] = {}
    repeated: dict[str, list[Rejected]] = {}
    marked: list[ShardIndex] = []
    start = 0
    for index in indexes:
        duplicate_N = np.zeros(len(index.key_ends_N), bool)
        for row in np.flatnonzero(suspect[start : start + len(duplicate_N)]):
            key = index.key(int(row))
            if seen.setdefault(key, index.name) != index.name:
                duplicate_N[row] = True
                entry = Rejected(key, index.name, "duplicate_key", f"the first is in shard {seen[key]}")
                repeated.setdefault(index.name, []).append(entry)
        start += len(duplicate_N)
        if not np.array_equal(duplicate_N, index.duplicate_N):
            index = index.with_duplicates(duplicate_N)
            save_shard_index(root / index.name, index)
        marked.append(index)
    return marked, repeated
