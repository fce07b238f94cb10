"""What one process finds out by itself: versions, device, limits, files, shards."""

import hashlib
import json
import os
import platform
import resource
import shutil
import socket
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import numpy as np
import psutil
import torch

import t2i
from data_pipeline.manifest import Manifest
from data_pipeline.shard_index import load_shard_index
from data_pipeline.shard_set import ShardSet
from t2i.config import Recipe
from t2i.doctor.facts import Device, LocalFacts, Plan, ShardFacts

PACKAGES: Final = ("torch", "deepspeed", "transformers", "webdataset", "numpy", "safetensors", "nar-t2i")
VARIABLES: Final = ("NCCL_", "GLOO_", "TORCH_NCCL_", "UCX_", "FI_")
"""Beginnings of the names of variables that have to be alike on all hosts."""
_LISTED: Final = 5
_EDGE: Final = 4096


def gather_local(plan: Plan, device: Device, config_error: str | None, environ: Mapping[str, str]) -> LocalFacts:
    """All of it, for the rank that `environ` speaks of."""
    rank, ranks = int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1))
    shm = shutil.disk_usage("/dev/shm") if os.path.isdir("/dev/shm") else None
    return LocalFacts(
        rank=rank,
        ranks=ranks,
        local_ranks=int(environ.get("LOCAL_SIZE", ranks)),
        node=int(environ.get("CROSS_RANK", 0)),
        hostname=socket.gethostname(),
        versions=versions(),
        device=device,
        variables={
            name: value
            for name, value in sorted(environ.items())
            if name == "OMP_NUM_THREADS" or name.startswith(VARIABLES)
        },
        cores=len(os.sched_getaffinity(0)),
        memory=psutil.virtual_memory().available,
        open_files=_limit(resource.RLIMIT_NOFILE),
        locked_memory=_limit(resource.RLIMIT_MEMLOCK),
        shm_total=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        infiniband=any(Path("/sys/class/infiniband").glob("*")),
        files={str(path): _digest(path) for path in plan.files},
        config_error=config_error,
        init_error=_init_error(plan.recipe),
        data=look_at_shards(plan.recipe, rank, ranks),
    )


def this_device(kind: str | None = None) -> Device:
    """The accelerator of this process; `kind` is what the engine calls it, where that is known."""
    kind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind != "cuda":
        return Device(kind, kind, 1, 0, True)
    index = min(int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count() - 1)
    properties = torch.cuda.get_device_properties(index)
    return Device(kind, properties.name, torch.cuda.device_count(), properties.total_memory, properties.major >= 8)


def versions() -> dict[str, str]:
    """Versions of what a run's numbers depend on; of this project the files themselves, as it may be an edited checkout."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    found["CUDA"] = str(torch.version.cuda)
    if torch.cuda.is_available():
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    driver = Path("/proc/driver/nvidia/version")
    if driver.is_file():
        found["driver"] = driver.read_text().partition("\n")[0].strip()
    digest = hashlib.sha256()
    root = Path(t2i.__file__).parent.parent
    for package in ("t2i", "data_pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    found["source files"] = digest.hexdigest()[:12]
    return found


def look_at_shards(recipe: Recipe, rank: int, ranks: int) -> ShardFacts:
    """Every shard's size, as opening the set does, and the ends and index of those that this rank reads from."""
    root = recipe.data.path
    try:
        shards = ShardSet(root)
    except (ValueError, OSError) as error:
        return ShardFacts(None, str(error), 0, 0, _missing(root), ())
    needed = needed_shards(shards.manifest, recipe, rank, ranks)
    unreadable = []
    for number in needed:
        info = shards.manifest.shards[number]
        path = root / info.name
        try:
            with open(path, "rb") as file:
                file.read(_EDGE)
                file.seek(max(0, info.bytes - _EDGE))
                file.read(_EDGE)
            index = load_shard_index(path)
            if index is None or index.sha256 != info.sha256:
                unreadable.append(f"{info.name}: its index is missing or not of this set")
        except OSError as error:
            unreadable.append(f"{info.name}: {error.strerror}")
    return ShardFacts(
        shards.manifest.digest, None, len(shards.manifest.shards), len(needed), (), tuple(unreadable[:_LISTED])
    )


def needed_shards(manifest: Manifest, recipe: Recipe, rank: int, ranks: int) -> list[int]:
    """Numbers of the shards with samples of a rank's lanes or kept for validation; all where ranks do not share lanes."""
    ends = np.cumsum([shard.samples for shard in manifest.shards])
    train, lanes = max(0, manifest.samples - recipe.data.validation), recipe.data.lanes
    if lanes % ranks or train < lanes:
        return list(range(len(ends)))
    share = lanes // ranks
    spans = [
        (train * (rank * share) // lanes, train * ((rank + 1) * share) // lanes),
        (train, manifest.samples),
    ]
    found: set[int] = set()
    for start, end in spans:
        if end > start:
            first, last = np.searchsorted(ends, [start, end - 1], side="right")
            found |= set(range(int(first), int(last) + 1))
    return sorted(number for number in found if manifest.shards[number].samples)


def _missing(root: Path) -> tuple[str, ...]:
    """The shards of a set that cannot be opened which are not there, the first few; none where its manifest does not tell."""
    try:
        listed: Any = json.loads((root / "manifest.json").read_bytes())["shards"]
        names = [str(shard["name"]) for shard in listed]
    except (OSError, ValueError, KeyError, TypeError):
        return ()
    gone = [name for name in names if not (root / name).is_file()]
    return (*gone[:_LISTED], *([f"and {len(gone) - _LISTED} more"] if len(gone) > _LISTED else ()))


def _init_error(recipe: Recipe) -> str | None:
    source = recipe.train.init_from
    return None if source is None or Path(source).is_dir() else f"{source} (train.init_from) is no folder here"


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        return f"cannot be read: {error.strerror}"


def _limit(kind: int) -> int:
    soft = resource.getrlimit(kind)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft
