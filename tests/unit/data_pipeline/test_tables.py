import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_pipeline.tables import BadRow, read_table

ROWS: list[dict[str, Any]] = [
    {"image": "a b.png", "caption": 'a "quoted", two-line\ncaption'},
    {"image": "ü.png", "caption": "日本"},
]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    kind = path.suffix
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    elif kind == ".jsonl":
        path.write_text("\n\n".join(map(json.dumps, rows)))
    else:
        mark = "," if kind == ".csv" else "\t"
        quoted = [['"' + str(value).replace('"', '""') + '"' for value in row.values()] for row in rows]
        lines = [mark.join(rows[0]), *map(mark.join, quoted)]
        path.write_text("\n".join(lines), encoding="utf-8-sig")
    return path


KINDS = [".csv", ".tsv", ".json", ".jsonl", ".parquet"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_table_gives_its_rows(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"t{kind}", ROWS)
    assert list(read_table(path, ["image", "caption"])) == ROWS


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_field_is_answered_with_the_known_ones(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path / f"t{kind}", ROWS)
    with pytest.raises(ValueError, match="has no field 'text': choose among image, caption"):
        read_table(path, ["image", "text"])


def test_upper_case_suffixes_and_large_fields_are_read(tmp_path: Path) -> None:
    (tmp_path / "T.CSV").write_text("image,caption\na.png," + "x" * 300_000)
    rows = list(read_table(tmp_path / "T.CSV", ["image"]))
    assert isinstance(rows[0], dict)
    assert len(rows[0]["caption"]) == 300_000


def test_rows_that_are_no_records_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"a": 1}\n{"a": \n[2]\n{"a": 4}')
    rows = list(read_table(tmp_path / "t.jsonl", ["a"]))
    assert [row if isinstance(row, dict) else None for row in rows] == [{"a": 1}, None, None, {"a": 4}]
    (tmp_path / "t.csv").write_text("a,b\n1,2\n1,2,3\n4\n")
    first, second, third = read_table(tmp_path / "t.csv", ["a"])
    assert (first, third) == ({"a": "1", "b": "2"}, {"a": "4", "b": None})
    assert second == BadRow("line 3 has more fields than the header")


STRAY = ['a\t"unclosed', 'b\t"Hello" said the cat', "c\tplain"]


def test_quotation_marks_of_a_tsv_that_quotes_nothing_mean_themselves(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text("image\tcaption\n" + "\n".join(STRAY))
    captions = [row["caption"] for row in read_table(tmp_path / "t.tsv", ["image"]) if isinstance(row, dict)]
    assert captions == ['"unclosed', '"Hello" said the cat', "plain"]


def test_a_tsv_that_quotes_as_spreadsheets_do_is_unquoted(tmp_path: Path) -> None:
    (tmp_path / "t.tsv").write_text('image\tcaption\na\t"say ""hi""\tor not"\nb\tplain')
    captions = [row["caption"] for row in read_table(tmp_path / "t.tsv", ["image"]) if isinstance(row, dict)]
    assert captions == ['say "hi"\tor not', "plain"]


@pytest.mark.parametrize("line", [0, 1])
def test_a_csv_with_a_stray_quotation_mark_loses_no_rows(tmp_path: Path, line: int) -> None:
    rows = ["c,plain", STRAY[line].replace("\t", ","), *["d,plain"] * 2000]
    (tmp_path / "t.csv").write_text("image,caption\n" + "\n".join(rows))
    with pytest.raises(ValueError, match=r"t.csv cannot be read as CSV"):
        list(read_table(tmp_path / "t.csv", ["image"]))


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.csv", b"image,caption\n", "no records"),
        ("t.json", b"[]", "no records"),
        ("t.json", b'{"images": []}', "a JSON dict: give a list of objects"),
        ("t.json", b"[1, 2]", "a JSON int, not an object"),
        ("t.json", b"[{]", "not JSON"),
        ("t.jsonl", b"nonsense", "no records"),
        ("t.json", b"[" * 100_000, "not JSON"),
        ("t.jsonl", b"[" * 100_000, "no records"),
        ("t.csv", "image\ngrün".encode("latin-1"), "not UTF-8"),
        ("t.json", b'["\xff"]', "not UTF-8"),
        ("t.parquet", b"nonsense", "not parquet"),
        ("t.xlsx", b"", r"no table that can be read: give one of \.csv"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name, ["image"])
