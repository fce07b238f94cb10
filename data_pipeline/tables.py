"""Rows of CSV, TSV, JSON, JSONL and parquet tables, all as dictionaries by field name.

Text is UTF-8, with or without a byte order mark; CSV and TSV have a header line; JSON is a list of objects.
"""

import csv
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

TABLE_SUFFIXES: Final = (".csv", ".tsv", ".json", ".jsonl", ".parquet")

_PEEK: Final = 1000
_LONGEST_FIELD: Final = 2**31 - 1


@dataclass(frozen=True)
class BadRow:
    """A row that is no record; `detail` says why."""

    detail: str


Row = dict[str, Any] | BadRow


def read_table(path: Path, fields: Iterable[str]) -> Iterator[Row]:
    """Rows of a table in order, holding at least `fields` (None where a row has no such field or it is empty
    of type).

    The kind of table follows from the file's suffix. CSV, TSV, JSONL and parquet are read piece by piece.
    Raises ValueError when the suffix is unknown, the file is not what its suffix says or has no rows, or one
    of `fields` is in none of the first 1,000 rows (naming the fields that are).
    """
    readers = {".csv": _csv, ".tsv": _tsv, ".json": _json, ".jsonl": _jsonl, ".parquet": _parquet}
    suffix = path.suffix.lower()
    if suffix not in readers:
        raise ValueError(f"{path} is no table that can be read: give one of {', '.join(TABLE_SUFFIXES)}")
    fields = list(dict.fromkeys(fields))
    rows = _explained(path, readers[suffix](path, fields))
    head = list(itertools.islice(rows, _PEEK))
    records = [row for row in head if isinstance(row, dict)]
    if not records:
        bad = next((row.detail for row in head if isinstance(row, BadRow)), "it is empty")
        raise ValueError(f"{path} has no records ({bad}): give a table with one for each picture")
    available = list(dict.fromkeys(name for record in records for name in record))
    if unknown := [name for name in fields if name not in available]:
        raise ValueError(f"{path} has no field {unknown[0]!r}: choose among {', '.join(available)}")
    return itertools.chain(head, rows)


def _explained(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}): convert it first") from error
    except csv.Error as error:
        raise ValueError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error


def _csv(
    path: Path, fields: list[str], delimiter: str = ",", quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with open(path, encoding="utf-8-sig", newline="") as stream:
        # Strict: one quotation mark that nothing closes would otherwise swallow all rows after it.
        reader = csv.DictReader(stream, delimiter=delimiter, quoting=quoting, strict=True)
        for row in reader:
            if None in row:
                yield BadRow(f"line {reader.line_num} has more fields than the header")
            else:
                yield row


def _tsv(path: Path, fields: list[str]) -> Iterator[Row]:
    """Quoted as spreadsheets do, if the whole file is; else, as captions from the web are, with marks that mean themselves."""
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
    try:
        for _ in _csv(path, fields, "\t"):
            pass
    except csv.Error:
        quoting = csv.QUOTE_NONE
    yield from _csv(path, fields, "\t", quoting)


def _json(path: Path, fields: list[str]) -> Iterator[Row]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(rows, list):
        raise ValueError(f"{path} holds a JSON {type(rows).__name__}: give a list of objects")
    yield from map(_record, rows)


def _jsonl(path: Path, fields: list[str]) -> Iterator[Row]:
    with open(path, encoding="utf-8-sig") as stream:
        for line in stream:
            if not line.strip():
                continue
            try:
                yield _record(json.loads(line))
            except (json.JSONDecodeError, RecursionError) as error:
                yield BadRow(f"not JSON: {error}")


def _record(row: Any) -> Row:
    return row if isinstance(row, dict) else BadRow(f"a JSON {type(row).__name__}, not an object")


def _parquet(path: Path, fields: list[str]) -> Iterator[Row]:
    import pyarrow  # here, because only parquet needs it and it is slow to load
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            # Columns can be large; those not asked for are not read, only named for the error about unknown
            # fields.
            others = dict.fromkeys(names) if not set(fields) <= set(names) else {}
            for batch in file.iter_batches(columns=[name for name in fields if name in names]):
                yield from ({**others, **row} for row in batch.to_pylist())
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is not parquet: {error}") from error
