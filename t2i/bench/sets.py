"""Encoded sets to read from: small ones with random contents, and the index of one of any size around a single real shard.

Shape suffixes: L tokens of a caption, C channels.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_pipeline.encode import encoded_members
from data_pipeline.images import CROP_POLICY
from data_pipeline.index import Manifest, ShardInfo, build_index
from data_pipeline.manifest import save_manifest
from data_pipeline.shard_index import load_shard_index, pack_keys, save_shard_index
from data_pipeline.tars import ShardWriter
from data_pipeline.verify import ENCODING_RECORD

CODEBOOK = 16384
WORDS = (
    "a", "the", "of", "and", "with", "under", "beside", "red", "blue", "green", "yellow", "dark", "bright", "small", "large",
    "old", "wooden", "photo", "painting", "cat", "dog", "bird", "house", "tree", "river", "mountain", "street", "window",
)  # fmt: skip


def write_set(root: Path, samples: int, shard_samples: int, grid: int, states_dim: int, seed: int = 0) -> Manifest:
    """Write and index an encoded set: random codes [grid, grid], captions of 6 to 24 words, and, with `states_dim`, random
    text states of 10 to 40 tokens and so many channels."""
    encoding = {
        "tokenizer_sha256": "0" * 64, "text_encoder_sha256": "1" * 64 if states_dim else None, "crop": CROP_POLICY,
        "image_size": 16 * grid, "grid": [grid, grid], "codebook_size": CODEBOOK,
    }  # fmt: skip
    rng = np.random.default_rng(seed)
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=samples, desc="write a set", unit="sample", leave=False) as bar:
        for start in range(0, samples, shard_samples):
            with ShardWriter(
                root / _shard_name(start // shard_samples), {ENCODING_RECORD: json.dumps(encoding)}
            ) as writer:
                for number in range(start, min(start + shard_samples, samples)):
                    codes = rng.integers(CODEBOOK, size=(grid, grid))
                    caption = " ".join(rng.choice(WORDS, rng.integers(6, 25)))
                    length = int(rng.integers(10, 41))
                    states_LC = torch.randn(length, states_dim, generator=generator) if states_dim else None
                    writer.add(_key(number), encoded_members(codes, caption, None, states_LC))
                    bar.update()
    return build_index(root, progress=False)


def simulate_set(root: Path, samples: int, shard_samples: int, grid: int) -> Manifest:
    """An encoded set of which only one shard's data exist: its index has `samples` samples, under keys of their own.

    All shards are links to one tar, with random contents as in `write_set`; beside each lies an index of its own, as indexing
    would have written it. `samples` is rounded up to whole shards.
    """
    first = write_set(root, shard_samples, shard_samples, grid, 0).shards[0]
    index = load_shard_index(root / first.name)
    assert index is not None, "indexing has just written it"
    shards: list[ShardInfo] = []
    for number in tqdm(range(-(-samples // shard_samples)), desc="simulate a set", unit="shard", leave=False):
        name, start = _shard_name(number), number * shard_samples
        if number:
            os.link(root / first.name, root / name)
            keys_K, ends_N = pack_keys([_key(start + row) for row in range(shard_samples)])
            save_shard_index(root / name, replace(index, name=name, keys_K=keys_K, key_ends_N=ends_N))
        shards.append(replace(first, name=name))
    count = len(shards) * shard_samples
    manifest = Manifest(
        kind="encoded", settings=index.settings, members=dict.fromkeys(index.suffixes, count), shards=tuple(shards),
        samples=count, read=count, quarantined={}, ignored=0, encoding=index.encoding,
    )  # fmt: skip
    save_manifest(root, manifest, [])
    return manifest


def _shard_name(number: int) -> str:
    return f"{number:05d}.tar"


def _key(number: int) -> str:
    return f"{number:09d}"
