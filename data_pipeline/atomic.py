"""Files that exist whole or not at all.

Everything this package leaves on disk goes through `replacing`: bytes land in a temporary file beside the
target, are flushed to the device, and take the target's name in one step. A process killed at any moment
leaves the old file, the new file, or a temporary one that nothing reads and `remove_leftovers` removes.
"""

import contextlib
import fcntl
import glob
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

_BUFFER: Final = 1 << 20
_SECONDS_TO_LOCK: Final = 60


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
            with contextlib.suppress(OSError):  # no locks on this file system
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    # Without this the rename itself may not survive a power cut.
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files that killed processes of this host left anywhere in a folder.

    For the start of a command that fills the folder. A file that somebody is still writing is locked, and stays; so does
    every one where the file system has no locks, and one that was written to within the last minute, whose writer may not
    have come to locking it.
    """
    for leftover in folder.rglob(f".*.partial.{glob.escape(socket.gethostname())}.*"):
        with contextlib.suppress(OSError), open(leftover, "rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if time.time() - os.fstat(stream.fileno()).st_mtime > _SECONDS_TO_LOCK:
                leftover.unlink()


def write_bytes(path: Path, data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with replacing(path) as stream:
        stream.write(data)
