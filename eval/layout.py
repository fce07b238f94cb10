"""GenEval's published folder layout, for every command that reads it: which folders, which files, in which order.

    00000/metadata.jsonl, 00000/samples/0000.png, 0001.png ..., 00000/grid.png

Folders and pictures have numbers for names, with or without zeros in front, and stand in the order of these.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.images import IMAGE_SUFFIXES

__all__ = [
    "GRID_FILE",
    "METADATA_FILE",
    "SAMPLES",
    "Samples",
    "is_layout",
    "prompt_folders",
    "read_metadata",
    "samples_of",
    "some",
]

METADATA_FILE, SAMPLES, GRID_FILE = "metadata.jsonl", "samples", "grid.png"


@dataclass(frozen=True)
class Samples:
    """What lies under samples/: the pictures by number, and everything else but hidden files, by name."""

    files: tuple[Path, ...]
    ignored: tuple[Path, ...]


def is_layout(folder: Path) -> bool:
    """Whether the folder holds at least one prompt's folder, with metadata and samples."""
    return any((one / METADATA_FILE).is_file() and (one / SAMPLES).is_dir() for one in _numbered(folder))


def prompt_folders(folder: Path) -> list[Path]:
    """The folders of prompts, by number; perhaps none.

    Raises ValueError for two of one number.
    """
    found = sorted(_numbered(folder), key=lambda path: (int(path.name), path))
    for one, other in pairwise(found):
        if int(one.name) == int(other.name):
            raise ValueError(
                f"there are two folders of prompt {int(one.name)}, {one.name} and {other.name} in {folder}; remove one"
            )
    return found


def _numbered(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.name.isdecimal() and path.is_dir()]


def read_metadata(folder: Path) -> dict[str, Any]:
    """The metadata of a prompt's folder. Raises ValueError where there are none, or no JSON object."""
    file = folder / METADATA_FILE
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{folder} has no {METADATA_FILE} and so no prompt; restore it, or remove the folder"
        ) from None
    except ValueError as error:
        raise ValueError(f"{file} is not one JSON object ({error}); restore it") from error
    if not isinstance(metadata, dict):
        raise ValueError(f"{file} is not one JSON object; restore it")
    return metadata


def samples_of(folder: Path) -> Samples:
    """The pictures of a prompt's folder: files under samples/ with a number for a name, of a kind that can be read.

    Raises ValueError for two of one number.
    """
    found: list[Path] = []
    ignored: list[Path] = []
    for path in sorted((folder / SAMPLES).glob("[!.]*")):
        numbered = path.stem.isdecimal() and path.suffix[1:].lower() in IMAGE_SUFFIXES and path.is_file()
        (found if numbered else ignored).append(path)
    found.sort(key=lambda path: (int(path.stem), path))
    for one, other in pairwise(found):
        if int(one.stem) == int(other.stem):
            raise ValueError(
                f"{folder / SAMPLES} has picture {int(one.stem)} twice: {one.name} and {other.name}; remove one"
            )
    return Samples(tuple(found), tuple(ignored))


def some(names: Sequence[object], shown: int = 5, more: str = "") -> str:
    """The first few of some names, and how many more there are; `more` says where those stand."""
    rest = f" and {len(names) - shown} more{more}" if len(names) > shown else ""
    return ", ".join(map(str, names[:shown])) + rest
