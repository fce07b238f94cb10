"""The manifest of a set of shards: what it holds, what was set aside and why, in one JSON file at its root.

`manifest.json` is written last, so a set that has one was indexed whole; `quarantine.jsonl` beside it names
every sample that was set aside.
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
from data_pipeline.shard_index import FORMAT_VERSION, Rejected, Settings
from data_pipeline.verify import CAUSES

MANIFEST: Final = "manifest.json"
QUARANTINE: Final = "quarantine.jsonl"


@dataclass(frozen=True)
class ShardInfo:
    """One shard: name relative to the set's root, good samples, samples read, size in bytes, SHA-256 of the
    file.
    """

    name: str
    samples: int
    read: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A verified set of shards.

    members: the member suffixes of its good samples. samples: good samples. read: samples found in the
    shards; it equals `samples` plus all of `quarantined`, which counts by cause. ignored: tar members that
    belong to no sample (folders, links, names without a key). encoding: what an encoded set was made with,
    None for a raw set. reused: how many shards the indexing that made this object did not have to read again
    (not stored).
    """

    kind: Literal["raw", "encoded"]
    settings: Settings
    members: tuple[str, ...]
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

    @property
    def digest(self) -> str:
        """SHA-256 over the shards' names, counts and checksums: equal for equal data in equal order."""
        lines = [f"{shard.name} {shard.samples} {shard.sha256}\n" for shard in self.shards]
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


def save_manifest(root: Path, manifest: Manifest, rejected: Iterable[Rejected]) -> None:
    """Write `quarantine.jsonl`, then `manifest.json`, each atomically."""
    lines = [json.dumps(asdict(entry)) + "\n" for entry in rejected]
    write_bytes(root / QUARANTINE, "".join(lines).encode())
    record = {"format": "image-text-shards", "version": FORMAT_VERSION, **asdict(manifest)}
    del record["reused"]
    write_bytes(root / MANIFEST, (json.dumps(record, indent=1) + "\n").encode())


def load_manifest(root: Path) -> Manifest:
    """Read the manifest of a set and check that every shard on disk still has the recorded size.

    Raises ValueError when there is no manifest, it is of another version, or a shard is missing or another
    size.
    """
    root = Path(root)
    again = f"run `t2i data index {root}`"
    try:
        record = json.loads((root / MANIFEST).read_bytes())
    except FileNotFoundError as error:
        raise ValueError(f"{root} has no {MANIFEST}: {again} first") from error
    except ValueError as error:
        raise ValueError(f"{root / MANIFEST} is not JSON ({error}): {again}") from error
    if record.pop("format", None) != "image-text-shards" or record.pop("version", None) != FORMAT_VERSION:
        raise ValueError(f"{root / MANIFEST} is not version {FORMAT_VERSION} of this format: {again}")
    record["settings"] = Settings(**record["settings"])
    record["members"] = tuple(record["members"])
    record["shards"] = tuple(ShardInfo(**shard) for shard in record["shards"])
    manifest = Manifest(**record)
    for shard in manifest.shards:
        try:
            size = (root / shard.name).stat().st_size
        except FileNotFoundError as error:
            raise ValueError(f"shard {shard.name} of {root} is gone since it was indexed: {again}") from error
        if size != shard.bytes:
            raise ValueError(
                f"shard {shard.name} of {root} has {size} bytes on disk, {shard.bytes} in the manifest: {again}"
            )
    return manifest


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

    row("good", manifest.samples, "verified: every picture decoded, every caption read", "green")
    for cause, count in manifest.quarantined.items():
        row(cause, count, CAUSES[cause], "yellow")
    table.add_section()
    row("read", manifest.read, f"all of the above; those set aside are listed in {QUARANTINE}", "bold")
    console.print(table)
    if manifest.ignored:
        console.print(f"{manifest.ignored:,} tar members belong to no sample (folders, links, names without a key).")
    if manifest.reused:
        console.print(f"{manifest.reused} of {len(manifest.shards)} shards unchanged since last time, not read again.")
