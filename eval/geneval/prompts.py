"""GenEval's prompts: the published 553 over COCO classes regenerated exactly, and the shapes prompts.

`write_prompts` writes a folder with the two published files, `evaluation_metadata.jsonl` (one metadata entry a
line) and `generation_prompts.txt` (its prompt, line by line); `read_prompts` reads such a folder or file back.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), prompts/create_prompts.py, whose random draws are
repeated here call by call.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline import shapes
from data_pipeline.geneval_text import TAGS, prompt_for
from eval.files import read_jsonl, write_jsonl, write_text

__all__ = [
    "COCO_CLASSES",
    "COLORS",
    "RELATIONS",
    "Metadata",
    "check_metadata",
    "coco_prompts",
    "read_prompts",
    "shapes_prompts",
    "write_prompts",
]

Metadata = dict[str, Any]

# COCO's 80 classes in COCO's order, with GenEval's three renamings (computer mouse, tv remote, computer keyboard).
COCO_CLASSES: tuple[str, ...] = tuple(
    """person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,
    parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,
    suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,
    tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,sandwich,orange,broccoli,carrot,
    hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,toilet,tv,laptop,computer mouse,tv remote,
    computer keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,teddy bear,
    hair drier,toothbrush""".replace("\n    ", "").split(",")
)
# GenEval's colours and relations are those of the shapes, in the same order, which the draws below depend on.
COLORS: tuple[str, ...] = tuple(shapes.COLORS)
RELATIONS: tuple[str, ...] = shapes.RELATIONS

METADATA_FILE = "evaluation_metadata.jsonl"
PROMPTS_FILE = "generation_prompts.txt"


def _clause(name: str, count: int = 1, **attributes: Any) -> Metadata:
    return {"class": name, "count": count, **attributes}


def _entry(tag: str, include: list[Metadata], exclude: list[Metadata] | None = None) -> Metadata:
    # The order of the keys is part of the published file, and so of its checksum.
    excluded = {} if exclude is None else {"exclude": exclude}
    return {"tag": tag, "include": include, **excluded, "prompt": prompt_for(tag, include)}


def _two_object(rng: np.random.Generator) -> Metadata:
    first, second = rng.choice(len(COCO_CLASSES), size=2, replace=False)
    return _entry("two_object", [_clause(COCO_CLASSES[first]), _clause(COCO_CLASSES[second])])


def _counting(rng: np.random.Generator) -> Metadata:
    name = COCO_CLASSES[rng.choice(len(COCO_CLASSES))]
    count = int(rng.integers(2, 4, endpoint=True))
    return _entry("counting", [_clause(name, count)], [_clause(name, count + 1)])


def _never_person(index: int) -> str:
    """Map 1..79 onto the classes other than 'person' (a coloured person is never asked for)."""
    return COCO_CLASSES[(index + COCO_CLASSES.index("person")) % len(COCO_CLASSES)]


def _colors(rng: np.random.Generator) -> Metadata:
    name = _never_person(rng.choice(len(COCO_CLASSES) - 1) + 1)
    return _entry("colors", [_clause(name, color=COLORS[rng.choice(len(COLORS))])])


def _position(rng: np.random.Generator) -> Metadata:
    subject, anchor = rng.choice(len(COCO_CLASSES), size=2, replace=False)
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [_clause(COCO_CLASSES[anchor]), _clause(COCO_CLASSES[subject], position=[relation, 0])]
    return _entry("position", include)


def _color_attr(rng: np.random.Generator) -> Metadata:
    names = [_never_person(index) for index in rng.choice(len(COCO_CLASSES) - 1, size=2, replace=False) + 1]
    colors = [COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False)]
    return _entry("color_attr", [_clause(n, color=c) for n, c in zip(names, colors, strict=True)])


_DRAWS: tuple[Callable[[np.random.Generator], Metadata], ...] = (
    _two_object,
    _counting,
    _colors,
    _position,
    _color_attr,
)


def coco_prompts(per_task: int = 100, seed: int = 43) -> list[Metadata]:
    """GenEval's prompts over COCO's classes; the defaults give the published 553.

    Args:
        per_task: Prompts drawn per task; single_object always has one per class (80).
        seed: Seed of the one generator that every draw comes from.

    Returns:
        Metadata entries `{tag, include, [exclude], prompt}` in task order, exact duplicates dropped.

    Raises:
        ValueError: `per_task` is below 1.
    """
    _check_per_task(per_task)
    rng = np.random.default_rng(seed)
    singles = rng.choice(len(COCO_CLASSES), size=len(COCO_CLASSES), replace=False)
    entries = [_entry("single_object", [_clause(COCO_CLASSES[index])]) for index in singles]
    entries += [draw(rng) for draw in _DRAWS for _ in range(per_task)]
    return list({json.dumps(entry): entry for entry in entries}.values())


def shapes_prompts(per_task: int = 100, seed: int = 0) -> list[Metadata]:
    """The six tasks over the embedded shapes; combination tasks ask only for pairs that no training caption
    of the same task names.

    Raises:
        ValueError: `per_task` is below 1.
    """
    _check_per_task(per_task)
    return shapes.evaluation_metadata(per_task=per_task, seed=seed)


def _check_per_task(per_task: int) -> None:
    if per_task < 1:
        raise ValueError(f"prompts per task is {per_task}; give at least 1 (the published set has 100)")


def write_prompts(entries: Sequence[Metadata], folder: Path) -> None:
    """Write `evaluation_metadata.jsonl` and `generation_prompts.txt` into `folder`, byte for byte as published."""
    write_jsonl(folder / METADATA_FILE, entries)
    write_text(folder / PROMPTS_FILE, "".join(f"{entry['prompt']}\n" for entry in entries))


def read_prompts(path: Path) -> list[Metadata]:
    """Read the metadata entries of a folder written by `write_prompts`, or of one such .jsonl file.

    Raises:
        ValueError: no such file, no entries, or an entry lacks its tag, include list or prompt.
    """
    file = path / METADATA_FILE if path.is_dir() else path
    entries = read_jsonl(file)
    if not entries:
        raise ValueError(f"{file} holds no prompts; write them with `t2i geneval prompts --out FOLDER`")
    for number, entry in enumerate(entries, start=1):
        check_metadata(entry, f"{file} entry {number}")
    return entries


def check_metadata(entry: Metadata, where: str) -> None:
    """Raise ValueError unless an entry says what scoring needs: its task, prompt, and clauses of class and count."""
    if missing := [key for key in ("tag", "include", "prompt") if key not in entry]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it is no GenEval metadata")
    if entry["tag"] not in TAGS:
        raise ValueError(f"{where} has task {entry['tag']!r}; it must be one of {', '.join(TAGS)}")
    clauses = [*entry["include"], *entry.get("exclude", [])]
    if not all(isinstance(clause, dict) and {"class", "count"} <= clause.keys() for clause in clauses):
        raise ValueError(f"{where} has clauses without class or count; it is no GenEval metadata")
