"""Files that exist whole or not at all.

Everything this package leaves on disk goes through `replacing`: bytes land in a temporary file beside the
target, are flushed to the device, and take the target's name in one step. A process killed at any moment
leaves the old file, the new file, or a temporary one that nothing reads and that the next writer of the same path removes.
"""

import contextlib
import glob
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

_BUFFER: Final = 1 << 20


@contextlib.contextmanager
def replacing(path: Path, exclusive: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that becomes `path` when the block ends without an exception.

    `exclusive` says that only one process can be writing this path: the temporary name is then always the
    same, so a later run overwrites what a killed one left. Otherwise the name carries host and process, and
    two processes that write the same path each leave a whole file, the later one winning.

    Yields a binary file to write to. Raises OSError as the file system does.
    """
    owner = "" if exclusive else f".{socket.gethostname()}.{os.getpid()}"
    temporary = path.parent / f".{path.name}.partial{owner}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # Few large writes: each one gives up the interpreter lock, which costs more than the write when other
        # threads are decoding.
        with open(temporary, "wb", buffering=_BUFFER) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if not exclusive:
        _remove_leftovers(path)
    # Without this the rename itself may not survive a power cut.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of `path` whose processes ran on this host and do not any more."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.partial.{glob.escape(socket.gethostname())}.*"):
        process = leftover.name.rpartition(".")[2]
        if process.isdecimal() and not _runs(int(process)):
            leftover.unlink(missing_ok=True)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path) as stream:
        stream.write(data)
