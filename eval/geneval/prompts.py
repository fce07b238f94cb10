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
from eval.files import read_numbered_jsonl, write_jsonl, write_text

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
        ValueError: no such file, no entries, or one that `check_metadata` refuses.
    """
    file = path / METADATA_FILE if path.is_dir() else path
    entries = read_numbered_jsonl(file)
    if not entries:
        raise ValueError(f"{file} holds no prompts; write them with `t2i geneval prompts --out FOLDER`")
    for number, entry in entries:
        check_metadata(entry, f"{file} line {number}")
    return [entry for _, entry in entries]


def check_metadata(entry: Metadata, where: str) -> None:
    """Raise ValueError, which begins with `where`, unless an entry can be judged as it means.

    It needs a task, a prompt, and at least one clause of class and count, with a colour of `COLORS` and a relation of
    `RELATIONS` to an earlier clause where it names such: with anything else every picture would be wrong, or right.
    """
    if missing := [key for key in ("tag", "include", "prompt") if key not in entry]:
        raise ValueError(f"{where} lacks {', '.join(missing)}; it is no GenEval metadata")
    tag, prompt, include, exclude = entry["tag"], entry["prompt"], entry["include"], entry.get("exclude", [])
    if tag not in TAGS:
        raise ValueError(f"{where} has task {tag!r:.80}; it must be one of {', '.join(TAGS)}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where} has prompt {prompt!r:.80}; it must be the sentence that pictures are drawn of")
    if not isinstance(include, list) or not include:
        raise ValueError(
            f"{where} has include {include!r:.80}; it must be a list of the objects asked for, at least one"
        )
    if not isinstance(exclude, list):
        raise ValueError(f"{where} has exclude {exclude!r:.80}; it must be a list, or left out")
    for number, clause in enumerate(include):
        what = f"{where}: include {number + 1}"
        _check_clause(clause, what)
        if "color" in clause and clause["color"] not in COLORS:
            raise ValueError(f"{what} has color {clause['color']!r:.80}; it must be one of {', '.join(COLORS)}")
        if "position" in clause and not _is_position(clause["position"], number):
            raise ValueError(
                f"{what} has position {clause['position']!r:.80}; it must be [RELATION, N], one of {', '.join(RELATIONS)} and "
                "the number of an earlier object, from 0"
            )
    for number, clause in enumerate(exclude, start=1):
        what = f"{where}: exclude {number}"
        _check_clause(clause, what)
        if ignored := [key for key in ("color", "position") if key in clause]:
            raise ValueError(f"{what} has a {ignored[0]}, which is not judged there; delete it")


def _check_clause(clause: Any, what: str) -> None:
    if not isinstance(clause, dict):
        raise ValueError(f"{what} is {clause!r:.80}; it must be an object with class and count")
    if "class" not in clause:
        raise ValueError(f"{what} has no class; give the name of what is asked for")
    if "count" not in clause:
        raise ValueError(f"{what} has no count; give a whole number of at least 1")
    name, count = clause["class"], clause["count"]
    if not isinstance(name, str) or not name:
        raise ValueError(f"{what} has class {name!r:.80}; it must be a name")
    if type(count) is not int or count < 1:
        raise ValueError(f"{what} has count {count!r:.80}; it must be a whole number of at least 1")


def _is_position(position: Any, number: int) -> bool:
    """Whether that is a relation to a clause before the one of that number."""
    if not isinstance(position, list) or len(position) != 2:
        return False
    relation, target = position
    return relation in RELATIONS and type(target) is int and 0 <= target < number
