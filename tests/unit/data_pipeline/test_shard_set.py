import errno
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from data_pipeline.index import RawSample, ShardSet, build_index, load_manifest
from data_pipeline.shard_index import file_sha256

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
