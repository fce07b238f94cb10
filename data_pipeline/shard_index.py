"""The index of one shard, kept beside it as `NAME.tar.idx.npz`.

It holds where each good sample's members lie, why each other sample was set aside, and what the shard was
like when it was read (size, modification time, checksum, settings), so that an unchanged shard is never read
twice. Shape suffixes: N good samples, M distinct member suffixes, K bytes of all keys together.
"""

import contextlib
import hashlib
import io
import json
import lzma
import struct
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from data_pipeline.atomic import write_bytes
from data_pipeline.npy import read_npy

FORMAT_VERSION: Final = 1
_DAMAGED: Final = (
    OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError,
    struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
"""What reading a damaged index may raise; zipfile has a RuntimeError for ways to pack that it does not know."""


@dataclass(frozen=True)
class Settings:
    """What decides whether a sample is good, besides its bytes.

    caption_key: `caption` takes KEY.txt, or else that field of KEY.json; any other name takes that field
    only. min_size: pixels that the shorter side of a picture must have.
    """

    caption_key: str = "caption"
    min_size: int = 16


@dataclass(frozen=True)
class Rejected:
    """One sample set aside: its key (None when the tar is damaged where no sample is known), shard, cause,
    detail.
    """

    key: str | None
    shard: str
    cause: str
    detail: str


@dataclass(frozen=True)
class ShardIndex:
    """Arrays over the good samples of one shard, and the report of reading it.

    offsets_NM and sizes_NM are bytes in the tar, -1 for an absent member, columns as `suffixes`; signed integers of any size.
    `duplicate_N` marks samples whose key an earlier shard of the set has already. `read` counts samples
    found; it equals the rows here plus the entries of `rejected`. `reused` says that the shard itself was not
    read this time.
    """

    name: str
    bytes: int
    mtime_ns: int
    sha256: str
    settings: Settings
    read: int
    ignored: int
    encoding: dict[str, Any] | None
    rejected: list[Rejected]
    suffixes: list[str]
    keys_K: np.ndarray
    key_ends_N: np.ndarray
    offsets_NM: np.ndarray
    sizes_NM: np.ndarray
    duplicate_N: np.ndarray
    reused: bool = False

    def __post_init__(self) -> None:
        assert self.read == len(self.key_ends_N) + len(self.rejected), f"{self.name}: counts do not add up"

    def key(self, row: int) -> str:
        """The key of one row, as it stands in the tar."""
        start = int(self.key_ends_N[row - 1]) if row else 0
        return _text(self.keys_K[start : int(self.key_ends_N[row])].tobytes())

    def all_keys(self) -> list[str]:
        """The keys of all rows."""
        return [self.key(row) for row in range(len(self.key_ends_N))]

    def with_duplicates(self, duplicate_N: np.ndarray) -> "ShardIndex":
        """The same index with other rows marked as duplicates of earlier shards."""
        return replace(self, duplicate_N=duplicate_N)


def index_path(tar: Path) -> Path:
    """Where the index of a shard lies: `NAME.tar.idx.npz`."""
    return tar.with_name(tar.name + ".idx.npz")


def pack_keys(keys: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Keys as one uint8 array and the int64 end of each."""
    # Tar names need not be UTF-8; surrogateescape keeps such names reversible.
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    ends_N = np.cumsum([len(key) for key in encoded], dtype=np.int64)
    return np.frombuffer(b"".join(encoded), np.uint8), ends_N


def narrow(numbers: np.ndarray) -> np.ndarray:
    """The same numbers, each at least -1, as the smallest signed integers that hold them all."""
    largest = int(numbers.max(initial=0))
    kind = next(kind for kind in (np.int16, np.int32, np.int64) if largest <= np.iinfo(kind).max)
    return numbers.astype(kind, copy=False)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def save_shard_index(tar: Path, index: ShardIndex) -> None:
    """Write an index beside its tar, atomically."""
    header = {
        "version": FORMAT_VERSION,
        **{name: getattr(index, name) for name in ("name", "bytes", "mtime_ns", "sha256", "read", "ignored")},
        "settings": asdict(index.settings),
        "encoding": index.encoding,
        "suffixes": index.suffixes,
        "rejected": [[entry.key, entry.cause, entry.detail] for entry in index.rejected],
    }
    stream = io.BytesIO()
    np.savez_compressed(
        stream,
        header=np.frombuffer(json.dumps(header).encode(), np.uint8),
        keys=index.keys_K,
        key_ends=narrow(index.key_ends_N),
        offsets=narrow(index.offsets_NM),
        sizes=narrow(index.sizes_NM),
        duplicate=index.duplicate_N,
    )
    write_bytes(index_path(tar), stream.getvalue())


def load_shard_index(tar: Path) -> ShardIndex | None:
    """Read the index beside a tar; None when there is none, or it is of another version or unreadable."""
    try:
        # A run that starts on a large set loads hundreds of these for its first batch: `np.load` would take twice as long.
        with zipfile.ZipFile(index_path(tar)) as file:
            arrays = {name.removesuffix(".npy"): read_npy(file.read(name)) for name in file.namelist()}
        header = json.loads(arrays["header"].tobytes())
        if header["version"] != FORMAT_VERSION:
            return None
        return ShardIndex(
            **{name: header[name] for name in ("name", "bytes", "mtime_ns", "sha256", "read", "ignored")},
            settings=Settings(**header["settings"]),
            encoding=header["encoding"],
            rejected=[Rejected(key, header["name"], cause, detail) for key, cause, detail in header["rejected"]],
            suffixes=header["suffixes"],
            keys_K=arrays["keys"],
            key_ends_N=arrays["key_ends"],
            offsets_NM=arrays["offsets"],
            sizes_NM=arrays["sizes"],
            duplicate_N=arrays["duplicate"],
            reused=True,
        )
    except _DAMAGED:
        return None


def file_sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in pieces."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_current(tar: Path, name: str, settings: Settings) -> ShardIndex | None:
    """The index beside `tar` if it still describes it (see `confirmed`) under these settings, else None."""
    index = load_shard_index(tar)
    if index is None or index.settings != settings or index.name != name:
        return None
    return confirmed(tar, index)


def confirmed(tar: Path, index: ShardIndex) -> ShardIndex | None:
    """The index, if the tar is still the one that it was made from, else None. Raises OSError when there is no tar.

    Same size and modification time count as the same file. With another time, as in a copied set, the checksum
    decides, and the time is noted in the index beside the tar, so that a copy is hashed once.
    """
    status = tar.stat()
    if status.st_size != index.bytes:
        return None
    if status.st_mtime_ns == index.mtime_ns:
        return index
    if file_sha256(tar) != index.sha256:
        return None
    index = replace(index, mtime_ns=status.st_mtime_ns)
    with contextlib.suppress(OSError):  # where nothing can be written, the next process hashes it again
        save_shard_index(tar, index)
    return index
