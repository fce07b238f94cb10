"""The embedded data set as raw webdataset tars: what `t2i data shapes` writes.

    t2i data shapes --out data/shapes                          # pictures of one to four shapes, for text models
    t2i data shapes --out data/shapes-classes --single-object  # of one shape, whose kind is the class
    t2i data shapes --out data/shapes-clips --frames 4         # clips of one moving shape; the class says which and whither

Every sample has its picture, a caption (`KEY.txt`) and a class (`KEY.cls`); pictures also have GenEval's metadata
(`KEY.json`).
"""

import io
import json
import math
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from data_pipeline.atomic import remove_leftovers, replacing, write_bytes
from data_pipeline.clips import check_frames, clip_sample
from data_pipeline.images import animation
from data_pipeline.manifest import remove_manifest
from data_pipeline.shapes import ShapesSample, label_of, single_object_sample, training_sample
from data_pipeline.tars import tar_names

FRAME_MS = 250
"""How long a frame of a clip is shown, in milliseconds."""

Members = Iterator[tuple[str, bytes]]


def _picture_members(make: Callable[[int, int], ShapesSample], seed: int, index: int) -> Members:
    sample = make(seed, index)
    picture = io.BytesIO()
    Image.fromarray(sample.image).save(picture, "png", compress_level=1)
    yield f"{index:08d}.png", picture.getvalue()
    yield f"{index:08d}.txt", sample.caption.encode()
    # The shape as the class: what class-conditional runs on this data train with.
    yield f"{index:08d}.cls", str(label_of(sample)).encode()
    yield f"{index:08d}.json", json.dumps(sample.metadata).encode()


def _clip_members(frames: int, seed: int, index: int) -> Members:
    sample = clip_sample(seed, index, frames)
    yield f"{index:08d}.webp", animation([Image.fromarray(frame) for frame in sample.frames], "WEBP", FRAME_MS)
    yield f"{index:08d}.txt", sample.caption.encode()
    yield f"{index:08d}.cls", str(sample.label).encode()


def _shard_path(out: Path, shard: int) -> Path:
    return out / f"shapes-{shard:06d}.tar"


def _write_shard(
    out: Path, members: Callable[[int, int], Members], seed: int, samples: int, shard_size: int, shard: int
) -> int:
    """Write one tar whole, unless it is there; returns its number of samples."""
    first, last = shard * shard_size, min(samples, (shard + 1) * shard_size)
    path = _shard_path(out, shard)
    if not path.exists():
        with replacing(path) as stream, tarfile.open(fileobj=stream, mode="w") as tar:
            for index in range(first, last):
                for name, data in members(seed, index):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return last - first


def write_shards(
    out: Path,
    samples: int,
    seed: int = 0,
    shard_size: int = 1000,
    workers: int = 2,
    *,
    single_object: bool = False,
    frames: int | None = None,
) -> None:
    """Write the data set as raw webdataset tars, `shard_size` samples each: `KEY.png`, `.txt`, `.cls` and `.json`.

    With `single_object`, pictures of one shape; with `frames`, clips of so many frames as animated `KEY.webp`, without
    `.json`. Finished tars are kept, so an interrupted call goes on where it stopped. Raises ValueError for numbers below
    one, clips that cannot be made, and where `out` holds a set that was made with other numbers, or other tars.
    """
    if min(samples, shard_size, workers) < 1:
        raise ValueError(f"samples ({samples}), shard size ({shard_size}) and workers ({workers}) must be at least 1")
    wanted: dict[str, Any] = {"samples": samples, "seed": seed, "shard_size": shard_size}
    members: Callable[[int, int], Members]
    if frames is not None:
        if single_object:
            raise ValueError("clips are of one object anyway; give --frames or --single-object, not both")
        check_frames(frames)
        wanted["frames"] = frames
        members = partial(_clip_members, frames)
    else:
        if single_object:
            wanted["single_object"] = True
        members = partial(_picture_members, single_object_sample if single_object else training_sample)
    out.mkdir(parents=True, exist_ok=True)
    recorded = out / "shapes.json"
    if recorded.exists():
        earlier = recorded.read_text(errors="replace")
        if earlier != json.dumps(wanted):
            raise ValueError(f"{out} holds shapes made with {earlier}, not {json.dumps(wanted)}; choose another folder")
    elif others := tar_names(out):
        raise ValueError(f"{out / others[0]} was not made by this command; choose another folder")
    write_bytes(recorded, json.dumps(wanted).encode())
    remove_leftovers(out)
    shards = math.ceil(samples / shard_size)
    if not all(_shard_path(out, shard).exists() for shard in range(shards)):
        remove_manifest(out)
    write = partial(_write_shard, out, members, seed, samples, shard_size)
    with ProcessPoolExecutor(workers) as pool, tqdm(total=samples, desc="shapes", unit="sample") as bar:
        for count in pool.map(write, range(shards)):
            bar.update(count)
