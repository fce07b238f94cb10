"""Random access to the good samples of an indexed set: one sample, one `pread`.

Safe to use from several threads at once; the positions of a shard's samples are loaded when it is first
touched.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from data_pipeline.images import IMAGE_SUFFIXES
from data_pipeline.manifest import load_manifest, refuse_changed
from data_pipeline.shard_index import ShardIndex, load_shard_index
from data_pipeline.verify import CODES, STATES, BadSampleError, caption_of, codes_of, label_of

if TYPE_CHECKING:
    import torch

_OPEN_FILES: Final = 128
_SLACK: Final = 8192
"""Bytes that one read may fetch beyond what was asked for, rather than read twice."""


@dataclass(frozen=True)
class RawSample:
    """A picture as its file's bytes, its caption, and its class number if it has one."""

    key: str
    image: bytes
    caption: str
    label: int | None = None


@dataclass(frozen=True)
class EncodedSample:
    """Token codes, uint16 of the grid's shape; caption; class number; text states, bf16 [length, channels],
    if stored.
    """

    key: str
    codes: np.ndarray
    caption: str
    label: int | None = None
    states: "torch.Tensor | None" = None


class _OpenFile:
    """A descriptor that closes when its last user lets go, so that evicting it cannot disturb a reading
    thread.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class ShardSet:
    """The good samples of the set at `root`, numbered from 0 in shard order, then tar order.

    Raises ValueError when the set is not indexed or has changed since (see `load_manifest`).
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.manifest = load_manifest(self.root)
        self._caption_key = self.manifest.settings.caption_key if self.manifest.kind == "raw" else "caption"
        self._ends = np.cumsum([shard.samples for shard in self.manifest.shards], dtype=np.int64)
        self._lock = threading.Lock()
        self._indexes: dict[int, tuple[ShardIndex, np.ndarray]] = {}
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    def __len__(self) -> int:
        return self.manifest.samples

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        shard, row = self._locate(i)
        return self._index(shard)[0].key(row)

    def shard_of(self, i: int) -> str:
        """Name of the shard that holds sample `i`, relative to the root."""
        return self.manifest.shards[self._locate(i)[0]].name

    def members(self, i: int, suffixes: Collection[str] | None = None) -> dict[str, bytes]:
        """Contents of sample `i`'s members by suffix: all of them, or those of `suffixes` that it has.

        Raises ValueError naming key, shard and offset when the shard no longer holds them.
        """
        shard, row = self._locate(i)
        index, _ = self._index(shard)
        places = {
            suffix: (int(index.offsets_NM[row, column]), int(index.sizes_NM[row, column]))
            for column, suffix in enumerate(index.suffixes)
            if index.offsets_NM[row, column] >= 0 and (suffixes is None or suffix in suffixes)
        }
        if not places:
            return {}
        start = min(offset for offset, _ in places.values())
        end = max(offset + size for offset, size in places.values())
        wanted = sum(size for _, size in places.values())
        try:
            file = self._file(shard)
            if end - start <= 2 * wanted + _SLACK:
                block = _pread(file, start, end - start)
                return {suffix: block[offset - start :][:size] for suffix, (offset, size) in places.items()}
            return {suffix: _pread(file, offset, size) for suffix, (offset, size) in places.items()}
        except OSError as error:
            raise self._error(i, start, str(error)) from error

    def read(self, i: int, suffixes: Collection[str] | None = None) -> RawSample | EncodedSample:
        """Sample `i`, of the manifest's kind.

        With `suffixes`, only those members are read; the fields that need others are empty (`b""`, `""`,
        None, an empty array). Raises ValueError naming key, shard and offset for what cannot be read any
        more.
        """
        return self.read_raw(i, suffixes) if self.manifest.kind == "raw" else self.read_encoded(i, suffixes)

    def read_raw(self, i: int, suffixes: Collection[str] | None = None) -> RawSample:
        """Sample `i` of a raw set; see `read`."""
        assert self.manifest.kind == "raw", f"{self.root} holds encoded samples"
        members = self.members(i, suffixes if suffixes is not None else (*IMAGE_SUFFIXES, "txt", "json", "cls"))
        image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), b"")
        return RawSample(self.key(i), image, *self._texts(i, members))

    def read_encoded(self, i: int, suffixes: Collection[str] | None = None) -> EncodedSample:
        """Sample `i` of an encoded set; see `read`."""
        assert self.manifest.kind == "encoded", f"{self.root} holds raw samples"
        members = self.members(i, suffixes)
        caption, label = self._texts(i, members)
        try:
            codes = codes_of(members) if CODES in members else np.empty(0, np.uint16)
            states = _states(members[STATES]) if STATES in members else None
        except BadSampleError as error:
            raise self._error(i, self._offset(i), str(error)) from error
        return EncodedSample(self.key(i), codes, caption, label, states)

    def _texts(self, i: int, members: dict[str, bytes]) -> tuple[str, int | None]:
        try:
            has_caption = "txt" in members or "json" in members
            caption = caption_of(members, self._caption_key) if has_caption else ""
            return caption, label_of(members)
        except BadSampleError as error:
            raise self._error(i, self._offset(i), str(error)) from error

    def _offset(self, i: int) -> int:
        shard, row = self._locate(i)
        offsets_M = self._index(shard)[0].offsets_NM[row]
        return int(offsets_M[offsets_M >= 0].min())

    def _error(self, i: int, offset: int, reason: str) -> ValueError:
        return ValueError(
            f"sample {self.key(i)!r} at byte {offset} of shard {self.root / self.shard_of(i)} is unreadable: "
            f"{reason}; if the shard has changed, run `t2i data index {self.root}`"
        )

    def _locate(self, i: int) -> tuple[int, int]:
        """(shard number, row of the shard's index) of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.root}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        nth = i - (int(self._ends[shard - 1]) if shard else 0)
        return shard, int(self._index(shard)[1][nth])

    def _index(self, shard: int) -> tuple[ShardIndex, np.ndarray]:
        """A shard's index and the rows of it that belong to the set (those that are no duplicates)."""
        with self._lock:
            if shard not in self._indexes:
                info = self.manifest.shards[shard]
                index = load_shard_index(self.root / info.name)
                rows = np.flatnonzero(~index.duplicate_N) if index else np.empty(0, np.int64)
                expected = (info.sha256, self.manifest.settings, info.samples)
                if index is None or (index.sha256, index.settings, len(rows)) != expected:
                    raise ValueError(
                        f"the index of shard {self.root / info.name} does not belong to the manifest: "
                        f"run `t2i data index {self.root}`"
                    )
                refuse_changed(self.root, info.name, index)
                self._indexes[shard] = index, rows
            return self._indexes[shard]

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._files.pop(shard, None) or _OpenFile(self.root / self.manifest.shards[shard].name)
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file


def _pread(file: _OpenFile, offset: int, size: int) -> bytes:
    data = os.pread(file.descriptor, size, offset)
    while len(data) < size:  # one call returns at most 2 GiB, and network file systems may return less
        more = os.pread(file.descriptor, size - len(data), offset + len(data))
        if not more:
            raise OSError(f"the file ends {size - len(data)} bytes too early")
        data += more
    return data


def _states(data: bytes) -> "torch.Tensor":
    from safetensors import SafetensorError
    from safetensors.torch import (
        load,
    )  # here, because importing torch is slow and most users of a set need none

    try:
        return load(data)["states"]
    except (SafetensorError, KeyError) as error:
        raise BadSampleError("bad_states", f"{STATES} cannot be read: {error}") from error
