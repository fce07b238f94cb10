"""Files as a disk gives them, in place of memory: Linux keeps what was read of a file in its page cache."""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path


def drop(files: Iterable[Path]) -> None:
    """Have the system forget the contents of files, once they are on disk: `posix_fadvise(DONTNEED)` after `fsync`.

    Names, sizes and times of files stay known. Raises ValueError where the system has no such call.
    """
    if not hasattr(os, "posix_fadvise"):
        raise ValueError("this system cannot be told to forget what it read of files; measure with --caches warm")
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def share_in_memory(files: Iterable[Path]) -> float:
    """Share of the files' pages that are in the page cache, by `mincore` (Linux)."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = present = 0
    for file in files:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size == 0:
                continue
            # A private copy that nobody writes to: only so does Python tell its address.
            with mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_COPY) as mapped:
                count = -(-size // mmap.PAGESIZE)
                flags = (ctypes.c_ubyte * count)()
                first = ctypes.c_char.from_buffer(mapped)
                failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), flags)
                del first  # a mapping that is looked at cannot be closed
                if failed:
                    raise OSError(ctypes.get_errno(), f"mincore of {file}")
            pages += count
            present += sum(flag & 1 for flag in flags)
    return present / pages if pages else 0.0
