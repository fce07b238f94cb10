import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from data_pipeline.images import open_rgb
from data_pipeline.index import (
    CAUSES,
    Manifest,
    ShardSet,
    build_index,
    load_manifest,
    load_quarantine,
    print_table,
)

WriteTar = Callable[..., Path]
MakePicture = Callable[..., bytes]


def index(root: Path, **options: object) -> Manifest:
    """Index, and check what has to hold of every set."""
    manifest = build_index(root, progress=False, **options)  # type: ignore[arg-type]
    quarantine = load_quarantine(root)
    assert manifest.read == manifest.samples + len(quarantine)
    assert manifest.quarantined == dict(Counter(entry.cause for entry in quarantine))
    assert set(manifest.quarantined) <= set(CAUSES)
    assert len(ShardSet(root)) == manifest.samples
    assert load_manifest(root) == manifest
    return manifest


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_good_samples_are_indexed_and_read_back(raw_set: Callable[..., Path], picture: MakePicture) -> None:
    root = raw_set(3, 5, labels=True)
    manifest = index(root)
    assert (manifest.kind, manifest.samples, manifest.read) == ("raw", 15, 15)
    assert manifest.members == {"cls": 15, "png": 15, "txt": 15}
    assert [shard.name for shard in manifest.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    shards = ShardSet(root)
    for i in range(15):
        sample = shards.read_raw(i)
        assert (sample.key, sample.caption, sample.label) == (f"{i:06d}", f"a {i}", i % 10)
        assert sample.image == picture(number=i)
        assert shards.shard_of(i) == f"0000{i // 5}.tar"


def test_every_unusual_input_is_handled_or_set_aside_with_its_cause(
    tmp_path: Path, write_tar: WriteTar, picture: MakePicture
) -> None:
    good = picture()
    grey_16 = encoded(Image.fromarray(np.full((32, 32), 30000, np.uint16)), "PNG")
    animation = encoded(
        Image.new("RGB", (32, 32), (200, 0, 0)),
        "WEBP",
        save_all=True,
        append_images=[Image.new("RGB", (32, 32))],
    )
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8))
    whole = encoded(Image.new("RGB", (32, 32)), "WEBP", save_all=True, append_images=[noise], lossless=True)
    cut_animation = whole[: (start := whole.rindex(b"VP8L") + 13)] + bytes(len(whole) - start)
    assert open_rgb(cut_animation).size == (32, 32), "the first frame is whole"
    long_caption = "wörter " * 1428 + "ende"
    assert len(long_caption) == 10_000
    caption = ("txt", b"a caption")
    cases: list[tuple[str, list[tuple[str, bytes]], str | None]] = [
        ("plain", [("png", good), caption], None),
        ("cmyk", [("jpg", encoded(Image.new("CMYK", (32, 32)), "JPEG")), caption], None),
        ("grey16", [("png", grey_16), caption], None),
        ("animated", [("webp", animation), caption], None),
        ("rgba", [("png", encoded(Image.new("RGBA", (32, 32)), "PNG")), caption], None),
        ("long caption", [("png", good), ("txt", long_caption.encode())], None),
        ("näme with späces/日本", [("png", good), caption], None),
        ("from-json", [("jpeg", picture(kind="JPEG")), ("json", b'{"caption": "said in json"}')], None),
        ("byte-order-mark", [("png", good), ("txt", b"\xef\xbb\xbfmarked")], None),
        ("cut-picture", [("png", good[: len(good) // 2]), caption], "undecodable_image"),
        ("cut-animation", [("webp", cut_animation), caption], "undecodable_image"),
        ("no-bytes", [("png", b""), caption], "undecodable_image"),
        ("gif", [("png", encoded(Image.new("RGB", (32, 32)), "GIF")), caption], "undecodable_image"),
        ("one-pixel", [("png", encoded(Image.new("RGB", (1, 1)), "PNG")), caption], "too_small_image"),
        ("flat", [("png", encoded(Image.new("RGB", (99, 15)), "PNG")), caption], "too_small_image"),
        ("only-text", [caption], "missing_image"),
        ("only-json", [("json", b'{"caption": "x", "status": "failed_to_download"}')], "missing_image"),
        ("two.dots", [("png", good), ("txt", b"x")], "missing_image"),
        ("no-caption", [("png", good)], "missing_caption"),
        ("no-field", [("png", good), ("json", b'{"text": "x"}')], "missing_caption"),
        ("null-field", [("png", good), ("json", b'{"caption": null}')], "missing_caption"),
        ("empty", [("png", good), ("txt", b"")], "empty_caption"),
        ("blank", [("png", good), ("txt", b" \n\t")], "empty_caption"),
        ("empty-field", [("png", good), ("json", b'{"caption": " "}')], "empty_caption"),
        ("latin-1", [("png", good), ("txt", "grün".encode("latin-1"))], "bad_caption"),
        ("not-json", [("png", good), ("json", b"{caption:")], "bad_caption"),
        ("json-list", [("png", good), ("json", b'["caption"]')], "bad_caption"),
        ("number", [("png", good), ("json", b'{"caption": 7}')], "bad_caption"),
        ("surrogate", [("png", good), ("json", b'{"caption": "\\ud800"}')], "bad_caption"),
        ("label", [("png", good), caption, ("cls", b"-1")], "bad_label"),
        ("plain", [("png", good), caption], "duplicate_key"),
    ]
    write_tar("raw/0.tar", [(f"{key}.{suffix}", data) for key, members, _ in cases for suffix, data in members])
    manifest = index(tmp_path / "raw")
    expected = [(key.split(".")[0], cause) for key, _, cause in cases if cause]
    assert [(entry.key, entry.cause) for entry in load_quarantine(tmp_path / "raw")] == expected
    assert manifest.samples == sum(cause is None for *_, cause in cases)
    shards = ShardSet(tmp_path / "raw")
    kept = [shards.read_raw(i) for i in range(len(shards))]
    assert [sample.key for sample in kept] == [key for key, _, cause in cases if cause is None]
    assert all(open_rgb(sample.image).size == (32, 32) for sample in kept)
    captions = {sample.key: sample.caption for sample in kept}
    assert captions["long caption"] == long_caption
    assert captions["from-json"] == "said in json"
    assert captions["byte-order-mark"] == "marked"


def test_a_good_sample_is_no_duplicate_of_a_bad_one(tmp_path: Path, write_tar: WriteTar, picture: MakePicture) -> None:
    good = picture()
    members = [
        ("a.png", b"no picture"),
        ("a.txt", b"bad"),
        ("a.png", good),
        ("a.txt", b"good"),
        ("a.png", good),
        ("a.txt", b"x"),
    ]
    write_tar("raw/0.tar", members)
    manifest = index(tmp_path / "raw")
    assert manifest.quarantined == {"duplicate_key": 1, "undecodable_image": 1}
    assert ShardSet(tmp_path / "raw").read_raw(0).caption == "good"


def test_the_caption_field_can_be_chosen(tmp_path: Path, write_tar: WriteTar, picture: MakePicture) -> None:
    record = json.dumps({"caption": None, "short": "brief", "url": "u"}).encode()
    write_tar("raw/0.tar", [("a.png", picture()), ("a.txt", b"from txt"), ("a.json", record)])
    root = tmp_path / "raw"
    for key, caption in (("caption", "from txt"), ("short", "brief")):
        index(root, caption_key=key)
        assert ShardSet(root).read_raw(0).caption == caption
    assert index(root, caption_key="shrot").quarantined == {"missing_caption": 1}
    assert "caption, short, url" in load_quarantine(root)[0].detail


def test_min_size_can_be_chosen(raw_set: Callable[..., Path]) -> None:
    root = raw_set(1, 2)
    assert index(root, min_size=32).samples == 2
    assert index(root, min_size=33).quarantined == {"too_small_image": 2}


def test_a_truncated_tar_keeps_its_readable_samples(raw_set: Callable[..., Path]) -> None:
    root = raw_set(2, 4)
    path = root / "00001.tar"
    with tarfile.open(path) as tar:
        inside = tar.getmember("000006.png").offset_data + 20
    os.truncate(path, inside)
    manifest = index(root)
    assert (manifest.samples, manifest.read, manifest.quarantined) == (6, 7, {"truncated_tar": 1})
    entry = load_quarantine(root)[0]
    assert (entry.key, entry.shard) == ("000006", "00001.tar")
    assert "'000006.png'" in entry.detail
    assert "the 2 good samples before it are kept" in entry.detail


def test_a_cut_between_a_samples_members_takes_that_sample_once(raw_set: Callable[..., Path]) -> None:
    root = raw_set(1, 4)
    with tarfile.open(root / "00000.tar") as tar:
        between = tar.getmember("000002.txt").offset
    os.truncate(root / "00000.tar", between)
    manifest = index(root)
    assert (manifest.samples, manifest.quarantined) == (2, {"truncated_tar": 1})
    assert load_quarantine(root)[0].key == "000002"


def test_a_cut_between_samples_is_reported_without_a_key(raw_set: Callable[..., Path]) -> None:
    root = raw_set(1, 4)
    with tarfile.open(root / "00000.tar") as tar:
        between = tar.getmember("000003.png").offset
    os.truncate(root / "00000.tar", between)
    manifest = index(root)
    assert (manifest.samples, manifest.read, manifest.quarantined) == (3, 4, {"truncated_tar": 1})
    assert load_quarantine(root)[0].key is None


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6))
def test_counts_add_up_wherever_a_tar_is_cut(raw_set: Callable[..., Path], cut: int) -> None:
    root = raw_set(2, 3)
    path = root / "00001.tar"
    os.truncate(path, cut % path.stat().st_size)
    manifest = index(root)
    assert 3 <= manifest.samples <= 6
    with tarfile.open(root / "00000.tar") as tar:
        data_end = tar.getmember("000002.txt").offset_data + 512
    if cut % (20 * 512) < data_end:
        assert manifest.quarantined == {"truncated_tar": 1}


def test_a_file_that_is_no_tar_does_not_stop_the_others(raw_set: Callable[..., Path]) -> None:
    root = raw_set(1, 3)
    (root / "zzz.tar").write_bytes(b"<html>503 Service Unavailable</html>" * 99)
    manifest = index(root)
    assert (manifest.samples, manifest.quarantined) == (3, {"corrupt_tar": 1})


def test_a_key_in_two_shards_is_kept_once(raw_set: Callable[..., Path]) -> None:
    root = raw_set(2, 3)
    (root / "00002.tar").write_bytes((root / "00000.tar").read_bytes())
    manifest = index(root)
    assert (manifest.samples, manifest.read, manifest.quarantined) == (6, 9, {"duplicate_key": 3})
    assert {entry.shard for entry in load_quarantine(root)} == {"00002.tar"}
    # Once the first is gone, the second is no duplicate any more.
    (root / "00000.tar").unlink()
    manifest = index(root)
    assert (manifest.samples, manifest.quarantined, manifest.reused) == (6, {}, 2)
    assert ShardSet(root).key(3) == "000000"


def test_an_unchanged_set_is_not_read_again(raw_set: Callable[..., Path]) -> None:
    root = raw_set(3, 4)
    (root / "00001.tar").write_bytes((root / "00001.tar").read_bytes()[:5000])
    first = index(root)
    before = (root / "manifest.json").read_bytes(), (root / "quarantine.jsonl").read_bytes()
    again = index(root)
    assert (first.reused, again.reused) == (0, 3)
    assert ((root / "manifest.json").read_bytes(), (root / "quarantine.jsonl").read_bytes()) == before
    status = (root / "00000.tar").stat()
    os.utime(root / "00000.tar", ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))
    assert index(root).reused == 3, "another time but the same checksum is the same shard"
    assert index(root, min_size=17).reused == 0, "other settings are another verdict"


def test_a_changed_shard_is_read_again_and_the_rest_is_not(
    raw_set: Callable[..., Path], write_tar: WriteTar, picture: MakePicture
) -> None:
    root = raw_set(3, 4)
    index(root)
    write_tar("raw/00001.tar", [("new.png", picture()), ("new.txt", b"new")])
    manifest = index(root)
    assert (manifest.reused, manifest.samples) == (2, 9)
    (root / "00002.tar.idx.npz").write_bytes(b"damaged")
    assert index(root).reused == 2


def test_processes_give_the_same_index(raw_set: Callable[..., Path]) -> None:
    root = raw_set(3, 4)
    one = index(root)
    for path in root.glob("*.npz"):
        path.unlink()
    assert index(root, workers=2) == one


def test_an_interrupted_indexing_goes_on_where_it_stopped(
    raw_set: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = raw_set(3, 4)
    monkeypatch.setattr("data_pipeline.index.verify_shard", _interrupted_at("00002.tar"))
    with pytest.raises(KeyboardInterrupt):
        build_index(root, progress=False)
    assert not (root / "manifest.json").exists()
    monkeypatch.undo()
    assert index(root).reused == 2


def _interrupted_at(name: str) -> Callable[..., object]:
    from data_pipeline.verify import verify_shard

    def verify(path: Path, shard: str, settings: object) -> object:
        if shard == name:
            raise KeyboardInterrupt
        return verify_shard(path, shard, settings)  # type: ignore[arg-type]

    return verify


def test_a_folder_without_tars_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \.tar files.*t2i data ingest"):
        build_index(tmp_path)
    (tmp_path / "a.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match=r"unpack a\.tar\.gz"):
        build_index(tmp_path)
    with pytest.raises(ValueError, match="not a folder"):
        build_index(tmp_path / "nowhere")


def test_shards_in_subfolders_and_ignored_members(tmp_path: Path, write_tar: WriteTar, picture: MakePicture) -> None:
    write_tar("raw/part one/0.tar", [("README", b""), ("a.png", picture()), ("a.txt", b"x")])
    manifest = index(tmp_path / "raw")
    assert (manifest.shards[0].name, manifest.ignored, manifest.samples) == ("part one/0.tar", 1, 1)


def test_members_are_counted_over_good_samples(tmp_path: Path, write_tar: WriteTar, picture: MakePicture) -> None:
    def sample(key: str, *members: tuple[str, bytes]) -> list[tuple[str, bytes]]:
        return [(f"{key}.{suffix}", data) for suffix, data in (("png", picture()), ("txt", b"x"), *members)]

    write_tar("raw/0.tar", [*sample("a", ("cls", b"1")), *sample("b"), *sample("bad", ("cls", b"-1"))])
    write_tar("raw/1.tar", [*sample("a", ("cls", b"1"), ("json", b"{}")), *sample("c", ("cls", b"2"))])
    for _ in range(2):
        manifest = index(tmp_path / "raw")
        assert manifest.members == {"cls": 2, "png": 3, "txt": 3}
        assert manifest.quarantined == {"duplicate_key": 1, "bad_label": 1}
        assert [manifest.lacking(suffix) for suffix in ("png", "cls", "json")] == [0, 1, 3]
    (tmp_path / "raw" / "0.tar").unlink()
    assert index(tmp_path / "raw").members == {"cls": 2, "json": 1, "png": 2, "txt": 2}


def test_shards_in_a_linked_folder(tmp_path: Path, raw_set: Callable[..., Path]) -> None:
    target = raw_set(2, 3)
    (tmp_path / "set").mkdir()
    for name in ("disk2", "again", ".hidden"):
        (tmp_path / "set" / name).symlink_to(target)
    manifest = index(tmp_path / "set")
    assert [shard.name for shard in manifest.shards] == ["again/00000.tar", "again/00001.tar"]
    assert manifest.samples == 6


def test_the_table_shows_every_cause_and_adds_up(raw_set: Callable[..., Path]) -> None:
    root = raw_set(2, 4)
    os.truncate(root / "00001.tar", 3000)
    manifest = index(root)
    console = Console(record=True, width=120, file=io.StringIO())
    print_table(manifest, console)
    text = console.export_text()
    for word in ("good", "truncated_tar", "read", "quarantine.jsonl"):
        assert word in text
    print_table(index(root), console)
    assert "2 of 2 shards unchanged" in console.export_text()


def test_the_index_is_small(tmp_path: Path, write_tar: WriteTar, picture: MakePicture) -> None:
    data = picture()
    members = [
        (f"{n:09d}.{suffix}", data if suffix == "png" else b"x") for n in range(500) for suffix in ("png", "txt")
    ]
    path = write_tar("raw/0.tar", members)
    index(tmp_path / "raw")
    assert path.with_name("0.tar.idx.npz").stat().st_size < 500 * 16 + 3000
