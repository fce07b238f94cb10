import contextlib
import io
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hn

from data_pipeline.npy import read_npy

KINDS = [np.uint16, np.int16, np.int64, np.uint8, np.bool_, np.float32, np.dtype(">u2"), np.dtype("S3")]


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version)
    return stream.getvalue()


arrays = st.sampled_from(KINDS).flatmap(
    lambda kind: hn.arrays(kind, hn.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
)


@given(arrays)
def test_what_numpy_writes_is_read(array: np.ndarray) -> None:
    read = read_npy(npy(np.ascontiguousarray(array).reshape(array.shape)))
    assert (read.dtype, read.shape) == (array.dtype, array.shape)
    assert read.tobytes() == array.tobytes()
    assert not read.flags.writeable


@given(arrays, st.data())
def test_damaged_files_are_value_errors_or_other_arrays(array: np.ndarray, data: st.DataObject) -> None:
    whole = npy(np.ascontiguousarray(array).reshape(array.shape))
    with pytest.raises(ValueError):  # noqa: PT011 (numpy words it)
        read_npy(whole + b"\0")
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ValueError):  # noqa: PT011
        read_npy(whole[:cut])
    changed = bytearray(whole)
    changed[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError):
        assert read_npy(bytes(changed)).nbytes == array.nbytes


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: npy(np.zeros(3), (2, 0)), "not npy version 1.0"),
        (lambda: npy(np.asfortranarray(np.zeros((2, 3)))), "Fortran order"),
        (lambda: npy(np.array([None])), "objects"),
        (lambda: npy(np.zeros(4)).replace(b"(4,), ", b"(-1,) "), "damaged header"),
        (lambda: npy(np.zeros(0)).replace(b"(0,), ", b"(0,-1)"), "damaged header"),
        (lambda: npy(np.zeros(4)).replace(b"}", b" "), "damaged header"),
        (lambda: b"", "magic"),
        (lambda: b"PK\3\4" + bytes(100), "magic"),
    ],
)
def test_other_files_are_refused(data: Callable[[], bytes], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_npy(data())
