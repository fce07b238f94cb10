import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.index import ShardSet, build_index
from data_pipeline.places import Places
from data_pipeline.shard_index import Settings, ShardIndex, load_shard_index, narrow, pack_keys, save_shard_index

SUFFIXES = ["cls", "codes.npy", "txt"]


def index_of(keys: list[str], offsets_NM: np.ndarray, sizes_NM: np.ndarray, duplicate_N: np.ndarray) -> ShardIndex:
    keys_K, ends_N = pack_keys(keys)
    return ShardIndex(
        name="0.tar", bytes=1, mtime_ns=1, sha256="0" * 64, settings=Settings(), encoding=None, read=len(keys), ignored=0,
        rejected=[], suffixes=SUFFIXES, keys_K=keys_K, key_ends_N=ends_N, offsets_NM=offsets_NM, sizes_NM=sizes_NM,
        duplicate_N=duplicate_N,
    )  # fmt: skip


@st.composite
def indexes(draw: st.DrawFn) -> ShardIndex:
    keys = draw(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), max_size=8))
    # A name in a tar is bytes, and what is not UTF-8 in it a lone surrogate.
    keys = [key + draw(st.sampled_from(["", "\udcff", "é"])) for key in keys]
    cells = st.lists(st.integers(-1, draw(st.sampled_from([100, 2**15, 2**31, 2**40]))), min_size=3, max_size=3)
    offsets = draw(st.lists(cells, min_size=len(keys), max_size=len(keys)))
    offsets_NM = np.array(offsets, np.int64).reshape(len(keys), 3)
    sizes_NM = np.where(offsets_NM < 0, -1, offsets_NM // 2)
    duplicates = draw(st.lists(st.booleans(), min_size=len(keys), max_size=len(keys)))
    return index_of(keys, offsets_NM, sizes_NM, np.array(duplicates, bool))


@given(indexes())
def test_places_are_those_of_the_index_without_duplicates(index: ShardIndex) -> None:
    places = Places(index)
    rows = np.flatnonzero(~index.duplicate_N).tolist()
    assert len(places) == len(rows)
    for row, original in enumerate(rows):
        assert places.key(row) == index.key(original)
        offsets, sizes = index.offsets_NM[original].tolist(), index.sizes_NM[original].tolist()
        whole = zip(SUFFIXES, offsets, sizes, strict=True)
        assert places.members(row) == [place for place in whole if place[1] >= 0]


@given(st.lists(st.integers(-1, 2**62)), st.sampled_from([0, 2**15 - 1, 2**15, 2**31 - 1, 2**31, 2**62]))
def test_narrow_numbers_are_the_same_numbers(numbers: list[int], largest: int) -> None:
    wide = np.minimum(np.array(numbers, np.int64), largest)
    assert narrow(wide).tolist() == wide.tolist()
    size = 2 if wide.max(initial=0) < 2**15 else 4 if wide.max(initial=0) < 2**31 else 8
    assert narrow(wide).itemsize == size


def test_ten_thousand_samples_take_little_memory() -> None:
    count = 10_000
    starts_N = np.arange(count, dtype=np.int64) * 2560
    offsets_NM = np.stack([np.full(count, -1), starts_N + 512, starts_N + 2048], 1)
    sizes_NM = np.stack([np.full(count, -1), np.full(count, 640), np.full(count, 90)], 1)
    index = index_of([f"{number:09d}" for number in range(count)], offsets_NM, sizes_NM, np.zeros(count, bool))
    tracemalloc.start()
    try:
        places = Places(index)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Nine bytes of key and four of where it ends; three offsets of four bytes and three sizes of two.
    assert held < count * (9 + 4 + 12 + 6) + 5000
    assert places.key(count - 1) == "000009999"


def test_indexes_with_wide_numbers_are_read(tmp_path: Path) -> None:
    """What an earlier version wrote: every number in eight bytes."""
    index = index_of(
        ["a", "b"], np.array([[1, -1, 3], [4, 5, -1]]), np.array([[1, -1, 3], [4, 5, -1]]), np.zeros(2, bool)
    )
    tar = tmp_path / "0.tar"
    save_shard_index(tar, index)
    narrowed = load_shard_index(tar)
    assert narrowed is not None
    assert narrowed.offsets_NM.dtype == np.int16
    path = tmp_path / "0.tar.idx.npz"
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    for name in ("key_ends", "offsets", "sizes"):
        arrays[name] = arrays[name].astype(np.int64)
    np.savez_compressed(path, **arrays)
    wide = load_shard_index(tar)
    assert wide is not None
    assert wide.offsets_NM.dtype == np.int64
    assert [Places(wide).members(row) for row in range(2)] == [Places(narrowed).members(row) for row in range(2)]


def test_a_damaged_index_is_no_index(raw_set: Callable[..., Path]) -> None:
    root = raw_set(1, 3)
    build_index(root, progress=False)
    tar, path = root / "00000.tar", root / "00000.tar.idx.npz"
    whole = path.read_bytes()
    assert load_shard_index(tar) is not None
    for place in range(0, len(whole), 5):
        changed = bytearray(whole)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        index = load_shard_index(tar)
        assert index is None or len(Places(index)) == 3
    for size in range(0, len(whole), 50):
        path.write_bytes(whole[:size])
        assert load_shard_index(tar) is None
    path.unlink()
    assert load_shard_index(tar) is None


def test_samples_that_an_earlier_shard_has_are_left_out(
    write_tar: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    for shard, keys in enumerate(["ab", "bcad", "e"]):
        members = [
            (f"{key}.{kind}", data) for key in keys for kind, data in (("png", picture()), ("txt", b"%d" % shard))
        ]
        write_tar(f"raw/{shard}.tar", members)
    root = write_tar("raw/3.tar", [("f.png", picture()), ("f.txt", b"3")]).parent
    build_index(root, progress=False)
    shards = ShardSet(root)
    assert [(shards.key(i), shards.read_raw(i).caption) for i in range(len(shards))] == [
        ("a", "0"), ("b", "0"), ("c", "1"), ("d", "1"), ("e", "2"), ("f", "3"),
    ]  # fmt: skip
