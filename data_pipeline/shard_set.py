"""Random access to the good samples of an indexed set: one sample, one `pread`.

Safe to use from several threads at once; the positions of a shard's samples are loaded when it is first
touched, and stay.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from data_pipeline.images import IMAGE_SUFFIXES
from data_pipeline.manifest import load_manifest, refuse_changed
from data_pipeline.places import Places
from data_pipeline.shard_index import load_shard_index
from data_pipeline.verify import CODES, STATES, BadSampleError, caption_of, codes_of, label_of

if TYPE_CHECKING:
    import torch

_OPEN_FILES: Final = 256
_AT_ONCE: Final = 64
"""Samples whose bytes are asked for before the first of them is waited for."""
_TURN: Final = 0.01
"""Seconds, longer than reading `_AT_ONCE` samples from memory takes."""
_LOADING: Final = 16
"""Indexes that threads can load at once."""
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


class _Located(NamedTuple):
    """One sample on disk: its members as suffix, offset and size, and the bytes from the first of them to the last."""

    i: int
    key: str
    file: _OpenFile
    members: list[tuple[str, int, int]]
    start: int
    size: int


class ShardSet:
    """The good samples of the set at `root`, numbered from 0 in shard order, then tar order.

    Raises ValueError when the set is not indexed or has changed since (see `load_manifest`).
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.manifest = load_manifest(self.root)
        raw = self.manifest.kind == "raw"
        self._caption_key = self.manifest.settings.caption_key if raw else "caption"
        self._needed = (*IMAGE_SUFFIXES, "txt", "json", "cls") if raw else None
        self._ends = np.cumsum([shard.samples for shard in self.manifest.shards], dtype=np.int64)
        self._places: dict[int, Places] = {}
        self._loading = [threading.Lock() for _ in range(_LOADING)]
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()
        self._lock = threading.Lock()
        self._turn = threading.Lock()

    def __len__(self) -> int:
        return self.manifest.samples

    def key(self, i: int) -> str:
        """Key of sample `i`."""
        shard, row = self._locate(i)
        return self._places_in(shard).key(row)

    def shard_of(self, i: int) -> str:
        """Name of the shard that holds sample `i`, relative to the root."""
        return self.manifest.shards[self._locate(i)[0]].name

    def members(self, i: int, suffixes: Collection[str] | None = None) -> dict[str, bytes]:
        """Contents of sample `i`'s members by suffix: all of them, or those of `suffixes` that it has.

        Raises ValueError naming key, shard and offset when the shard no longer holds them.
        """
        return self._contents(self._find(i, *self._locate(i), suffixes))

    def read(self, i: int, suffixes: Collection[str] | None = None) -> RawSample | EncodedSample:
        """Sample `i`, of the manifest's kind.

        With `suffixes`, only those members are read; the fields that need others are empty (`b""`, `""`,
        None, an empty array). Raises ValueError naming key, shard and offset for what cannot be read any
        more.
        """
        return self._sample(self._find(i, *self._locate(i), self._needed if suffixes is None else suffixes))

    def read_many(self, numbers: Sequence[int] | np.ndarray) -> list[RawSample | EncodedSample]:
        """The samples of these numbers, in their order, each as `read` gives it.

        A disk is asked for many at once, and need not be waited for at each. Raises as `read`, and IndexError for a number
        outside the set before anything is read.
        """
        numbers_B = np.asarray(numbers, np.int64)
        if len(outside := numbers_B[(numbers_B < 0) | (numbers_B >= len(self))]):
            raise IndexError(f"sample {outside[0]} of {len(self)} in {self.root}")
        shards_B = np.searchsorted(self._ends, numbers_B, side="right")
        rows_B = numbers_B - np.concatenate([[0], self._ends])[shards_B]
        places = list(zip(numbers_B.tolist(), shards_B.tolist(), rows_B.tolist(), strict=True))
        samples: list[RawSample | EncodedSample] = []
        for start in range(0, len(places), _AT_ONCE):
            found = [self._find(*place, self._needed) for place in places[start : start + _AT_ONCE]]
            for located in found:
                _announce(located)
            # Threads that read from memory side by side hand the interpreter lock over at every sample, which costs more than
            # the sample; so they take turns, but none waits long for one that waits for a disk.
            turn = self._turn.acquire(timeout=_TURN)
            try:
                samples += map(self._sample, found)
            finally:
                if turn:
                    self._turn.release()
        return samples

    def read_raw(self, i: int, suffixes: Collection[str] | None = None) -> RawSample:
        """Sample `i` of a raw set; see `read`."""
        sample = self.read(i, suffixes)
        assert isinstance(sample, RawSample), f"{self.root} holds encoded samples"
        return sample

    def read_encoded(self, i: int, suffixes: Collection[str] | None = None) -> EncodedSample:
        """Sample `i` of an encoded set; see `read`."""
        sample = self.read(i, suffixes)
        assert isinstance(sample, EncodedSample), f"{self.root} holds raw samples"
        return sample

    def _locate(self, i: int) -> tuple[int, int]:
        """(shard number, row of its places) of sample `i`."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in {self.root}")
        shard = int(np.searchsorted(self._ends, i, side="right"))
        return shard, i - (int(self._ends[shard - 1]) if shard else 0)

    def _places_in(self, shard: int) -> Places:
        if (known := self._places.get(shard)) is not None:
            return known
        with self._loading[shard % _LOADING]:
            if shard not in self._places:
                info = self.manifest.shards[shard]
                index = load_shard_index(self.root / info.name)
                count = int((~index.duplicate_N).sum()) if index else 0
                expected = (info.sha256, self.manifest.settings, info.samples)
                if index is None or (index.sha256, index.settings, count) != expected:
                    raise ValueError(
                        f"the index of shard {self.root / info.name} does not belong to the manifest: "
                        f"run `t2i data index {self.root}`"
                    )
                refuse_changed(self.root, info.name, index)
                self._places[shard] = Places(index)
            return self._places[shard]

    def _find(self, i: int, shard: int, row: int, suffixes: Collection[str] | None) -> _Located:
        places = self._places_in(shard)
        members = places.members(row)
        if suffixes is not None:
            members = [member for member in members if member[0] in suffixes]
        start = min([offset for _, offset, _ in members], default=0)
        end = max([offset + size for _, offset, size in members], default=0)
        try:
            return _Located(i, places.key(row), self._file(shard), members, start, end - start)
        except OSError as error:
            raise self._error(i, start, str(error)) from error

    def _contents(self, located: _Located) -> dict[str, bytes]:
        _, _, file, members, start, span = located
        try:
            if span <= 2 * sum([size for _, _, size in members]) + _SLACK:
                block = _pread(file, start, span)
                return {suffix: block[offset - start : offset - start + size] for suffix, offset, size in members}
            return {suffix: _pread(file, offset, size) for suffix, offset, size in members}
        except OSError as error:
            raise self._error(located.i, start, str(error)) from error

    def _sample(self, located: _Located) -> RawSample | EncodedSample:
        members = self._contents(located)
        try:
            if self.manifest.kind == "encoded":
                return encoded_sample(located.key, members)
            image = next((members[suffix] for suffix in IMAGE_SUFFIXES if suffix in members), b"")
            return RawSample(located.key, image, *_texts(members, self._caption_key))
        except BadSampleError as error:
            raise self._error(located.i, located.start, str(error)) from error

    def _error(self, i: int, offset: int, reason: str) -> ValueError:
        return ValueError(
            f"sample {self.key(i)!r} at byte {offset} of shard {self.root / self.shard_of(i)} is unreadable: "
            f"{reason}; if the shard has changed, run `t2i data index {self.root}`"
        )

    def _file(self, shard: int) -> _OpenFile:
        with self._lock:
            file = self._files.pop(shard, None) or _OpenFile(self.root / self.manifest.shards[shard].name)
            self._files[shard] = file
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file


def encoded_sample(key: str, members: Mapping[str, bytes]) -> EncodedSample:
    """An encoded sample from its members' contents by suffix; fields whose member is absent are empty. Raises
    BadSampleError."""
    caption, label = _texts(members, "caption")
    codes = codes_of(members) if CODES in members else np.empty(0, np.uint16)
    return EncodedSample(key, codes, caption, label, _states(members[STATES]) if STATES in members else None)


def _texts(members: Mapping[str, bytes], caption_key: str) -> tuple[str, int | None]:
    has_caption = "txt" in members or "json" in members
    return caption_of(members, caption_key) if has_caption else "", label_of(members)


def _announce(located: _Located) -> None:
    """Let the system fetch a sample's bytes while others are read, where it can."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(located.file.descriptor, located.start, located.size, os.POSIX_FADV_WILLNEED)


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
