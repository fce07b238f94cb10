"""Judged pictures as a report needs them, read from a results.jsonl: ours, or one of the published GenEval script.

A line has the published fields: filename, tag, prompt, correct, reason, metadata and details, the last two as JSON
strings or as objects. `details` maps each class to its boxes [x0, y0, x1, y1, score]. Ours adds `colors`, class to the
boxes' colours, and `unreadable`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_pipeline.geneval_text import TAGS
from eval.files import read_jsonl
from eval.geneval.intervals import Interval
from eval.geneval.statistics import Summary, TaskScore, summarize

__all__ = ["Found", "Judged", "Results", "Source", "read_results"]

RESULTS_FILE, SUMMARY_FILE = "results.jsonl", "summary.json"


@dataclass(frozen=True)
class Found:
    """An object that counted: class, colour and score where known, and box (x0, y0, x1, y1) in the picture's pixels."""

    class_name: str
    color: str | None
    score: float | None
    box: tuple[float, float, float, float]


@dataclass(frozen=True)
class Judged:
    """One picture and its verdict.

    Attributes:
        filename: As the results name it.
        tag: The task.
        prompt: The sentence.
        metadata: The prompt's entry as JSON with sorted keys; it identifies the prompt, also across files.
        asked: The classes that the prompt names.
        correct: The verdict.
        reasons: One line for each failed clause.
        found: What the judge counted.
        unreadable: The judge could not read the picture.
    """

    filename: str
    tag: str
    prompt: str
    metadata: str
    asked: tuple[str, ...]
    correct: bool
    reasons: tuple[str, ...]
    found: tuple[Found, ...]
    unreadable: bool


@dataclass(frozen=True)
class Source:
    """What a summary.json tells of the model and the judge; None where it tells nothing."""

    recipe: str | None = None
    step: int | None = None
    checksum: str | None = None
    judge: str | None = None
    judged_at: str | None = None
    images: str | None = None


@dataclass(frozen=True)
class Results:
    """One model's judged pictures.

    Attributes:
        name: What the model is called.
        folder: Where the results lie.
        pictures: At least one.
        ceilings: Name -> the judge's scores of pictures that no model can be expected to beat.
        source: Where they come from.
        images: Another folder that holds the pictures, where they have moved.
    """

    name: str
    folder: Path
    pictures: tuple[Judged, ...]
    ceilings: Mapping[str, Summary]
    source: Source = Source()
    images: Path | None = None

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """The pictures as `summarize` and `compare` take them."""
        return [
            {"tag": one.tag, "metadata": one.metadata, "correct": one.correct, "unreadable": one.unreadable}
            for one in self.pictures
        ]

    @cached_property
    def summary(self) -> Summary:
        """The scores."""
        return summarize(self.rows)

    def find(self, filename: str) -> Path | None:
        """The file of a picture, or None.

        A path is one from the results' folder; its last parts, from the prompt's folder on (00000/samples/0000.png), are
        looked for beside the results too, and in the folder that the summary names in full. The published script writes
        paths from wherever it was started (outputs/00000/samples/0000.png), so such a one is tried, last, from the current
        folder; one that does not name a folder of its own would be anybody's there.
        """
        path = Path(filename)
        tail = Path(*path.parts[-3:])
        if self.images is not None:
            candidates = [self.images / path, self.images / tail]
        else:
            candidates = [self.folder / path, self.folder / tail, self.folder / "images" / tail]
            if self.source.images is not None and Path(self.source.images).is_absolute():
                candidates.append(Path(self.source.images) / tail)
            if len(path.parts) > len(tail.parts) and path.parts[0] != "..":
                candidates.append(path)
        return next((candidate for candidate in candidates if candidate.is_file()), None)


def _document(value: Any, what: str) -> dict[str, Any]:
    """A JSON object, given as such or as a string; None is an empty one."""
    document = json.loads(value) if isinstance(value, str) else value
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise ValueError(f"{what} is {str(value)[:60]!r}; it must be a JSON object")
    return document


def _found(row: Mapping[str, Any]) -> tuple[Found, ...]:
    colors = _document(row.get("colors"), "colors")
    found = []
    for name, boxes in _document(row.get("details"), "details").items():
        names = list(colors.get(name) or [])
        for place, box in enumerate(boxes):
            numbers = [float(number) for number in box]
            if len(numbers) not in (4, 5) or not all(map(math.isfinite, numbers)):
                raise ValueError(f"a box of {name!r} is {box}; it must be [x0, y0, x1, y1, score]")
            x0, y0, x1, y1, *score = numbers
            color = names[place] if place < len(names) else None
            found.append(
                Found(name, None if color is None else str(color), score[0] if score else None, (x0, y0, x1, y1))
            )
    return tuple(found)


def _judged(row: Mapping[str, Any]) -> Judged:
    if missing := [name for name in ("filename", "tag", "prompt", "correct") if row.get(name) is None]:
        raise ValueError(f"{', '.join(missing)} missing; a line needs the fields that GenEval's script writes")
    if row["tag"] not in TAGS:
        raise ValueError(f"the task is {row['tag']!r}; it must be one of {', '.join(TAGS)}")
    if row["correct"] not in (True, False):
        raise ValueError(f"correct is {row['correct']!r}; it must be true or false")
    metadata = _document(row.get("metadata"), "metadata") or {"tag": row["tag"], "prompt": row["prompt"]}
    clauses = [*metadata.get("include", []), *metadata.get("exclude", [])]
    return Judged(
        filename=str(row["filename"]),
        tag=row["tag"],
        prompt=str(row["prompt"]),
        metadata=json.dumps(metadata, sort_keys=True),
        asked=tuple(dict.fromkeys(str(clause["class"]) for clause in clauses)),
        correct=bool(row["correct"]),
        reasons=tuple(str(row["reason"]).split("\n")) if row.get("reason") else (),
        found=_found(row),
        unreadable=bool(row.get("unreadable")),
    )


def _interval(document: Mapping[str, Any]) -> Interval:
    return Interval(**{name: float(document[name]) for name in ("value", "low", "high")})


def _task_score(document: Mapping[str, Any]) -> TaskScore:
    counts = {name: int(document[name]) for name in ("prompts", "images", "correct", "unreadable")}
    intervals = {name: _interval(document[name]) for name in ("per_image", "per_prompt")}
    return TaskScore(tag=str(document["tag"]), **counts, **intervals)  # type: ignore[arg-type]


def _summary(document: Mapping[str, Any]) -> Summary:
    """What `Summary.to_json` made."""
    return Summary(tuple(map(_task_score, document["tasks"])), _task_score(document["overall"]))


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _of_these(document: Mapping[str, Any], file: Path, pictures: Sequence[Judged]) -> bool:
    """Whether a summary is of the results in `file`."""
    if "results_sha256" in document:
        return bool(document["results_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest())
    overall = document["scores"]["overall"]  # of a summary from before it told the checksum
    return bool((overall["images"], overall["correct"]) == (len(pictures), sum(one.correct for one in pictures)))


def _read_summary(file: Path, pictures: Sequence[Judged]) -> tuple[Source, dict[str, Summary]]:
    """Source and ceilings from the summary.json beside `file`; nothing where there is none or it is of other results."""
    path = file.parent / SUMMARY_FILE
    if not path.is_file():
        return Source(), {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not _of_these(document, file, pictures):
            print(f"{path} is of other results than those beside it and is left out; make it again")
            return Source(), {}
        model = document.get("model") or {}
        step = model.get("step")
        source = Source(
            recipe=_text(model.get("recipe")),
            step=step if isinstance(step, int) else None,
            checksum=_text(model.get("sha256")),
            judge=_text(document.get("judge")),
            judged_at=_text(document.get("judged_at")),
            images=_text(document.get("images")),
        )
        return source, {str(name): _summary(ceiling) for name, ceiling in document.get("ceilings", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} cannot be read ({type(error).__name__}: {error}); delete it or make it again"
        ) from error


def _named(given: str) -> tuple[str | None, Path]:
    """NAME=PATH or PATH; a path that is there may hold an equals sign of its own."""
    name, equals, path = given.partition("=")
    if not equals or not path or not name.strip() or Path(given).exists():
        return None, Path(given)
    return name.strip(), Path(path)


def _default_name(file: Path, source: Source) -> str:
    if source.recipe is not None:
        return source.recipe if source.step is None else f"{source.recipe}, step {source.step:,}"
    if file.name != RESULTS_FILE:
        return file.stem
    folder = file.resolve().parent
    return (folder.parent if folder.name == "geneval" else folder).name or file.stem


def read_results(given: str | Path, images: Path | None = None) -> Results:
    """One model's results.

    Args:
        given: A results.jsonl, a folder that holds one, or NAME=PATH of either. Without a name it is called as the
            summary.json beside it says, else after its folder.
        images: A folder that holds the pictures, where they have moved.

    Raises:
        ValueError: no such file, nothing in it, a line that is no result (named), a picture listed twice, or `images` is
            no folder.
    """
    name, path = _named(str(given))
    file = path / RESULTS_FILE if path.is_dir() else path
    if images is not None and not images.is_dir():
        raise ValueError(f"{images} is not a folder; give the folder that holds the pictures of {path}")
    rows = read_jsonl(file)
    if not rows:
        raise ValueError(f"{file} holds no results; score a folder of pictures first")
    pictures = []
    for number, row in enumerate(rows, start=1):
        try:
            pictures.append(_judged(row))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}, result {number}, is no GenEval result: {error}") from error
    if twice := len(pictures) - len({one.filename for one in pictures}):
        raise ValueError(f"{file} lists {twice} pictures more than once; a picture may count only once")
    source, ceilings = _read_summary(file, pictures)
    # A file name may hold bytes that are no text; the page must be UTF-8 all the same.
    shown = (name or _default_name(file, source)).encode("utf-8", "replace").decode()
    return Results(shown, file.parent, tuple(pictures), ceilings, source, images)
