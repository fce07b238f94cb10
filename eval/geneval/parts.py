"""The verdicts on each prompt's pictures, kept as they come: what ranks share, and what an interrupted call goes on from."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.files import json_sha256, write_text
from eval.geneval.prompts import Metadata

__all__ = ["PARTS", "Parts", "PromptPictures", "Rows"]

PARTS = "parts"
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class PromptPictures:
    """The pictures of one prompt: its number, which the ranks share the work by, its metadata, and the files.

    `ignored` are other files beside them, which are no numbered pictures.
    """

    number: int
    metadata: Metadata
    files: tuple[Path, ...]
    ignored: tuple[Path, ...] = ()


def _identity(path: Path) -> list[int] | None:
    """Size and time of a file, which tell whether it is the one that was judged; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


class Parts:
    """The verdicts on each prompt's pictures, a file a prompt; a reader sees a whole one or none."""

    def __init__(self, out: Path, made_from: Mapping[str, Any]) -> None:
        self._out, self._folder = out, out / PARTS / json_sha256(made_from)[:12]

    def filename(self, path: Path) -> str:
        """What results.jsonl calls a picture: its path from there."""
        return Path(os.path.relpath(path, self._out)).as_posix()

    def stamp(self, prompt: PromptPictures) -> dict[str, Any]:
        """What a part is of."""
        files = {self.filename(path): _identity(path) for path in prompt.files}
        return {"metadata": prompt.metadata, "files": files}

    def load(self, prompt: PromptPictures) -> Rows | None:
        """The lines of a prompt, if they are of its pictures as they are now."""
        try:
            part = json.loads(self._path(prompt).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if part.get("of") != self.stamp(prompt):
            return None
        rows: Rows = part["rows"]
        return rows

    def save(self, prompt: PromptPictures, stamp: Mapping[str, Any], rows: Rows) -> None:
        write_text(self._path(prompt), json.dumps({"of": stamp, "rows": rows}) + "\n")

    def _path(self, prompt: PromptPictures) -> Path:
        return self._folder / f"{prompt.number:05d}.json"
