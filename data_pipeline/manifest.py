"""The manifest of a set of shards: what it holds, what was set aside and why, in one JSON file at its root.

`manifest.json` is written last, so a set that has one was indexed whole; `quarantine.jsonl` beside it names
every sample that was set aside. Whoever writes a shard into a set removes its manifest first.

A set is read through what its index says of each shard, so a shard that has changed since must be noticed. Its size
alone does not tell, as tars are padded. Its modification time does, but a copied set has other times as well, and is
as good. So a shard with another time is hashed, once: the time is then noted in its index. A large copy is not
hashed when it is opened, which every process of a run does, but shard by shard when a process first reads from it
(`shard_set`). Indexing a copy again, which reads no shard twice, writes its times into the manifest.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table

from data_pipeline.atomic import write_bytes
from data_pipeline.shard_index import Rejected, Settings, ShardIndex, confirmed, load_shard_index
from data_pipeline.verify import CAUSES

MANIFEST: Final = "manifest.json"
QUARANTINE: Final = "quarantine.jsonl"
MANIFEST_VERSION: Final = 3

_CHECKED_AT_ONCE: Final = 2 * 10**9
"""Bytes of shards with another modification time that opening a set hashes: some seconds."""


@dataclass(frozen=True)
class ShardInfo:
    """One shard: name relative to the set's root, good samples, samples read, size in bytes, modification time
    when it was indexed (nanoseconds), SHA-256 of the file.
    """

    name: str
    samples: int
    read: int
    bytes: int
    mtime_ns: int = field(compare=False)  # a copied set is the same set
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A verified set of shards.

    members: by member suffix, how many good samples have such a member. samples: good samples. read: samples found in the
    shards; it equals `samples` plus all of `quarantined`, which counts by cause. ignored: tar members that
    belong to no sample (folders, links, names without a key). encoding: what an encoded set was made with,
    None for a raw set. reused: how many shards the indexing that made this object did not have to read again
    (not stored).
    """

    kind: Literal["raw", "encoded"]
    settings: Settings
    members: dict[str, int]
    shards: tuple[ShardInfo, ...]
    samples: int
    read: int
    quarantined: dict[str, int]
    ignored: int
    encoding: dict[str, Any] | None
    reused: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        assert self.samples == sum(shard.samples for shard in self.shards)
        assert self.read == self.samples + sum(self.quarantined.values()), "counts do not add up"

    def lacking(self, suffix: str) -> int:
        """How many good samples have no member of this suffix, such as `cls`."""
        return self.samples - self.members.get(suffix, 0)

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' names, counts and checksums: equal for equal data in equal order."""
        lines = [f"{shard.name} {shard.samples} {shard.sha256}\n" for shard in self.shards]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def save_manifest(root: Path, manifest: Manifest, rejected: Iterable[Rejected]) -> None:
    """Write `quarantine.jsonl`, then `manifest.json`, each atomically."""
    lines = [json.dumps(asdict(entry)) + "\n" for entry in rejected]
    write_bytes(root / QUARANTINE, "".join(lines).encode())
    record = {"format": "image-text-shards", "version": MANIFEST_VERSION, **asdict(manifest)}
    del record["reused"]
    write_bytes(root / MANIFEST, (json.dumps(record, indent=1) + "\n").encode())


def remove_manifest(root: Path) -> None:
    """Remove the manifest of a set, if there is one: for before a shard in it is written, replaced or removed.

    The set is then none until it is indexed again, however far the writing gets.
    """
    (root / MANIFEST).unlink(missing_ok=True)


def load_manifest(root: Path) -> Manifest:
    """Read the manifest of a set and check that the shards on disk are those that were indexed.

    A missing shard or another size is an error. Shards with another modification time are hashed here, unless there
    are more than 2 GB of them: then this is left to whoever reads from one (see the top of this file). Raises
    ValueError when there is no manifest, it is of another version, or a shard is missing or has changed.
    """
    root = Path(root)
    again = f"run `t2i data index {root}`"
    try:
        record = json.loads((root / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{root} has no {MANIFEST}: {again} first") from error
    except NotADirectoryError as error:
        raise ValueError(f"{root} is not a folder: give the one that holds the shards") from error
    except ValueError as error:
        raise ValueError(f"{root / MANIFEST} is not JSON ({error}): {again}") from error
    kind = [record.pop(name, None) for name in ("format", "version")] if isinstance(record, dict) else None
    if kind != ["image-text-shards", MANIFEST_VERSION]:
        raise ValueError(f"{root / MANIFEST} is not version {MANIFEST_VERSION} of this format: {again}")
    try:
        record["settings"] = Settings(**record["settings"])
        record["shards"] = tuple(ShardInfo(**shard) for shard in record["shards"])
        manifest = Manifest(**record)
    except (KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{root / MANIFEST} is damaged ({error}): {again}") from error
    touched = []
    for shard in manifest.shards:
        try:
            status = (root / shard.name).stat()
        except FileNotFoundError as error:
            raise ValueError(f"shard {shard.name} of {root} is gone since it was indexed: {again}") from error
        if status.st_size != shard.bytes:
            raise ValueError(
                f"shard {shard.name} of {root} has {status.st_size} bytes on disk, {shard.bytes} in the manifest: {again}"
            )
        if status.st_mtime_ns != shard.mtime_ns:
            touched.append(shard)
    if sum(shard.bytes for shard in touched) <= _CHECKED_AT_ONCE:
        for shard in touched:
            index = load_shard_index(root / shard.name)
            # An index that is not the manifest's is the reader's to refuse.
            if index is not None and index.sha256 == shard.sha256:
                refuse_changed(root, shard.name, index)
    return manifest


def refuse_changed(root: Path, name: str, index: ShardIndex) -> None:
    """Raise ValueError when a shard is not the one that was indexed; see `shard_index.confirmed`."""
    try:
        unchanged = confirmed(root / name, index) is not None
    except OSError as error:
        raise ValueError(f"shard {name} of {root} is unreadable since it was indexed: {error}") from error
    if not unchanged:
        raise ValueError(f"shard {name} of {root} has changed since it was indexed: run `t2i data index {root}`")


def load_quarantine(root: Path) -> list[Rejected]:
    """The samples set aside when the set was indexed, in shard order."""
    lines = (Path(root) / QUARANTINE).read_text().splitlines()
    return [Rejected(**json.loads(line)) for line in lines]


def count_causes(rejected: Iterable[Rejected]) -> dict[str, int]:
    """How often each cause occurs, in the order of `CAUSES`; causes that do not occur are left out."""
    counts = Counter(entry.cause for entry in rejected)
    return {cause: counts[cause] for cause in CAUSES if counts[cause]}


def print_table(manifest: Manifest, console: Console | None = None) -> None:
    """Print what was read, kept and set aside by cause, as a table whose column adds up."""
    console = console or Console()
    size = sum(shard.bytes for shard in manifest.shards)
    title = f"{manifest.kind} set: shards {len(manifest.shards):,}, megabytes {size / 1e6:,.1f}"
    table = Table(title=title, title_justify="left")
    table.add_column("samples")
    table.add_column("count", justify="right")
    table.add_column("share", justify="right")
    table.add_column("meaning")

    def row(name: str, count: int, meaning: str, style: str = "") -> None:
        table.add_row(name, f"{count:,}", f"{count / max(manifest.read, 1):.2%}", meaning, style=style)

    content = "every picture decoded" if manifest.kind == "raw" else "all codes and text states in range"
    row("good", manifest.samples, f"verified: {content}, every caption read", "green")
    for cause, count in manifest.quarantined.items():
        row(cause, count, CAUSES[cause], "yellow")
    table.add_section()
    row("read", manifest.read, f"all of the above; those set aside are listed in {QUARANTINE}", "bold")
    console.print(table)
    if manifest.ignored:
        console.print(f"{manifest.ignored:,} tar members belong to no sample (folders, links, names without a key).")
    if manifest.reused:
        console.print(f"{manifest.reused} of {len(manifest.shards)} shards unchanged since last time, not read again.")
