import errno
import io
import json
import os
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from data_pipeline.images import open_rgb
from data_pipeline.index import ShardSet, build_index
from data_pipeline.ingest import IngestReport, ingest, print_report

MakePicture = Callable[..., bytes]


def run(source: Path, out: Path, **options: Any) -> IngestReport:
    """Ingest and index; check that what was taken is what the index finds."""
    report = ingest(source, out, progress=False, **options)
    refused = refusals(out)
    assert report.quarantined == dict(Counter(entry["cause"] for entry in refused))
    assert report.read == report.samples + len(refused)
    assert json.loads((out / "ingest.json").read_text())["samples"] == report.samples
    manifest = build_index(out, progress=False)
    if report.kind != "tars":
        assert manifest.read == report.samples
    return report


def refusals(out: Path) -> list[dict[str, Any]]:
    path = out / "ingest_quarantine.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def captions(out: Path) -> dict[str, str]:
    """Caption by source file, through the stored mapping from keys to sources."""
    shards = ShardSet(out)
    sources = [json.loads(shards.members(i, ["json"])["json"])["source"] for i in range(len(shards))]
    return {source: shards.read_raw(i).caption for i, source in enumerate(sources)}


@pytest.fixture
def pictures(tmp_path: Path, picture: MakePicture) -> Path:
    """A folder with five pictures and a file that is none."""
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b c.jpg", "ünï.webp", "sub/日本.PNG", "z.jpeg")):
        kind = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}.get(name.rpartition(".")[2], "PNG")
        (folder / name).write_bytes(picture(number=number, kind=kind))
    (folder / "readme.md").write_text("no picture")
    return folder


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_a_table_of_pictures_becomes_shards(pictures: Path, tmp_path: Path) -> None:
    names = ["z.jpeg", "b c.jpg", "sub/日本.PNG", "ünï.webp"]
    rows = [{"file": name, "text": f" Caption OF {name} ", "class": n} for n, name in enumerate(names)]
    source = table(tmp_path / "t.json", rows)
    out = tmp_path / "out"
    options = {"images": pictures, "image_field": "file", "caption_field": "text", "label_field": "class"}
    report = run(source, out, shard_size=3, **options)
    assert report == IngestReport("table", 4, 4, {}, unlisted=1, ignored=1, shards=2, written=2)
    shards = ShardSet(out)
    assert [shards.key(i) for i in range(4)] == [f"{i:09d}" for i in range(4)]
    for i, name in enumerate(names):
        sample = shards.read_raw(i)
        assert sample.image == (pictures / name).read_bytes(), "stored byte for byte"
        assert (sample.caption, sample.label) == (f"Caption OF {name}", i)
        assert json.loads(shards.members(i)["json"]) == {"source": name, "row": i}
    run(source, out, shard_size=3, lowercase=True, **options)
    assert captions(out)["b c.jpg"] == "caption of b c.jpg"


def test_what_cannot_be_taken_is_listed_with_its_cause(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.png").write_bytes((pictures / "a.png").read_bytes())
    cases: list[tuple[Any, str | None]] = [
        ({"image": "a.png", "caption": "good", "n": 1}, None),
        ({"image": "a.png", "caption": "another of the same", "n": 2.0}, None),
        ({"image": "gone.png", "caption": "x", "n": 1}, "missing_image"),
        ({"image": "", "caption": "x", "n": 1}, "missing_image"),
        ({"caption": "x", "n": 1}, "missing_image"),
        ({"image": None, "caption": "x", "n": 1}, "missing_image"),
        ({"image": 17, "caption": "x", "n": 1}, "missing_image"),
        ({"image": "../outside.png", "caption": "x", "n": 1}, "outside_folder"),
        ({"image": str(tmp_path / "outside.png"), "caption": "x", "n": 1}, "outside_folder"),
        ({"image": str(pictures / "z.jpeg"), "caption": "absolute", "n": 1}, None),
        ({"image": "./sub/../a.png", "caption": "roundabout", "n": 1}, None),
        ({"image": "readme.md", "caption": "x", "n": 1}, "unsupported_image"),
        ({"image": "clip.gif", "caption": "x", "n": 1}, "unsupported_image"),
        ({"image": "a.png", "n": 1}, "missing_caption"),
        ({"image": "a.png", "caption": None, "n": 1}, "missing_caption"),
        ({"image": "a.png", "caption": " \n", "n": 1}, "empty_caption"),
        ({"image": "a.png", "caption": ["x"], "n": 1}, "bad_caption"),
        ({"image": "a.png", "caption": "\ud800", "n": 1}, "bad_caption"),
        ({"image": "a.png", "caption": "x", "n": "one"}, "bad_label"),
        ({"image": "a.png", "caption": "x", "n": -1}, "bad_label"),
        ({"image": "a.png", "caption": "x", "n": 1.5}, "bad_label"),
        ({"image": {"bytes": "89504e47"}, "caption": "x", "n": 1}, "missing_image"),
        ({"image": "a.png", "caption": "x", "n": None}, "bad_label"),
        (["a.png", "x"], "bad_row"),
    ]
    source = table(tmp_path / "t.json", [row for row, _ in cases])
    report = run(source, tmp_path / "out", images=pictures, label_field="n")
    expected = [(number, cause) for number, (_, cause) in enumerate(cases) if cause]
    listed = refusals(tmp_path / "out")
    assert [(entry["row"], entry["cause"]) for entry in listed] == expected
    assert any("field 'image' holds a dict, not a path" in entry["detail"] for entry in listed)
    assert (report.read, report.samples, report.unlisted) == (len(cases), 4, 3)
    assert ShardSet(tmp_path / "out").key(2) == "000000009", "the key is the row's number"


def test_names_match_however_their_accents_are_composed(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": unicodedata.normalize("NFD", "ünï.webp"), "caption": "x"}]
    report = run(table(tmp_path / "t.json", rows), tmp_path / "out", images=pictures)
    assert (report.samples, report.unlisted) == (1, 4)


def test_the_tables_own_folder_is_the_default(pictures: Path, tmp_path: Path) -> None:
    (pictures / "captions.csv").write_text("image,caption\na.png,one\nsub/日本.PNG,two\n", encoding="utf-8")
    report = run(pictures / "captions.csv", pictures / "shards")
    assert (report.samples, report.unlisted, report.ignored) == (2, 3, 1)
    again = run(pictures / "captions.csv", pictures / "shards")
    assert (again.unlisted, again.ignored, again.written) == (3, 1, 0)


def test_a_wrong_field_name_is_answered_with_the_right_ones(pictures: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "t.json", [{"file": "a.png", "name": "x"}])
    with pytest.raises(ValueError, match="no field 'image': choose among file, name"):
        ingest(source, tmp_path / "out", images=pictures)
    assert not (tmp_path / "out").exists()


def test_pairs_of_pictures_and_texts(pictures: Path, tmp_path: Path) -> None:
    for name, text in (("a", "ONE"), ("b c", " "), ("sub/日本", "two"), ("orphan", "three")):
        (pictures / f"{name}.txt").write_text(text)
    (pictures / "z.txt").write_bytes(b"\xff\xfe")
    report = run(pictures, tmp_path / "out", lowercase=True)
    assert captions(tmp_path / "out") == {"a.png": "one", "sub/日本.PNG": "two"}
    assert report.quarantined == {
        "missing_image": 1,
        "missing_caption": 1,
        "empty_caption": 1,
        "bad_caption": 1,
    }
    assert (report.kind, report.read, report.ignored) == ("pairs", 6, 1)


def test_pictures_that_share_a_name_share_its_caption(tmp_path: Path, picture: MakePicture) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, kind in (("a.jpg", "JPEG"), ("a.png", "PNG")):
        (folder / name).write_bytes(picture(kind=kind))
    (folder / "a.txt").write_text("both")
    assert run(folder, tmp_path / "out").samples == 2
    assert captions(tmp_path / "out") == {"a.jpg": "both", "a.png": "both"}


def test_transparency_and_odd_modes_survive_the_whole_way(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    clear = Image.new("RGBA", (32, 32), (255, 0, 0, 0))
    clear.save(folder / "clear.png")
    clear.save(folder / "clear.webp", lossless=True)
    Image.fromarray(np.full((32, 32), 65535, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (32, 32)).save(folder / "print.jpg")
    for path in list(folder.iterdir()):
        path.with_suffix(".txt").write_text("white")
    assert run(folder, tmp_path / "out").samples == 4
    shards = ShardSet(tmp_path / "out")
    for i in range(len(shards)):
        assert np.asarray(open_rgb(shards.read_raw(i).image)).min() == 255


def test_running_again_keeps_finished_shards_and_rewrites_changed_ones(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": name, "caption": name} for name in ("a.png", "b c.jpg", "ünï.webp", "z.jpeg")]
    source, out = table(tmp_path / "t.json", rows), tmp_path / "out"
    options: dict[str, Any] = {"images": pictures, "shard_size": 1}
    assert run(source, out, **options).written == 4
    whole = {path.name: path.read_bytes() for path in out.glob("*.tar")}
    (out / "00002.tar").unlink()
    (out / ".00002.tar.partial").write_bytes(b"left by a killed run")
    assert run(source, out, **options).written == 1
    assert {path.name: path.read_bytes() for path in out.glob("*.tar")} == whole
    (pictures / "z.jpeg").write_bytes((pictures / "b c.jpg").read_bytes() + b" ")
    assert run(source, out, **options).written == 1
    # A shorter table leaves no shard of the longer one behind.
    report = run(table(tmp_path / "t.json", rows[:2]), out, **options)
    assert (report.shards, report.written) == (2, 0)
    assert sorted(path.name for path in out.glob("*.tar*")) == [
        f"0000{n}.tar{end}" for n in (0, 1) for end in ("", ".idx.npz")
    ]


def test_a_set_that_is_ingested_again_is_none_until_it_is_indexed(pictures: Path, tmp_path: Path) -> None:
    rows = [{"image": name, "caption": name} for name in ("a.png", "b c.jpg", "z.jpeg")]
    source, out = table(tmp_path / "t.json", rows), tmp_path / "out"
    options: dict[str, Any] = {"images": pictures, "shard_size": 1, "progress": False}
    run(source, out, images=pictures, shard_size=1)
    ingest(source, out, **options)
    assert len(ShardSet(out)) == 3, "nothing was written, so the index is still right"
    size = (out / "00002.tar").stat().st_size
    (pictures / "z.jpeg").write_bytes((pictures / "z.jpeg").read_bytes() + b" ")
    ingest(source, out, **options)
    assert (out / "00002.tar").stat().st_size == size, "the padding of tars hides the change"
    with pytest.raises(ValueError, match=r"has no manifest\.json: run `t2i data index"):
        ShardSet(out)
    build_index(out, progress=False)
    assert ShardSet(out).read_raw(2).image.endswith(b" ")
    ingest(table(tmp_path / "t.json", rows[:2]), out, **options)
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        ShardSet(out)


def interrupt_at(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a file of this name is as if Ctrl-C were pressed."""
    read_bytes = Path.read_bytes

    def interrupted(path: Path) -> bytes:
        if path.name == name:
            raise KeyboardInterrupt
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", interrupted)


def test_the_manifest_goes_before_the_first_shard_is_rewritten(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": name, "caption": name} for name in ("a.png", "z.jpeg")]
    source, out = table(tmp_path / "t.json", rows), tmp_path / "out"
    run(source, out, images=pictures, shard_size=1)
    (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes() + b" ")
    interrupt_at("a.png", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ingest(source, out, images=pictures, shard_size=1, progress=False)
    assert not (out / "manifest.json").exists()


def test_an_interrupted_run_goes_on_where_it_stopped(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"image": name, "caption": name} for name in ("a.png", "b c.jpg", "z.jpeg")]
    source, out = table(tmp_path / "t.json", rows), tmp_path / "out"
    interrupt_at("z.jpeg", monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        ingest(source, out, images=pictures, shard_size=1, progress=False)
    monkeypatch.undo()
    assert sorted(path.name for path in out.iterdir()) == ["00000.tar", "00001.tar"]
    assert run(source, out, images=pictures, shard_size=1).written == 1


@pytest.fixture
def img2dataset(tmp_path: Path, write_tar: Callable[..., Path], picture: MakePicture) -> Path:
    """Two shards as img2dataset writes them, with one failed download and the files it leaves beside the
    tars.
    """
    for shard in range(2):
        members: list[tuple[str, bytes]] = []
        for n in range(3):
            key = f"{shard:05d}{n:04d}"
            caption = f"c {key}"
            record: dict[str, str | None] = {
                "caption": caption,
                "url": "http://x",
                "status": "success",
                "key": key,
            }
            if (shard, n) == (1, 2):
                record = {"caption": None, "url": "http://x", "status": "failed_to_download", "key": key}
            else:
                members += [(f"{key}.jpg", picture(kind="JPEG")), (f"{key}.txt", caption.encode())]
            members += [(f"{key}.json", json.dumps(record).encode())]
        write_tar(f"downloaded/{shard:05d}.tar", members)
        (tmp_path / f"downloaded/{shard:05d}_stats.json").write_text("{}")
    return tmp_path / "downloaded"


def test_img2dataset_tars_are_linked_as_they_are(img2dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = run(img2dataset, out)
    assert report == IngestReport("tars", 0, 0, {}, 0, ignored=2, shards=2, linked=2)
    assert (out / "00001.tar").samefile(img2dataset / "00001.tar")
    manifest = build_index(out, progress=False)
    assert (manifest.samples, manifest.quarantined) == (5, {"missing_image": 1})
    assert (run(img2dataset, out).linked, run(img2dataset / "00000.tar", tmp_path / "single").linked) == (
        0,
        1,
    )


def test_other_tars_in_place_of_indexed_ones_need_an_index_again(
    img2dataset: Path, tmp_path: Path, write_tar: Callable[..., Path], picture: MakePicture
) -> None:
    out = tmp_path / "out"
    run(img2dataset, out)
    ingest(img2dataset, out)
    assert len(ShardSet(out)) == 5
    (img2dataset / "00001.tar").unlink()
    write_tar("downloaded/00001.tar", [("new.png", picture()), ("new.txt", b"new")])
    assert ingest(img2dataset, out).linked == 1
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        ShardSet(out)


def test_a_hard_linked_tar_that_its_owner_rewrites_is_noticed(img2dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(img2dataset, out)
    path = img2dataset / "00000.tar"
    path.write_bytes(path.read_bytes().replace(b"c 000000001", b"d 000000001"))
    with pytest.raises(ValueError, match=r"00000\.tar of .* has changed since it was indexed"):
        ShardSet(out)


def test_tars_are_copied_where_they_cannot_be_linked(
    img2dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another file system")

    monkeypatch.setattr(os, "link", refuse)
    report = run(img2dataset, tmp_path / "out")
    assert (report.linked, report.copied) == (0, 2)
    assert (tmp_path / "out/00001.tar").read_bytes() == (img2dataset / "00001.tar").read_bytes()
    assert run(img2dataset, tmp_path / "out").copied == 0


def test_pictures_with_captions_beside_tars_are_refused(img2dataset: Path, pictures: Path, tmp_path: Path) -> None:
    for name in ("a", "b c", "sub/日本", "orphan"):
        (pictures / f"{name}.txt").write_text("a caption")
    (img2dataset / "00000.tar").rename(pictures / "stray.tar")
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"pictures holds 3 pictures with \.txt captions and also 1 tars.*move.*give.*stray\.tar"
    ):
        ingest(pictures, out)
    assert not out.exists()
    assert run(pictures / "stray.tar", out).linked == 1
    (pictures / "stray.tar").unlink()
    assert run(pictures, tmp_path / "pairs").samples == 3


def test_what_lies_beside_tars_is_counted(img2dataset: Path, tmp_path: Path, picture: MakePicture) -> None:
    (img2dataset / "preview.png").write_bytes(picture())
    (img2dataset / "notes.txt").write_text("about the set")
    (img2dataset / "00000.parquet").write_bytes(b"")
    assert run(img2dataset, tmp_path / "out") == IngestReport("tars", 0, 0, {}, 0, ignored=5, shards=2, linked=2)


def test_linked_folders_are_read_once(pictures: Path, img2dataset: Path, tmp_path: Path) -> None:
    for name in ("a", "sub/日本"):
        (pictures / f"{name}.txt").write_text("a caption")
    main = tmp_path / "main"
    main.mkdir()
    for name, target in (("one", pictures), ("two", pictures), ("up", tmp_path)):
        (main / name).symlink_to(target)
    report = run(main, tmp_path / "out")
    assert captions(tmp_path / "out") == {"one/a.png": "a caption", "one/sub/日本.PNG": "a caption"}
    assert (report.read, report.quarantined) == (5, {"missing_caption": 3})
    assert report.ignored == 3, "readme.md, and two links that were not followed"
    for name in ("one", "two", "up"):
        (main / name).unlink()
    (main / "tars").symlink_to(img2dataset)
    taken = run(main, tmp_path / "tars")
    assert (taken.shards, taken.ignored) == (2, 2)
    rows = [{"image": "link/a.png", "caption": "x"}]
    (main / "link").symlink_to(pictures)
    assert run(table(tmp_path / "t.json", rows), tmp_path / "table", images=main).samples == 1


def test_a_set_in_a_subfolder_of_out_is_left_alone(pictures: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "t.json", [{"image": "a.png", "caption": "x"}])
    run(source, tmp_path / "data" / "mine", images=pictures)
    with pytest.raises(ValueError, match=r"mine/00000\.tar was not made by this command for .*data: choose another"):
        ingest(source, tmp_path / "data", images=pictures)
    assert len(ShardSet(tmp_path / "data" / "mine")) == 1


def test_sources_that_cannot_be_used_are_refused(pictures: Path, img2dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "nowhere", {}, "does not exist"),
        (pictures, {}, "5 pictures, no .txt captions of them and no tars: give a table"),
        (pictures, {"images": pictures}, "goes with a table"),
        (pictures / "readme.md", {}, r"no table: give one of \.csv"),
        (pictures, {"shard_size": 0}, "shard size 0"),
        (img2dataset, {"lowercase": True}, "leave lowercase out"),
    ]
    for source, options, message in cases:
        with pytest.raises(ValueError, match=message):
            ingest(source, out, **options)
    with pytest.raises(ValueError, match="is where the source lies"):
        ingest(img2dataset, img2dataset)
    (pictures / "captions.csv").write_text("image,caption\n")
    with pytest.raises(ValueError, match=r"give .*captions\.csv as the source"):
        ingest(pictures, out)
    assert not out.exists()


def test_tars_of_another_origin_are_not_overwritten(pictures: Path, img2dataset: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "t.json", [{"image": "a.png", "caption": "x"}])
    out = tmp_path / "out"
    run(img2dataset, out)
    with pytest.raises(ValueError, match=r"00000\.tar was not made by this command"):
        ingest(source, out, images=pictures)
    run(source, tmp_path / "mine", images=pictures)
    (tmp_path / "mine" / "00007.tar").write_bytes((tmp_path / "mine" / "00000.tar").read_bytes())
    with pytest.raises(ValueError, match=r"00007\.tar is not from"):
        ingest(img2dataset, tmp_path / "mine")


def test_a_source_that_gives_no_sample_is_an_error_with_the_causes(pictures: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "t.json", [{"image": "gone.png", "caption": "x"}, {"image": "a.png", "caption": ""}])
    with pytest.raises(ValueError, match=r"none of 2 rows .*missing_image 1, empty_caption 1.*quarantine"):
        ingest(source, tmp_path / "out", images=pictures, progress=False)
    assert len(refusals(tmp_path / "out")) == 2


def test_the_report_shows_every_count(pictures: Path, img2dataset: Path, tmp_path: Path) -> None:
    rows = [{"image": "a.png", "caption": "x"}, {"image": "gone.png", "caption": "x"}]
    console = Console(record=True, width=120, file=io.StringIO())
    print_report(run(table(tmp_path / "t.json", rows), tmp_path / "out", images=pictures), console)
    text = console.export_text()
    for words in (
        "1 tars, 1 of them written",
        "taken",
        "missing_image",
        "4 unlisted pictures and 1 other files",
    ):
        assert words in text
    print_report(run(img2dataset, tmp_path / "tars"), console)
    assert "2 hard-linked, 0 copied, 0 there already; 2 other files ignored" in console.export_text()


def test_shards_hold_plain_members_that_any_tar_reader_sees(pictures: Path, tmp_path: Path) -> None:
    source = table(tmp_path / "t.json", [{"image": "sub/日本.PNG", "caption": "x"}])
    run(source, tmp_path / "out", images=pictures)
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert tar.getnames() == ["000000000.png", "000000000.txt", "000000000.json"]


def test_a_text_that_is_no_caption_does_not_hide_the_table(pictures: Path, tmp_path: Path) -> None:
    (pictures / "README.txt").write_text("about these pictures")
    (pictures / "captions.csv").write_text("image,caption\na.png,one\n")
    with pytest.raises(ValueError, match=r"no .txt captions of them and no tars: give .*captions.csv as the source"):
        run(pictures, tmp_path / "out")
