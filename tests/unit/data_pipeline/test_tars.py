import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.tars import CORRUPT, TRUNCATED, ShardWriter, read_pax, scan_tar, split_name, tar_names

WriteTar = Callable[..., Path]
LONG = "a-rather-long-folder-name/" * 9 + "é" * 60


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("./0001.JPG", ("./0001", "jpg")),
        ("a b/ünï côdé.png", ("a b/ünï côdé", "png")),
        ("dir.with.dots/1.seg.png", ("dir.with.dots/1", "seg.png")),
        ("my.photo.png", ("my", "photo.png")),
        ("README", None),
        ("._0001.jpg", None),
        ("dir.x/name", None),
    ],
)
def test_names_split_at_the_first_dot_of_the_basename(name: str, expected: tuple[str, str] | None) -> None:
    assert split_name(name) == expected


@given(st.text(st.sampled_from("ab./ é_"), min_size=1, max_size=12))
def test_names_split_as_webdataset_splits_them(name: str) -> None:
    prefix, suffix = webdataset.tariterators.base_plus_ext(name)
    expected = (prefix, suffix.lower()) if prefix and suffix else None
    assert split_name(name) == expected


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_offsets_lead_to_the_data_whatever_the_names(write_tar: WriteTar, format: int) -> None:
    members = [
        (f"{LONG}.png", b"picture"),
        (f"{LONG}.txt", b"words " * 200),
        ("a b.png", b""),
        ("ü.png", b"3"),
    ]
    path = write_tar("x.tar", members, format)
    scan = scan_tar(path)
    assert scan.damage is None
    data = path.read_bytes()
    found = {
        f"{group.key}.{suffix}": data[offset : offset + size]
        for group in scan.groups
        for suffix, (offset, size) in group.members.items()
    }
    assert found == dict(members)


def test_members_of_a_key_join_wherever_they_lie(write_tar: WriteTar) -> None:
    path = write_tar("x.tar", [("a.png", b"1"), ("b.png", b"2"), ("a.txt", b"3"), ("b.txt", b"4")])
    assert [(g.key, sorted(g.members)) for g in scan_tar(path).groups] == [
        ("a", ["png", "txt"]),
        ("b", ["png", "txt"]),
    ]


def test_a_repeated_member_begins_another_sample_of_the_key(write_tar: WriteTar) -> None:
    path = write_tar("x.tar", [("a.jpg", b"1"), ("a.txt", b"2"), ("a.png", b"3"), ("a.txt", b"4")])
    assert [(g.key, sorted(g.members)) for g in scan_tar(path).groups] == [
        ("a", ["jpg", "txt"]),
        ("a", ["png", "txt"]),
    ]


def test_folders_links_and_nameless_members_are_counted(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/a.png", tarfile.SYMTYPE), ("README", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
        info = tarfile.TarInfo("d/b.png")
        tar.addfile(info)
    scan = scan_tar(tmp_path / "x.tar")
    assert (scan.ignored, [group.key for group in scan.groups], scan.damage) == (3, ["d/b"], None)


def test_an_empty_tar_is_whole_and_an_empty_file_is_not(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    assert scan_tar(tmp_path / "empty.tar").damage is None
    (tmp_path / "nothing.tar").write_bytes(b"")
    damage = scan_tar(tmp_path / "nothing.tar").damage
    assert damage is not None
    assert damage.cause == TRUNCATED


@pytest.mark.parametrize("data", [b"x" * 5000, b"\x1f\x8b" + b"g" * 1000, b"\xff" * 512])
def test_what_is_no_tar_is_corrupt(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.tar").write_bytes(data)
    damage = scan_tar(tmp_path / "x.tar").damage
    assert damage is not None
    assert damage.cause == CORRUPT


def test_a_bad_header_midway_and_data_after_the_end_are_corrupt(write_tar: WriteTar) -> None:
    path = write_tar("x.tar", [("a.png", b"1"), ("b.png", b"2"), ("c.png", b"3")])
    whole = path.read_bytes()
    path.write_bytes(whole[:1024] + b"garbage!" + whole[1032:])
    scan = scan_tar(path)
    assert scan.damage is not None
    assert (scan.damage.cause, [group.key for group in scan.groups]) == (CORRUPT, ["a"])
    assert "byte 1024" in scan.damage.detail
    path.write_bytes(whole + whole)  # what `cat a.tar b.tar` makes
    scan = scan_tar(path)
    assert scan.damage is not None
    assert (scan.damage.cause, len(scan.groups)) == (CORRUPT, 3)


def test_a_header_with_a_negative_size_does_not_trap_the_reader(write_tar: WriteTar) -> None:
    path = write_tar("x.tar", [("a.png", b"1"), ("b.png", b"2")])
    data = bytearray(path.read_bytes())
    header = data[1024:1536]
    header[124:136] = b"\xff" * 10 + b"\xf8\x00"  # base-256 for -2048
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[1024:1536] = header
    path.write_bytes(data)
    scan = scan_tar(path)
    assert scan.damage is not None
    assert scan.damage.cause == CORRUPT


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, 10**6), format=st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]))
def test_a_tar_cut_anywhere_keeps_whole_samples_and_reports_the_cut(write_tar: WriteTar, cut: int, format: int) -> None:
    names = ["a", LONG, "c", "d"]
    path = write_tar("x.tar", [(f"{n}.{s}", b"data" * 200) for n in names for s in ("png", "txt")], format)
    whole = scan_tar(path)
    last = whole.groups[-1].members["txt"]
    end = -(-sum(last) // 512) * 512 + 512  # all data, and one zero block
    data = path.read_bytes()
    cut %= end
    path.write_bytes(data[:cut])
    scan = scan_tar(path)
    assert scan.damage is not None
    if cut:
        assert scan.damage.cause == TRUNCATED
    complete = [g for g in whole.groups if max(sum(place) for place in g.members.values()) <= cut]
    assert scan.groups[: len(complete)] == complete
    assert len(scan.groups) <= len(complete) + 1


def test_a_shard_is_a_function_of_its_samples_and_webdataset_reads_it(tmp_path: Path) -> None:
    samples = [("000", {"png": b"p", "txt": "ü".encode()}), ("001", {"png": b"", "txt": b"x"})]
    for name in ("a.tar", "b.tar"):
        with ShardWriter(tmp_path / name, {"T2I.test": "é"}) as writer:
            for key, members in samples:
                writer.add(key, members)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    assert read_pax(tmp_path / "a.tar") == {"T2I.test": "é"} == scan_tar(tmp_path / "a.tar").pax
    read = list(webdataset.WebDataset(str(tmp_path / "a.tar"), shardshuffle=False))
    assert [(sample["__key__"], {"png": sample["png"], "txt": sample["txt"]}) for sample in read] == samples


def test_a_failed_shard_leaves_no_file(tmp_path: Path) -> None:

    def failing() -> None:
        with ShardWriter(tmp_path / "a.tar") as writer:
            writer.add("0", {"txt": b"x"})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        failing()
    assert list(tmp_path.iterdir()) == []


def test_hidden_tars_are_not_part_of_a_set(tmp_path: Path) -> None:
    for name in ("b.tar", "sub/a.tar", ".x.tar", ".hidden/c.tar", "b.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(io.BytesIO().getvalue())
    assert tar_names(tmp_path) == ["b.tar", "sub/a.tar"]
