"""Pictures with captions, as people have them, to raw webdataset tars: `t2i data ingest SOURCE --out FOLDER`.

The source is a table (CSV, TSV, JSON, JSONL, parquet) that names picture files and captions, a folder of
picture and `.txt` pairs, or a folder of webdataset tars such as img2dataset writes, which are taken as they
are. Folders may hold links to other folders. Pictures are stored byte for byte; decoding, and laying
transparency over white, happens where they are used (`data_pipeline.images`).

A sample's key is the number of its row (or of its file, in sorted order), nine digits; its `KEY.json` keeps
that row and the source file's name. What cannot become a sample is counted by cause and listed in
`ingest_quarantine.jsonl`.
"""

import hashlib
import json
import os
import re
import shutil
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any, Final, Literal

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from data_pipeline.atomic import write_bytes
from data_pipeline.manifest import remove_manifest
from data_pipeline.picture_folder import INGEST_CAUSES, PictureFolder, UnusableError
from data_pipeline.shard_index import index_path
from data_pipeline.tables import TABLE_SUFFIXES, BadRow, Row, read_table
from data_pipeline.tars import ShardWriter, read_pax, tar_names

QUARANTINE: Final = "ingest_quarantine.jsonl"
REPORT: Final = "ingest.json"
CONTENT_RECORD: Final = "T2I.ingest"
"""Global PAX record with a hash of what went into a shard, by which a later run sees that it is finished."""


@dataclass(frozen=True)
class IngestReport:
    """What an ingestion did.

    For tables and pairs, `read` rows (or pictures, and captions without one) equal `samples` plus all of
    `quarantined`. `unlisted` counts pictures in the folder that the table does not name, `ignored` files that are
    neither picture nor caption, and folders that were not read. Tars are not opened, so `read` and `samples` are 0 for
    them until they are indexed, and `ignored` counts whatever else lies in their folder. `shards` is all tars in the
    result; of these `written`, `linked` (hard links) and `copied` were made by this run, the rest found finished.
    """

    kind: Literal["table", "pairs", "tars"]
    read: int
    samples: int
    quarantined: dict[str, int]
    unlisted: int
    ignored: int
    shards: int
    written: int = 0
    linked: int = 0
    copied: int = 0

    def __post_init__(self) -> None:
        assert self.read == self.samples + sum(self.quarantined.values()), "counts do not add up"


@dataclass(frozen=True)
class _Entry:
    """One sample to be: row number, file as named in the source's folder, caption, class."""

    row: int
    source: str
    caption: str
    label: int | None


@dataclass(frozen=True)
class _Refused:
    """One line of the quarantine list."""

    row: int | None
    source: str
    cause: str
    detail: str


def ingest(
    source: Path,
    out: Path,
    *,
    images: Path | None = None,
    caption_field: str = "caption",
    image_field: str = "image",
    label_field: str | None = None,
    lowercase: bool = False,
    shard_size: int = 1000,
    progress: bool = True,
) -> IngestReport:
    """Make raw tars of `shard_size` samples in `out` from a table, a folder of pairs, or tars.

    For a table, `images` is the folder that holds the pictures (default: the table's own), `image_field`
    names the field with each picture's path in it, `caption_field` that of the caption, `label_field`, if
    given, that of a class number; fields are ignored otherwise. One picture may be listed several times, each
    time a sample. In a folder of pairs, `a.png` takes `a.txt`. Captions lose white space at their ends and,
    with `lowercase`, their capitals. Tars are hard linked where the file system allows it and copied
    otherwise, under their own names. Run again, it keeps finished shards whose contents would be the same,
    and rewrites the others; before the first of them it removes the set's manifest, so that nothing reads the new
    shards through the old index.

    Raises ValueError when the source is none of these or two of them, a field is unknown (listing those that exist),
    no sample results, or `out` holds tars that did not come from here.
    """
    source, out = Path(source), Path(out)
    if shard_size < 1:
        raise ValueError(f"shard size {shard_size} holds no sample: set at least 1")
    if not source.exists():
        raise ValueError(f"{source} does not exist: give a table, a folder of pictures, or a folder of tars")
    if source.is_file() and source.suffix.lower() in TABLE_SUFFIXES:
        folder = PictureFolder(Path(images) if images is not None else source.parent, leave_out=(source, out))
        fields = [image_field, caption_field, *([label_field] if label_field else [])]
        entries = _from_table(read_table(source, fields), folder, *fields)
        return _write(entries, folder, out, "table", source, lowercase, shard_size, progress)
    if images is not None:
        raise ValueError(f"a folder of pictures ({images}) goes with a table, which {source} is not")
    if out.resolve() == (source if source.is_dir() else source.parent).resolve():
        raise ValueError(f"{out} is where the source lies: choose another out folder")
    if tars := _source_tars(source, out):
        if lowercase:
            raise ValueError(f"captions inside the tars of {source} are taken as they are: leave lowercase out")
        beside = PictureFolder(source, leave_out=(out,)) if source.is_dir() else None
        if beside is not None and (pairs := len(_captioned(beside))):
            raise ValueError(
                f"{source} holds {pairs:,} pictures with .txt captions and also {len(tars):,} tars: to take the pictures, "
                f"move the tars elsewhere; to take a tar, give it itself ({source / tars[0]})"
            )
        return _take_tars(source, out, tars, beside)
    if not source.is_dir():
        raise ValueError(f"{source} is no table: give one of {', '.join(TABLE_SUFFIXES)}, or a folder")
    folder = PictureFolder(source, leave_out=(out,))
    tables = [name for name in sorted(folder.others) if Path(name).suffix.lower() in TABLE_SUFFIXES]
    if not _captioned(folder) and (tables or not _captions(folder)):  # a readme.txt is no caption
        hint = f"give {source / tables[0]} as the source" if tables else "give a table as the source"
        raise ValueError(f"{source} has {len(folder.pictures)} pictures, no .txt captions of them and no tars: {hint}")
    return _write(_from_pairs(folder), folder, out, "pairs", source, lowercase, shard_size, progress)


def print_report(report: IngestReport, console: Console | None = None) -> None:
    """Print what was read, taken and set aside by cause, and what lay in the folder besides."""
    console = console or Console()
    if report.kind == "tars":
        kept = report.shards - report.linked - report.copied
        console.print(
            f"{report.shards:,} tars: {report.linked:,} hard-linked, {report.copied:,} copied, "
            f"{kept:,} there already; {report.ignored:,} other files ignored. Indexing counts their samples."
        )
        return
    table = Table(title=f"{report.shards:,} tars, {report.written:,} of them written now", title_justify="left")
    table.add_column("samples")
    table.add_column("count", justify="right")
    table.add_column("meaning")
    table.add_row("taken", f"{report.samples:,}", "stored in a tar", style="green")
    for cause, count in report.quarantined.items():
        table.add_row(cause, f"{count:,}", INGEST_CAUSES[cause], style="yellow")
    table.add_section()
    table.add_row("read", f"{report.read:,}", f"all of the above; those set aside are listed in {QUARANTINE}")
    console.print(table)
    console.print(f"Besides: {report.unlisted:,} unlisted pictures and {report.ignored:,} other files.")


def _from_table(
    rows: Iterable[Row],
    folder: PictureFolder,
    image_field: str,
    caption_field: str,
    label_field: str | None = None,
) -> Iterator[_Entry | _Refused]:
    for number, row in enumerate(rows):
        if isinstance(row, BadRow):
            yield _Refused(number, "", "bad_row", row.detail)
            continue
        named = row.get(image_field)
        if isinstance(named, dict | list | bytes):  # pictures inside the table, as in some parquet files
            detail = (
                f"field {image_field!r} holds a {type(named).__name__}, not a path: write the pictures to files first"
            )
            yield _Refused(number, "", "missing_image", detail)
            continue
        name = "" if named is None else str(named)
        try:
            picture = folder.find(name)
            caption = _caption(row.get(caption_field), f"field {caption_field!r}")
            label = _label(row.get(label_field)) if label_field else None
        except UnusableError as error:
            yield _Refused(number, name, error.cause, str(error))
        else:
            yield _Entry(number, picture, caption, label)


def _captions(folder: PictureFolder) -> dict[str, str]:
    """The .txt files of a folder, by path without the suffix."""
    return {name[: -len(".txt")]: name for name in folder.others if name.lower().endswith(".txt")}


def _captioned(folder: PictureFolder) -> list[str]:
    """The pictures of a folder that have a .txt file beside them."""
    texts = _captions(folder)
    return [picture for picture in folder.pictures if picture.rpartition(".")[0] in texts]


def _from_pairs(folder: PictureFolder) -> Iterator[_Entry | _Refused]:
    texts = _captions(folder)
    folder.others.difference_update(texts.values())
    stems = {picture.rpartition(".")[0] for picture in folder.pictures}
    for number, picture in enumerate(folder.pictures):
        stem = picture.rpartition(".")[0]
        try:
            found = folder.find(picture)
            if stem not in texts:
                raise UnusableError("missing_caption", f"no file {stem}.txt")
            yield _Entry(number, found, _caption_file(folder.root / texts[stem]), None)
        except UnusableError as error:
            yield _Refused(number, picture, error.cause, str(error))
    for stem in sorted(set(texts) - stems):
        yield _Refused(None, texts[stem], "missing_image", "no picture of this name beside the caption")


def _caption_file(path: Path) -> str:
    try:
        return _caption(path.read_text(encoding="utf-8-sig"), path.name)
    except UnicodeDecodeError as error:
        raise UnusableError("bad_caption", f"{path.name} is not UTF-8: {error}") from error


def _caption(value: Any, where: str) -> str:
    if value is None:
        raise UnusableError("missing_caption", f"{where} is absent or null")
    if not isinstance(value, str):
        raise UnusableError("bad_caption", f"{where} is a {type(value).__name__}, not text")
    if not value.strip():
        raise UnusableError("empty_caption", f"{where} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        raise UnusableError("bad_caption", f"{where} is not valid Unicode: {error}") from error
    return value.strip()


def _label(value: Any) -> int:
    # A column in which one number is missing comes out of many programs as floats: 3.0.
    text = re.sub(r"(?<=\d)\.0+$", "", str(value).strip())
    if isinstance(value, bool) or not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise UnusableError("bad_label", f"the class is {text[:40]!r}")
    return int(text)


def _write(
    entries: Iterable[_Entry | _Refused],
    folder: PictureFolder,
    out: Path,
    kind: Literal["table", "pairs"],
    source: Path,
    lowercase: bool,
    shard_size: int,
    progress: bool,
) -> IngestReport:
    earlier = _own_tars(out)
    refused: list[_Refused] = []
    batch: list[_Entry] = []
    names: list[str] = []
    samples = written = 0

    def flush() -> None:
        nonlocal written
        name = f"{len(names):05d}.tar"
        names.append(name)
        written += _write_shard(out / name, batch, folder.root, earlier.get(name))
        batch.clear()

    for entry in tqdm(entries, desc="ingest", unit="row", disable=not progress):
        if isinstance(entry, _Refused):
            refused.append(entry)
            continue
        samples += 1
        batch.append(replace(entry, caption=entry.caption.lower()) if lowercase else entry)
        if len(batch) == shard_size:
            flush()
    if batch:
        flush()
    # What an earlier, larger run of this command left over would otherwise be indexed as part of the set.
    for name in set(earlier) - set(names):
        remove_manifest(out)
        (out / name).unlink()
        index_path(out / name).unlink(missing_ok=True)
    write_bytes(out / QUARANTINE, "".join(json.dumps(asdict(one)) + "\n" for one in refused).encode())
    counts = Counter(one.cause for one in refused)
    quarantined = {cause: counts[cause] for cause in INGEST_CAUSES if counts[cause]}
    read, shards = samples + len(refused), len(names)
    unlisted, ignored = folder.unlisted if kind == "table" else 0, len(folder.others)
    report = IngestReport(kind, read, samples, quarantined, unlisted, ignored, shards, written)
    _save_report(out, report)
    if not samples:
        reasons = ", ".join(f"{cause} {count}" for cause, count in quarantined.items())
        raise ValueError(f"none of {read} rows of {source} became a sample ({reasons}): see {out / QUARANTINE}")
    return report


def _own_tars(out: Path) -> dict[str, str]:
    """Tars that an earlier run of this command left in `out`, with the hash of what is in each."""
    own: dict[str, str] = {}
    for name in tar_names(out) if out.is_dir() else []:
        try:
            content = read_pax(out / name).get(CONTENT_RECORD)
        except tarfile.ReadError:
            content = None
        # What lies in a subfolder is another set's, whose tars are not ours to remove.
        if content is None or "/" in name:
            raise ValueError(f"{out / name} was not made by this command for {out}: choose another out folder")
        own[name] = content
    return own


def _write_shard(path: Path, entries: list[_Entry], root: Path, earlier: str | None) -> bool:
    """Write a shard unless the one that is there has these contents; returns whether it was written."""
    digest = hashlib.sha256()
    for entry in entries:
        status = (root / entry.source).stat()
        facts = (*astuple(entry), status.st_size, status.st_mtime_ns)
        digest.update(json.dumps(facts).encode() + b"\n")
    if digest.hexdigest() == earlier:
        return False
    remove_manifest(path.parent)
    with ShardWriter(path, {CONTENT_RECORD: digest.hexdigest()}) as writer:
        for entry in entries:
            picture = root / entry.source
            members = {picture.suffix[1:].lower(): picture.read_bytes(), "txt": entry.caption.encode()}
            if entry.label is not None:
                members["cls"] = str(entry.label).encode()
            members["json"] = json.dumps({"source": entry.source, "row": entry.row}).encode()
            writer.add(f"{entry.row:09d}", members)
    return True


def _source_tars(source: Path, out: Path) -> list[str]:
    if source.is_dir():
        return [n for n in tar_names(source) if not (source / n).resolve().is_relative_to(out.resolve())]
    return [source.name] if source.suffix == ".tar" else []


def _take_tars(source: Path, out: Path, names: list[str], beside: PictureFolder | None) -> IngestReport:
    """Link or copy tars; `beside` is all that lies in the source, None where that is a single tar."""
    root = source if source.is_dir() else source.parent
    if strangers := sorted(set(tar_names(out) if out.is_dir() else []) - set(names)):
        raise ValueError(f"{out / strangers[0]} is not from {source}: choose another out folder")
    linked = copied = 0
    for name in names:
        origin, target = root / name, out / name
        if target.exists() and (target.samefile(origin) or _same(target, origin)):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.partial")
        temporary.unlink(missing_ok=True)
        try:
            os.link(origin.resolve(), temporary)
            linked += 1
        except OSError:  # another file system, or one without hard links
            shutil.copy2(origin, temporary)
            copied += 1
        remove_manifest(out)
        os.replace(temporary, target)
    ignored = len(beside.others) + len(beside.pictures) - len(names) if beside is not None else 0
    report = IngestReport("tars", 0, 0, {}, 0, ignored, len(names), linked=linked, copied=copied)
    _save_report(out, report)
    return report


def _same(one: Path, other: Path) -> bool:
    first, second = one.stat(), other.stat()
    return (first.st_size, first.st_mtime_ns) == (second.st_size, second.st_mtime_ns)


def _save_report(out: Path, report: IngestReport) -> None:
    write_bytes(out / REPORT, (json.dumps(asdict(report), indent=1) + "\n").encode())
