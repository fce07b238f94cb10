"""Two sets of results over the prompts that both have: by how much they differ, and whether that can be told."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.geneval_text import TAGS
from eval.geneval.intervals import REPLICATES, prompt_draws
from eval.geneval.statistics import Difference, paired_difference

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True)
class Comparison:
    """Second minus first.

    Attributes:
        per_image: Difference of the share of right pictures, of each task that both have and then overall.
        per_prompt: The same of the share of prompts with a right picture.
        only_first: Prompts that only the first has.
        only_second: Prompts that only the second has.
        images: The least and the most pictures of a common prompt, of the first and of the second.
    """

    per_image: tuple[Difference, ...]
    per_prompt: tuple[Difference, ...]
    only_first: int
    only_second: int
    images: tuple[tuple[int, int], tuple[int, int]]

    @property
    def same_images(self) -> bool:
        """Whether both have the same number of pictures of every common prompt."""
        (least, most), second = self.images
        return least == most and second == (least, most)


def any_right(right: int, images: int, drawn: int) -> float:
    """The chance that `drawn` of a prompt's `images` pictures, `right` of them right, hold a right one.

    1 or 0 where all are drawn. So that four pictures of one model can be held against one of another.
    Source: Chen et al. 2021 (arXiv 2107.03374), the estimator of pass@k.
    """
    return 1.0 - math.comb(images - right, drawn) / math.comb(images, drawn)


Counts = dict[str, dict[str, tuple[int, int]]]


def _counts(rows: Sequence[Mapping[str, Any]]) -> Counts:
    """Task -> prompt -> right and judged pictures."""
    counts: Counts = {}
    for row in rows:
        task = counts.setdefault(row["tag"], {})
        right, images = task.get(row["metadata"], (0, 0))
        task[row["metadata"]] = (right + bool(row["correct"]), images + 1)
    return counts


def compare(
    first: Sequence[Mapping[str, Any]],
    second: Sequence[Mapping[str, Any]],
    names: tuple[str, str] = ("the first", "the second"),
    seed: int = 0,
    replicates: int = REPLICATES,
) -> Comparison:
    """How the second results differ from the first, paired over the prompts that both have.

    Args:
        first: Dicts with at least `tag`, `metadata` (the prompt's identity) and `correct`.
        second: The same of another model.
        names: What an error calls them.
        seed: Of the resampling; the same results and seed give the same intervals.
        replicates: Bootstrap samples.

    Raises:
        ValueError: they have no prompt in common.
    """
    ours, theirs = _counts(first), _counts(second)
    common = {tag: [key for key in ours.get(tag, {}) if key in theirs.get(tag, {})] for tag in TAGS}
    common = {tag: keys for tag, keys in common.items() if keys}
    if not common:
        raise ValueError(
            f"{names[0]} and {names[1]} have no prompt in common, so they cannot be compared; score both on the same "
            "prompts, or make a report of each"
        )
    rng = np.random.default_rng(seed)
    draws = [prompt_draws(len(keys), rng, replicates) for keys in common.values()]
    shares, chances = [], []
    for tag, keys in common.items():
        pairs = [(ours[tag][key], theirs[tag][key]) for key in keys]
        shares.append((np.array([a / n for (a, n), _ in pairs]), np.array([b / m for _, (b, m) in pairs])))
        chances.append(
            (
                np.array([any_right(a, n, min(n, m)) for (a, n), (_, m) in pairs]),
                np.array([any_right(b, m, min(n, m)) for (_, n), (b, m) in pairs]),
            )
        )
    differences = []
    for tasks in (shares, chances):
        each = [paired_difference(tag, tasks[i : i + 1], draws[i : i + 1]) for i, tag in enumerate(common)]
        differences.append((*each, paired_difference("overall", tasks, draws)))
    numbers = [[counts[tag][key][1] for tag, keys in common.items() for key in keys] for counts in (ours, theirs)]
    shared = sum(map(len, common.values()))
    return Comparison(
        per_image=differences[0],
        per_prompt=differences[1],
        only_first=sum(map(len, ours.values())) - shared,
        only_second=sum(map(len, theirs.values())) - shared,
        images=((min(numbers[0]), max(numbers[0])), (min(numbers[1]), max(numbers[1]))),
    )
