"""Scores with their uncertainty: task and overall means with bootstrap intervals over prompts.

The images of one prompt are not independent, so the prompt is the unit that is resampled, within its task; the
overall score is the mean of the task scores, as GenEval defines it, in every replicate.

Legend of name suffixes: R bootstrap replicates, P prompts.

Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from data_pipeline.geneval_text import TAGS

__all__ = ["Interval", "Summary", "TaskScore", "bootstrap_means", "score_table", "summarize", "wilson_interval"]

LEVEL = 0.95
REPLICATES = 10_000


@dataclass(frozen=True)
class Interval:
    """An estimate in 0..1 and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class TaskScore:
    """The score of one task (or, with tag 'overall', of all of them).

    Attributes:
        tag: The task.
        prompts: How many prompts it has.
        images: How many pictures were judged.
        correct: How many of them were right.
        unreadable: How many of them could not be read (they count as wrong).
        per_image: Share of pictures that are right.
        per_prompt: Share of prompts with at least one right picture.
    """

    tag: str
    prompts: int
    images: int
    correct: int
    unreadable: int
    per_image: Interval
    per_prompt: Interval


@dataclass(frozen=True)
class Summary:
    """The scores of one set of results: its tasks in GenEval's order, and overall as the mean of the tasks."""

    tasks: tuple[TaskScore, ...]
    overall: TaskScore

    def __getitem__(self, tag: str) -> TaskScore:
        for score in (*self.tasks, self.overall):
            if score.tag == tag:
                return score
        raise KeyError(tag)

    @property
    def tags(self) -> tuple[str, ...]:
        """The tasks that have results, and 'overall'."""
        return tuple(score.tag for score in (*self.tasks, self.overall))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers, for `json.dumps`."""
        return asdict(self)


def bootstrap_means(
    totals_P: NDArray[np.float64],
    weights_P: NDArray[np.float64],
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> NDArray[np.float64]:
    """Means of `replicates` bootstrap samples of the prompts, float64 [R].

    A prompt contributes `totals_P` right answers out of `weights_P`. Written out rather than taken from
    `scipy.stats.bootstrap` because the overall score and paired comparisons need the replicates of each task.
    """
    prompts = len(totals_P)
    counts_RP = rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=replicates)
    return np.asarray((counts_RP @ totals_P) / (counts_RP @ weights_P), dtype=np.float64)


def wilson_interval(right: int, total: int) -> Interval:
    """The share of right answers among independent ones, with Wilson's score interval, which is no point at 0 and 1.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    assert 0 <= right <= total > 0, (right, total)
    z, share = NormalDist().inv_cdf((1 + LEVEL) / 2), right / total
    center = (share + z**2 / (2 * total)) / (1 + z**2 / total)
    reach = z / (1 + z**2 / total) * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    # Rounding may put an end a hair beyond 0, 1 or the share itself.
    return Interval(share, max(0.0, min(share, center - reach)), min(1.0, max(share, center + reach)))


def _interval(value: float, replicates_R: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(replicates_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def _prompt_counts(rows: Iterable[Mapping[str, Any]]) -> NDArray[np.float64]:
    """Right and judged pictures of each prompt, float64 [2, P]."""
    counts: dict[str, list[int]] = {}
    for row in rows:
        # The metadata, not the sentence, identifies a prompt: two prompts may read the same.
        entry = counts.setdefault(row["metadata"], [0, 0])
        entry[0] += bool(row["correct"])
        entry[1] += 1
    return np.array(list(counts.values()), dtype=np.float64).T


def summarize(rows: Sequence[Mapping[str, Any]], seed: int = 0) -> Summary:
    """Scores and 95% intervals of results.jsonl rows.

    Args:
        rows: Dicts with at least `tag`, `metadata` (the prompt's identity) and `correct`.
        seed: Seed of the resampling; the same rows and seed give the same intervals.

    Raises:
        ValueError: no rows, or a row's tag is none of GenEval's tasks.
    """
    if not rows:
        raise ValueError("there are no results to summarise; score a folder of pictures first")
    by_tag: dict[str, list[Mapping[str, Any]]] = {tag: [] for tag in TAGS}
    for row in rows:
        if row["tag"] not in by_tag:
            raise ValueError(f"a result has task {row['tag']!r}; it must be one of {', '.join(TAGS)}")
        by_tag[row["tag"]].append(row)

    rng = np.random.default_rng(seed)
    tasks: list[TaskScore] = []
    replicates: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
    for tag, task_rows in by_tag.items():
        if not task_rows:
            continue
        correct_P, images_P = _prompt_counts(task_rows)
        any_P, one_P = (correct_P > 0).astype(np.float64), np.ones_like(correct_P)
        by_image_R = bootstrap_means(correct_P, images_P, rng)
        by_prompt_R = bootstrap_means(any_P, one_P, rng)
        replicates.append((by_image_R, by_prompt_R))
        tasks.append(
            TaskScore(
                tag=tag,
                prompts=len(correct_P),
                images=int(images_P.sum()),
                correct=int(correct_P.sum()),
                unreadable=sum(bool(row.get("unreadable")) for row in task_rows),
                per_image=_interval(correct_P.sum() / images_P.sum(), by_image_R),
                per_prompt=_interval(any_P.mean(), by_prompt_R),
            )
        )
    overall = TaskScore(
        tag="overall",
        prompts=sum(task.prompts for task in tasks),
        images=sum(task.images for task in tasks),
        correct=sum(task.correct for task in tasks),
        unreadable=sum(task.unreadable for task in tasks),
        per_image=_interval(
            float(np.mean([task.per_image.value for task in tasks])), np.mean([r[0] for r in replicates], axis=0)
        ),
        per_prompt=_interval(
            float(np.mean([task.per_prompt.value for task in tasks])),
            np.mean([r[1] for r in replicates], axis=0),
        ),
    )
    return Summary(tuple(tasks), overall)


def score_table(summary: Summary, ceilings: Mapping[str, Summary] | None = None, title: str = "GenEval") -> Table:
    """A table of the tasks and overall, each with its interval, beside the ceilings (name -> summary)."""
    ceilings = ceilings or {}
    table = Table(
        title=title,
        caption="score: share of right pictures, bootstrapped over prompts\n"
        "any: share of prompts with at least one right picture; overall: mean of the tasks",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    table.add_column("task", no_wrap=True)
    table.add_column("right", justify="right", no_wrap=True)
    table.add_column("score [95% interval]", justify="right", no_wrap=True)
    table.add_column("any", justify="right", no_wrap=True)
    for name in ceilings:
        table.add_column("\n".join(["ceiling:", *name.split()]), justify="right", no_wrap=True)
    for score in (*summary.tasks, summary.overall):
        is_overall = score.tag == "overall"
        if is_overall:
            table.add_section()
        # Beside ceilings there is no room for another interval on a line of 80 characters.
        any_right = f"{score.per_prompt.value:.3f}" if ceilings else str(score.per_prompt)
        cells = [score.tag, f"{score.correct}/{score.images}", str(score.per_image), any_right]
        for ceiling in ceilings.values():
            cells.append(f"{ceiling[score.tag].per_image.value:.3f}" if score.tag in ceiling.tags else "-")
        table.add_row(*cells, style="bold" if is_overall else None)
    if summary.overall.unreadable:
        table.caption = f"{summary.overall.unreadable} pictures could not be read and count as wrong;\n{table.caption}"
    return table
