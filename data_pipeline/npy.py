"""Arrays from npy files in memory, for whoever reads many of the same kind."""

import functools
import io
from typing import Any

import numpy as np


def read_npy(data: bytes) -> np.ndarray:
    """The array in a version 1 npy file, a read-only view of `data`.

    Raises ValueError for anything else, Fortran order and Python objects included.
    """
    header = data[: 10 + int.from_bytes(data[8:10], "little")]
    shape, dtype = _header(header)
    return np.frombuffer(data, dtype, offset=len(header)).reshape(shape)


@functools.lru_cache(maxsize=256)
def _header(header: bytes) -> tuple[tuple[int, ...], np.dtype[Any]]:
    # Parsing one takes several times as long as reading a grid of codes, and all headers of a set are the same: so they
    # are remembered.
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("not npy version 1.0")
    try:
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    except Exception as error:  # numpy reads it as Python source, and lets through what that raises
        raise ValueError(f"damaged header: {error}") from error
    if fortran_order or dtype.hasobject:
        raise ValueError("Fortran order or objects")
    if not all(0 <= size < 2**62 for size in shape):  # numpy takes -1 for whatever fits
        raise ValueError(f"damaged header: shape {shape}")
    return shape, dtype
