"""GenEval's caption templates: the sentence of a prompt from its metadata.

Used wherever a caption must read exactly like a GenEval prompt: the published evaluation prompts, the shapes
evaluation prompts, and the captions of the shapes training pictures. Pure string work, no dependencies.

Source: GenEval (Ghosh et al. 2023, arXiv 2310.11513), prompts/create_prompts.py.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

__all__ = ["TAGS", "prompt_for", "with_article"]

Clause = Mapping[str, Any]

NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}


def with_article(noun_phrase: str) -> str:
    """'bench' -> 'a bench', 'orange bench' -> 'an orange bench' (by the first letter, as GenEval does)."""
    if not noun_phrase:
        raise ValueError("a noun phrase is empty; give the class name of each include entry")
    return f"{'an' if noun_phrase[0].lower() in 'aeiou' else 'a'} {noun_phrase}"


def plural(noun: str) -> str:
    """GenEval's plural: 'es' after a final s, else 's' ('bus' -> 'buses', 'bench' -> 'benchs')."""
    return f"{noun}es" if noun.endswith("s") else f"{noun}s"


def _described(clause: Clause) -> str:
    """The noun of an include entry, after its colour where it has one: 'red bench'."""
    color = clause.get("color")
    return f"{color} {clause['class']}" if color else str(clause["class"])


def _single(include: Sequence[Clause]) -> str:
    return with_article(_described(include[0]))


def _pair(include: Sequence[Clause]) -> str:
    return " and ".join(with_article(_described(clause)) for clause in include[:2])


def _counting(include: Sequence[Clause]) -> str:
    count = include[0]["count"]
    if count not in NUMBER_WORDS:
        raise ValueError(f"counting prompt asks for {count} objects; it must be 2, 3 or 4")
    return f"{NUMBER_WORDS[count]} {plural(_described(include[0]))}"


def _position(include: Sequence[Clause]) -> str:
    # The anchor comes first in the metadata and last in the sentence.
    anchor, subject = include[:2]
    relation, target = subject.get("position") or (None, None)
    if relation is None or target != 0:
        raise ValueError(
            f"position prompt has position {subject.get('position')!r} in its second entry; "
            "it must be [relation, 0], relative to the first"
        )
    return f"{with_article(_described(subject))} {relation} {with_article(_described(anchor))}"


_TEMPLATES: dict[str, tuple[int, Callable[[Sequence[Clause]], str]]] = {
    "single_object": (1, _single),
    "two_object": (2, _pair),
    "counting": (1, _counting),
    "colors": (1, _single),
    "position": (2, _position),
    "color_attr": (2, _pair),
}

TAGS: tuple[str, ...] = tuple(_TEMPLATES)
"""GenEval's six tasks, in its order."""


def prompt_for(tag: str, include: Sequence[Clause]) -> str:
    """The prompt of one GenEval metadata entry.

    Args:
        tag: One of `TAGS`.
        include: GenEval's include list, entries `{class, count, [color], [position]}`. For `position` the
            anchor comes first and the object that the sentence starts with second, with
            `position: [relation, 0]`; a colour there is put before its noun.

    Returns:
        For example 'a photo of a bench left of a cow'.

    Raises:
        ValueError: unknown tag, wrong number of entries, or a count without a number word.
    """
    if tag not in _TEMPLATES:
        raise ValueError(f"unknown GenEval task {tag!r}; choose one of {', '.join(TAGS)}")
    entries, template = _TEMPLATES[tag]
    if len(include) != entries:
        raise ValueError(f"a {tag} prompt has {len(include)} include entries; it needs {entries}")
    return f"a photo of {template(include)}"
