"""What the probe is told, what each rank finds out, and how that travels through the launcher's output.

Plain dataclasses, which go as JSON. Bytes and seconds throughout.
"""

import base64
import json
import os
import re
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from t2i.config import Recipe, from_json, to_json

MARK = "@t2i-doctor"
JOINING = "joining the process group"
"""A stage, at which it shows whether hosts reach each other."""
_CHUNK = 1500
"""Characters of a line: a write of less than 4,096 bytes to a pipe is not mixed with those of other ranks."""
_LINE = re.compile(rf"{MARK} (\d+) (\w+) (\d+)/(\d+) ([\w=-]*)")


@dataclass(frozen=True)
class Plan:
    """What to probe. `files` are the recipe's file, where it is one, and the DeepSpeed JSON; `mark` names this probe,
    which ends itself after `timeout` seconds."""

    recipe: Recipe
    deepspeed_config: Path
    files: tuple[Path, ...]
    mark: str
    timeout: float = 600.0
    write_bytes: int = 256 * 2**20
    reduce_bytes: int = 64 * 2**20


@dataclass(frozen=True)
class Device:
    """A rank's accelerator; `count` is how many this process can see, `memory` 0 for processors."""

    kind: str
    name: str
    count: int
    memory: int
    bf16: bool


@dataclass(frozen=True)
class ShardFacts:
    """How a rank sees the encoded set: digest of its manifest, or why there is none; shards that are not as indexed; and of
    the `needed` ones (its own lanes' and those kept for validation) what cannot be read, with the reason."""

    digest: str | None
    error: str | None
    shards: int
    needed: int
    missing: tuple[str, ...]
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class LocalFacts:
    """What a rank knows before it has met the others. `node` is the number of its host in the launcher's order; limits are
    -1 where there is none; `files` are SHA-256 of the plan's files, or why they cannot be read."""

    rank: int
    ranks: int
    local_ranks: int
    node: int
    hostname: str
    versions: dict[str, str]
    device: Device
    variables: dict[str, str]
    cores: int
    memory: int
    open_files: int
    locked_memory: int
    shm_total: int
    shm_free: int
    infiniband: bool
    files: dict[str, str]
    config_error: str | None
    init_error: str | None
    data: ShardFacts


@dataclass(frozen=True)
class Clock:
    """A host's clock minus that of the first rank's host, give or take `uncertainty`; and the fastest answer."""

    node: int
    offset: float
    uncertainty: float
    round_trip: float


@dataclass(frozen=True)
class GroupFacts:
    """What a rank found out together with the others.

    folder_error: why the run folder cannot be written or is another one than the first rank's. written, write_seconds: the
    file of a host's first rank. free, kept: of the run folder's file system, and in its checkpoints. wrong_sums: by size
    and type, how many numbers of an all-reduce were wrong. reduce_seconds: of one all-reduce of the plan's size. set_error:
    why the set, tokenizer, text encoder or earlier checkpoints do not fit (first rank). clocks: first rank.
    """

    rank: int
    folder_error: str | None
    written: int
    write_seconds: float
    free: int
    kept: int
    sums: int
    wrong_sums: dict[str, int]
    reduce_seconds: float
    set_error: str | None = None
    clocks: tuple[Clock, ...] = field(default=())


def pack(value: Any) -> str:
    """A dataclass as text without spaces, which launchers pass on as it is."""
    return base64.urlsafe_b64encode(zlib.compress(to_json(value).encode())).decode()


def unpack(kind: Any, text: str) -> Any:
    """The inverse of `pack`."""
    return from_json(kind, zlib.decompress(base64.urlsafe_b64decode(text)))


def send(rank: int, what: str, value: Any) -> None:
    """Write a dataclass, or a text, to the output of this process, for `Inbox` to find among other lines."""
    text = base64.urlsafe_b64encode(value.encode()).decode() if isinstance(value, str) else pack(value)
    parts = [text[start : start + _CHUNK] for start in range(0, len(text), _CHUNK)] or [""]
    for number, part in enumerate(parts, 1):
        os.write(1, f"{MARK} {rank} {what} {number}/{len(parts)} {part}\n".encode())


class Inbox:
    """Takes the launcher's output line by line: `stages`, `errors`, `local` and `group` by rank, and the other `lines`.

    `hosts` are the launcher's hosts with how many ranks each has, once it has said so.
    """

    def __init__(self) -> None:
        self.stages: dict[int, str] = {}
        self.errors: dict[int, str] = {}
        self.local: dict[int, LocalFacts] = {}
        self.group: dict[int, GroupFacts] = {}
        self.lines: list[str] = []
        self.hosts: dict[str, int] = {}
        self._parts: dict[tuple[int, str], dict[int, str]] = {}

    def take(self, line: str) -> None:
        """One line, in which a message may stand behind the name of a host."""
        found = _LINE.search(line)
        if found is None:
            if line.strip():
                self.lines.append(line.rstrip())
            if world := re.search(r"--world_info=([\w=-]+)", line):
                slots = json.loads(base64.urlsafe_b64decode(world[1]))
                self.hosts = {host: len(numbers) for host, numbers in slots.items()}
            return
        rank, what, number, count, part = int(found[1]), found[2], int(found[3]), int(found[4]), found[5]
        parts = self._parts.setdefault((rank, what), {})
        parts[number] = part
        if len(parts) < count:
            return
        text = "".join(parts[n] for n in range(1, count + 1))
        del self._parts[rank, what]
        if what == "local":
            self.local[rank] = unpack(LocalFacts, text)
        elif what == "group":
            self.group[rank] = unpack(GroupFacts, text)
        else:
            messages = self.errors if what == "error" else self.stages
            messages[rank] = base64.urlsafe_b64decode(text).decode()
