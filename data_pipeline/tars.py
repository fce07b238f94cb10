"""Tar shards at the level of bytes: where every member lies, what is damaged, and writing them reproducibly.

Names follow webdataset: a member's key ends at the first dot of its basename, the rest is its suffix, so
`a/b.seg.png` is the member `seg.png` of sample `a/b`.
"""

import io
import os
import re
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Self

from data_pipeline.atomic import replacing
from data_pipeline.folders import files_under
from data_pipeline.images import IMAGE_SUFFIXES

TRUNCATED: Final = "truncated_tar"
CORRUPT: Final = "corrupt_tar"

_NAME: Final = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]+)$", re.DOTALL)
_BLOCK: Final = tarfile.BLOCKSIZE
_HEADER_ERRORS: Final = (tarfile.TarError, ValueError, IndexError)
_CUT_HEADERS: Final = ("unexpected end of data", "empty file", "empty header", "truncated header")


@dataclass(frozen=True)
class Group:
    """One sample's members: suffix to (offset of the data in the tar, size), both in bytes."""

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def offset(self) -> int:
        """Byte at which the first member's data begins."""
        return min(offset for offset, _ in self.members.values())


@dataclass(frozen=True)
class Damage:
    """Why reading a tar stopped before its proper end; `key` is the sample that was cut, None when none
    was.
    """

    cause: str
    detail: str
    key: str | None = None


@dataclass(frozen=True)
class TarScan:
    """What a tar holds: samples in order of appearance, the members that belong to none, global PAX
    records.
    """

    groups: list[Group]
    ignored: int
    pax: dict[str, str]
    damage: Damage | None


def split_name(name: str) -> tuple[str, str] | None:
    """(key, lower-case suffix) of a member name; None for one that webdataset skips, such as `README` or
    `._a.png`.
    """
    match = _NAME.match(name)
    return (match[1], match[2].lower()) if match else None


def tar_names(root: Path) -> list[str]:
    """Paths, relative to `root` and sorted, of the `.tar` files under it, in linked folders too (see
    `folders.files_under`), hidden files and folders left out.
    """
    names, _ = files_under(root, lambda folder: folder.name.startswith("."))
    return [
        n for n in names if n.endswith(".tar") and not n.rpartition("/")[2].startswith(".") and (root / n).is_file()
    ]


def scan_tar(path: Path) -> TarScan:
    """Read the headers of a plain tar (GNU and PAX long names included), never the data.

    Members of one key make one sample wherever they lie, until one repeats (every picture suffix counts as
    the same): that begins another sample of the same key. A sample whose last member is cut off is left out
    of `groups` and named in `damage`. Directories, links and names without a key are counted in `ignored`.
    Raises OSError when the file cannot be opened.
    """
    groups: list[Group] = []
    latest: dict[str, Group] = {}
    ignored = 0
    with open(path, "rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        try:
            tar = tarfile.TarFile(fileobj=stream)
        except _HEADER_ERRORS as error:
            cause = TRUNCATED if size < _BLOCK or str(error) in _CUT_HEADERS else CORRUPT
            return TarScan([], 0, {}, Damage(cause, f"no tar header at byte 0 of {size}: {error}"))
        error_text, before = "", -1
        while True:
            try:
                member = tar.next()
            except _HEADER_ERRORS as error:
                member, error_text = None, str(error)
            if member is not None and (member.size < 0 or tar.offset <= before):
                # A forged size would send the reader backwards, over the same members for ever.
                member, error_text, tar.offset = None, "negative member size", max(before, 0)
            if member is None:
                break
            before = tar.offset
            # Not in the published interface, but else every header of a large tar stays in memory.
            tar.members.clear()  # type: ignore[attr-defined]
            parts = split_name(member.name) if member.isreg() else None
            if member.isreg() and member.offset_data + member.size > size:
                detail = f"cut at byte {size} inside member {member.name!r}, which needs {member.size} bytes"
                cut = latest.get(parts[0]) if parts else None
                if parts and cut is not None and not _repeats(cut, parts[1]):
                    groups.remove(cut)
                damage = Damage(TRUNCATED, detail, parts[0] if parts else None)
                return TarScan(groups, ignored, dict(tar.pax_headers), damage)
            if parts is None:
                ignored += 1
                continue
            key, suffix = parts
            group = latest.get(key)
            if group is None or _repeats(group, suffix):
                group = latest[key] = Group(key)
                groups.append(group)
            group.members[suffix] = (member.offset_data, member.size)
        return TarScan(groups, ignored, dict(tar.pax_headers), _end_damage(stream, tar.offset, size, error_text))


def _repeats(group: Group, suffix: str) -> bool:
    if suffix in IMAGE_SUFFIXES:
        return any(image in group.members for image in IMAGE_SUFFIXES)
    return suffix in group.members


def _end_damage(stream: BinaryIO, offset: int, size: int, error_text: str) -> Damage | None:
    """Damage at the place where tarfile, which stops at a bad header as quietly as at the end, found no more
    members.
    """
    stream.seek(min(offset, size))
    block = stream.read(_BLOCK)
    if len(block) < _BLOCK:
        return Damage(TRUNCATED, f"ends at byte {size} without an end-of-archive mark")
    if any(block):
        if error_text in _CUT_HEADERS or _is_cut_extension(block, offset, size):
            return Damage(TRUNCATED, f"cut at byte {size} inside an extended header at byte {offset}")
        return Damage(CORRUPT, f"bad header at byte {offset} of {size}{': ' if error_text else ''}{error_text}")
    if not _only_zeros(stream, offset):
        return Damage(CORRUPT, f"more data after the end-of-archive mark at byte {offset} of {size}")
    return None


def _is_cut_extension(block: bytes, offset: int, size: int) -> bool:
    """Whether a header announces an extended one that goes beyond the end of the file, or has no header after it there. Early
    versions of Python 3.11 say nothing of that."""
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except _HEADER_ERRORS:
        return False
    extended = header.type in (
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
    )
    blocks = -(-header.size // _BLOCK)
    return extended and offset + (1 + blocks + 1) * _BLOCK > size


def _only_zeros(stream: BinaryIO, offset: int) -> bool:
    stream.seek(offset)
    while chunk := stream.read(1 << 20):
        if chunk.count(0) != len(chunk):
            return False
    return True


def read_pax(path: Path) -> dict[str, str]:
    """The global PAX records of a tar, from its first header alone. Raises tarfile.ReadError when it is no
    tar.
    """
    with tarfile.open(path, mode="r:") as tar:
        return dict(tar.pax_headers)


class ShardWriter:
    """Writes one shard; its bytes are a function of what is added (no times, owners or modes).

    A context manager: the file takes its name when the block ends without an exception. `pax` becomes a
    global header that readers of the samples do not see.
    """

    def __init__(self, path: Path, pax: Mapping[str, str] | None = None) -> None:
        self._replacing = replacing(path, exclusive=True)
        self._pax = dict(pax or {})

    def __enter__(self) -> Self:
        stream = self._replacing.__enter__()
        self._tar = tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT, pax_headers=self._pax)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._tar.close()
        except BaseException as failure:
            self._replacing.__exit__(type(failure), failure, failure.__traceback__)
            raise
        self._replacing.__exit__(kind, error, trace)

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append one sample: `members` maps suffixes to contents, written in the mapping's order."""
        assert split_name(f"{key}.x") == (key, "x"), f"key {key!r} would not be read back as it is written"
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
