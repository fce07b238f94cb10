"""Text and JSON-lines files, written so that an interruption leaves the old file or the whole new one."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data_pipeline.atomic import write_bytes

__all__ = [
    "file_sha256", "files_sha256", "json_sha256", "read_jsonl", "read_numbered_jsonl", "write_jsonl", "write_text",
]  # fmt: skip


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically; makes the folder."""
    write_bytes(path, text.encode())


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write one JSON document per line, with json's default separators, atomically."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line, skipping empty lines. Raises ValueError as `read_numbered_jsonl` does."""
    return [row for _, row in read_numbered_jsonl(path)]


def read_numbered_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Read a file of one JSON object per line, each with the number of its line, from 1; empty lines are skipped.

    Raises:
        ValueError: the file is missing or no UTF-8, or a line is no JSON object; names the file and line.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the path of a .jsonl file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text ({error}); convert it first") from error
    rows = []
    # Not splitlines: strings of JSON may hold other characters that end a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON ({error}); fix or delete the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path} line {number} is {line[:40]!r}; each line must be a JSON object")
        rows.append((number, row))
    return rows


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_sha256(folder: Path, files: Iterable[Path]) -> str:
    """SHA-256 over the names, relative to `folder`, and contents of some of its files, in hexadecimal."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def json_sha256(document: Any) -> str:
    """SHA-256 of a JSON document, in hexadecimal."""
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()
