import errno
import json
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.encode import encoded_members
from data_pipeline.index import EncodedSample, RawSample, ShardSet, build_index, load_manifest
from data_pipeline.shard_index import file_sha256
from data_pipeline.tars import ShardWriter
from data_pipeline.verify import ENCODING_RECORD

RawSet = Callable[..., Path]


def test_members_can_be_chosen(raw_set: RawSet, picture: Callable[..., bytes]) -> None:
    root = raw_set(1, 3, labels=True)
    build_index(root, progress=False)
    shards = ShardSet(root)
    assert shards.members(1) == {"png": picture(number=1), "txt": b"a 1", "cls": b"1"}
    assert shards.members(1, ["txt", "absent"]) == {"txt": b"a 1"}
    assert shards.read(1, ["txt"]) == RawSample("000001", b"", "a 1", None)


def test_distant_members_are_read_apart(write_tar: Callable[..., Path], picture: Callable[..., bytes]) -> None:
    path = write_tar("raw/0.tar", [("a.png", picture()), ("a.bin", b"\0" * 100_000), ("a.txt", b"x")])
    build_index(path.parent, progress=False)
    assert ShardSet(path.parent).read(0) == RawSample("a", picture(), "x")


def test_numbers_outside_the_set_are_index_errors(raw_set: RawSet) -> None:
    root = raw_set(2, 3)
    build_index(root, progress=False)
    for i in (-1, 6):
        with pytest.raises(IndexError):
            ShardSet(root).key(i)


def test_a_set_that_changed_since_indexing_is_refused(raw_set: RawSet) -> None:
    root = raw_set(2, 3)
    with pytest.raises(ValueError, match=r"no manifest\.json.*t2i data index"):
        ShardSet(root)
    build_index(root, progress=False)
    whole = (root / "00001.tar").read_bytes()
    (root / "00001.tar").write_bytes(whole[:-512])
    with pytest.raises(ValueError, match=rf"00001\.tar.*has {len(whole) - 512} bytes on disk.*t2i data index"):
        load_manifest(root)
    (root / "00001.tar").unlink()
    with pytest.raises(ValueError, match=r"00001\.tar.* is gone"):
        ShardSet(root)


def same_size(path: Path) -> bytes:
    """The bytes of a tar of `raw_set` with another caption, of the same size."""
    changed = path.read_bytes().replace(b"a 1", b"b 1")
    assert changed != path.read_bytes()
    return changed


def test_a_shard_that_changed_but_not_its_size_is_refused(raw_set: RawSet) -> None:
    root = raw_set(2, 3)
    build_index(root, progress=False)
    path = root / "00000.tar"
    path.write_bytes(same_size(path))
    with pytest.raises(ValueError, match=r"00000\.tar of .*raw has changed since it was indexed: run `t2i data index"):
        ShardSet(root)
    build_index(root, progress=False)
    assert ShardSet(root).read(1).caption == "b 1"


def test_a_shard_replaced_by_an_older_file_is_refused(raw_set: RawSet) -> None:
    root = raw_set(2, 3)
    build_index(root, progress=False)
    path = root / "00000.tar"
    path.write_bytes(same_size(path))
    os.utime(path, ns=(0, 0))
    with pytest.raises(ValueError, match="has changed since it was indexed"):
        load_manifest(root)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were hashed, in order."""
    names: list[str] = []

    def count(path: Path) -> str:
        names.append(path.name)
        return file_sha256(path)

    monkeypatch.setattr("data_pipeline.shard_index.file_sha256", count)
    return names


def test_a_copied_set_is_the_same_set_and_hashed_once(raw_set: RawSet, tmp_path: Path, hashed: list[str]) -> None:
    root = raw_set(2, 3)
    manifest = build_index(root, progress=False)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    assert hashed == []
    for _ in range(2):
        assert load_manifest(copy) == manifest
        assert ShardSet(copy).read(4).caption == "a 4"
        assert hashed == ["00000.tar", "00001.tar"]


def test_indexing_a_copy_notes_its_times(raw_set: RawSet, tmp_path: Path, hashed: list[str]) -> None:
    root = raw_set(2, 3)
    manifest = build_index(root, progress=False)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    again = build_index(copy, progress=False)
    assert (again, again.reused) == (manifest, 2)
    assert [shard.mtime_ns for shard in again.shards] == [
        path.stat().st_mtime_ns for path in sorted(copy.glob("*.tar"))
    ]
    hashed.clear()
    (copy / "00000.tar.idx.npz").unlink()
    assert load_manifest(copy) == again, "times that agree need no index"
    assert hashed == []


def test_a_large_copy_is_hashed_where_it_is_read(
    raw_set: RawSet, tmp_path: Path, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = raw_set(3, 3)
    build_index(root, progress=False)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)
    (copy / "00002.tar").write_bytes((copy / "00002.tar").read_bytes().replace(b"a 8", b"b 8"))
    monkeypatch.setattr("data_pipeline.manifest._CHECKED_AT_ONCE", 1000)
    shards = ShardSet(copy)
    assert hashed == []
    assert [shards.read(i).caption for i in range(3)] == ["a 0", "a 1", "a 2"]
    assert ShardSet(copy).read(0).caption == "a 0"
    assert hashed == ["00000.tar"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"00002\.tar of .* has changed since it was indexed"):
            shards.read(6)


def test_a_copy_in_a_folder_that_cannot_be_written_is_read(raw_set: RawSet, monkeypatch: pytest.MonkeyPatch) -> None:
    root = raw_set(1, 3)
    build_index(root, progress=False)
    os.utime(root / "00000.tar", ns=(0, 0))

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "read-only file system")

    monkeypatch.setattr("data_pipeline.shard_index.write_bytes", refuse)
    assert ShardSet(root).read(2).caption == "a 2"


def test_a_manifest_of_another_version_is_refused(raw_set: RawSet) -> None:
    root = raw_set(1, 3)
    build_index(root, progress=False)
    text = (root / "manifest.json").read_text()
    (root / "manifest.json").write_text(text.replace('"version": 3', '"version": 99'))
    with pytest.raises(ValueError, match="not version 3"):
        ShardSet(root)
    for damaged, message in (
        ("{", "not JSON"),
        ("[]", "not version 3"),
        (text.replace('"settings"', '"setings"'), "is damaged .*: run `t2i data index"),
        (text.replace('"samples": 3', '"samples": 4'), "is damaged .*: run `t2i data index"),
    ):
        assert damaged != text
        (root / "manifest.json").write_text(damaged)
        with pytest.raises(ValueError, match=message):
            ShardSet(root)
    with pytest.raises(ValueError, match=r"00000\.tar is not a folder"):
        ShardSet(root / "00000.tar")


def test_an_index_that_is_not_the_manifests_is_refused(raw_set: RawSet) -> None:
    root = raw_set(2, 3)
    build_index(root, progress=False)
    (root / "00000.tar.idx.npz").write_bytes((root / "00001.tar.idx.npz").read_bytes())
    with pytest.raises(ValueError, match=r"index of shard .*00000\.tar does not belong"):
        ShardSet(root).read(0)


def test_read_errors_name_key_shard_and_offset(raw_set: RawSet) -> None:
    root = raw_set(1, 3)
    build_index(root, progress=False)
    shards = ShardSet(root)
    shards.read(0)  # what changes later is noticed no more
    path = root / "00000.tar"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"a 1", b"\xff\xff\xff"))  # same size, so only reading can tell
    with pytest.raises(ValueError, match=r"'000001' at byte \d+ of shard .*00000\.tar is unreadable: txt is not UTF-8"):
        shards.read(1)
    path.write_bytes(whole[:600])
    with pytest.raises(
        ValueError, match=r"'000002' at byte \d+ of shard .*00000\.tar.*the file ends 1027 bytes too early"
    ):
        shards.read(2)


@pytest.fixture(scope="module")
def seventy(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """An encoded set of 70 samples, more than are asked for at once, in shards of 15."""
    root = tmp_path_factory.mktemp("seventy")
    write_set(root, 70, 15)
    return ShardSet(root)


def write_set(root: Path, samples: int, each: int) -> None:
    encoding = {"grid": [2, 2], "codebook_size": 300, "text_encoder_sha256": "1" * 64}
    record = {ENCODING_RECORD: json.dumps(encoding)}
    for start in range(0, samples, each):
        with ShardWriter(root / f"{start:05d}.tar", record) as writer:
            for number in range(start, min(start + each, samples)):
                codes, states = (
                    np.arange(number, number + 4).reshape(2, 2),
                    torch.full((number % 3 + 1, 2), float(number)),
                )
                writer.add(f"{number:06d}", encoded_members(codes, f"caption {number}", number % 7, states))
    build_index(root, progress=False)


def plain(sample: RawSample | EncodedSample) -> tuple[object, ...]:
    assert isinstance(sample, EncodedSample)
    assert sample.states is not None
    return sample.key, sample.codes.tolist(), sample.caption, sample.label, sample.states.tolist()


@given(numbers=st.lists(st.integers(0, 69), max_size=150))
def test_many_samples_at_once_are_those_read_one_by_one(seventy: ShardSet, numbers: list[int]) -> None:
    read = [plain(sample) for sample in seventy.read_many(numbers)]
    assert read == [plain(seventy.read(i)) for i in numbers]
    for i, (key, codes, caption, label, states) in zip(numbers, read, strict=True):
        assert (key, codes) == (f"{i:06d}", [[i, i + 1], [i + 2, i + 3]])
        assert (caption, label, states) == (f"caption {i}", i % 7, [[float(i)] * 2] * (i % 3 + 1))


def test_batches_of_raw_samples_have_no_members_that_nobody_asked_for(
    write_tar: Callable[..., Path], picture: Callable[..., bytes]
) -> None:
    members = [("a.png", picture()), ("a.txt", b"x"), ("a.bin", b"\0" * 100_000)]
    root = write_tar("raw/0.tar", members).parent
    build_index(root, progress=False)
    shards = ShardSet(root)
    assert shards.read_many([0, 0]) == [RawSample("a", picture(), "x")] * 2
    with (root / "0.tar").open("r+b") as file:
        file.truncate(4096)  # after the caption
    assert shards.read_many([0]) == [RawSample("a", picture(), "x")]


def test_batches_with_numbers_outside_the_set_are_index_errors(seventy: ShardSet) -> None:
    for numbers in ([3, -1], [70], [2**40]):
        with pytest.raises(IndexError, match=rf"sample {numbers[-1]} of 70 in "):
            seventy.read_many(numbers)
    assert seventy.read_many([]) == []


def test_one_unreadable_sample_of_a_batch_is_named(tmp_path: Path) -> None:
    write_set(tmp_path, 6, 3)
    shards = ShardSet(tmp_path)
    shards.read_many([0, 3])
    path = tmp_path / "00003.tar"
    path.write_bytes(path.read_bytes().replace(b"caption 4", b"\xff" * 9))
    assert len(shards.read_many([0, 1, 2, 3, 5])) == 5
    with pytest.raises(ValueError, match=r"'000004' at byte \d+ of shard .*00003\.tar is unreadable: txt is not UTF-8"):
        shards.read_many([0, 5, 4, 1])


def test_threads_read_batches_with_few_open_files(seventy: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.shard_set._OPEN_FILES", 1)
    shards = ShardSet(seventy.root)
    start = threading.Barrier(4)

    def read_all(step: int) -> list[str]:
        start.wait()
        return [sample.key for _ in range(3) for sample in shards.read_many([i * step % 70 for i in range(70)])]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read_all, (1, 3, 9, 11)))
    for step, keys in zip((1, 3, 9, 11), results, strict=True):
        assert keys == [f"{i * step % 70:06d}" for i in range(70)] * 3


def test_many_threads_and_few_open_files(raw_set: RawSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_pipeline.shard_set._OPEN_FILES", 2)
    root = raw_set(6, 5)
    build_index(root, progress=False)
    shards = ShardSet(root)
    start = threading.Barrier(4)

    def read_all(step: int) -> list[str]:
        start.wait()
        return [shards.read(i * step % 30).caption for i in range(30)]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(read_all, (1, 7, 11, 13)))
    for step, captions in zip((1, 7, 11, 13), results, strict=True):
        assert captions == [f"a {i * step % 30}" for i in range(30)]


def test_the_digest_tells_sets_apart(raw_set: RawSet) -> None:
    root = raw_set(2, 3)
    first = build_index(root, progress=False).digest
    assert load_manifest(root).digest == first
    (root / "00001.tar").unlink()
    assert build_index(root, progress=False).digest != first
