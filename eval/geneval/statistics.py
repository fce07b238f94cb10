"""Scores with their uncertainty: task and overall means with bootstrap intervals over prompts.

The overall score is the mean of the task scores, as GenEval defines it, in every replicate. Two models are compared on the
prompts that both have, with the same prompts drawn for both: what makes a prompt hard for both then cancels.

Legend of name suffixes: R bootstrap replicates, P prompts.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from data_pipeline.geneval_text import TAGS
from eval.geneval.intervals import Interval, mean_interval, percentiles, share_interval, share_replicates

__all__ = ["Difference", "Summary", "TaskScore", "overall_name", "paired_difference", "score_table", "summarize"]

FEWEST_DIFFERING = 6
"""Prompts on which two models must differ before they are told apart.

A bootstrap of a handful of prompts is too sure of itself. Were two models equal, five prompts would all favour the same
one in 2 of 2**5 cases, more than 5 %; six in 2 of 2**6.
"""


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


def overall_name(tasks: int) -> str:
    """What the mean of so many tasks is called: "overall" alone is that of all six."""
    return "overall" if tasks == len(TAGS) else f"overall ({tasks} of {len(TAGS)} tasks)"


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

    @property
    def missing(self) -> tuple[str, ...]:
        """The tasks that have none."""
        return tuple(tag for tag in TAGS if tag not in self.tags)

    @property
    def overall_name(self) -> str:
        """What the overall score is called: "overall (1 of 6 tasks)" where it is not of all."""
        return overall_name(len(self.tasks))

    def to_json(self) -> dict[str, Any]:
        """Plain dicts and numbers, for `json.dumps`."""
        return asdict(self)


@dataclass(frozen=True)
class Difference:
    """How two models differ in a task (or, with tag 'overall', in the mean of the tasks), over the prompts of both.

    Attributes:
        tag: The task.
        prompts: How many prompts both have.
        differing: On how many of them their scores differ.
        first: Score of the first model over these prompts.
        second: Score of the second.
        interval: Second minus first.
    """

    tag: str
    prompts: int
    differing: int
    first: float
    second: float
    interval: Interval

    @property
    def verdict(self) -> str:
        """'higher' or 'lower' (the second model), 'not distinguishable', or 'too few prompts differ'."""
        # Sums of fractions may miss zero by a rounding error.
        if self.interval.low <= 1e-9 and self.interval.high >= -1e-9:
            return "not distinguishable"
        if self.differing < FEWEST_DIFFERING:
            return "too few prompts differ"
        return "higher" if self.interval.value > 0 else "lower"


def paired_difference(
    tag: str,
    tasks: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    draws: Sequence[NDArray[np.int64]],
) -> Difference:
    """The difference of two models' scores, the mean over the tasks of the mean over the prompts, with its interval.

    Args:
        tag: What the tasks are together: one task's name, or 'overall'.
        tasks: Of each task both models' score of each prompt, [P] and [P] in the same order; P differs between tasks.
        draws: Of each task `prompt_draws`, [R, P].
    """
    pairs = zip(tasks, draws, strict=True)
    gains_R = np.mean(
        [counts_RP @ (second_P - first_P) / len(first_P) for (first_P, second_P), counts_RP in pairs], axis=0
    )
    first = float(np.mean([first_P.mean() for first_P, _ in tasks]))
    second = float(np.mean([second_P.mean() for _, second_P in tasks]))
    raw = percentiles(second - first, gains_R)
    # Where all prompts differ alike the ends are the difference itself, up to rounding.
    interval = Interval(raw.value, min(raw.low, raw.value), max(raw.high, raw.value))
    return Difference(
        tag=tag,
        prompts=sum(len(first_P) for first_P, _ in tasks),
        differing=sum(int((np.abs(second_P - first_P) > 1e-9).sum()) for first_P, second_P in tasks),
        first=first,
        second=second,
        interval=interval,
    )


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
        by_image_R = share_replicates(correct_P, images_P, rng)
        by_prompt_R = share_replicates(any_P, one_P, rng)
        replicates.append((by_image_R, by_prompt_R))
        tasks.append(
            TaskScore(
                tag=tag,
                prompts=len(correct_P),
                images=int(images_P.sum()),
                correct=int(correct_P.sum()),
                unreadable=sum(bool(row.get("unreadable")) for row in task_rows),
                per_image=share_interval(correct_P.sum() / images_P.sum(), by_image_R),
                per_prompt=share_interval(any_P.mean(), by_prompt_R),
            )
        )
    overall = TaskScore(
        tag="overall",
        prompts=sum(task.prompts for task in tasks),
        images=sum(task.images for task in tasks),
        correct=sum(task.correct for task in tasks),
        unreadable=sum(task.unreadable for task in tasks),
        per_image=mean_interval([task.per_image.value for task in tasks], [one for one, _ in replicates]),
        per_prompt=mean_interval([task.per_prompt.value for task in tasks], [one for _, one in replicates]),
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
        name = summary.overall_name.replace(" (", "\n(") if is_overall else score.tag
        cells = [name, f"{score.correct}/{score.images}", str(score.per_image), any_right]
        for ceiling in ceilings.values():
            cells.append(f"{ceiling[score.tag].per_image.value:.3f}" if score.tag in ceiling.tags else "-")
        table.add_row(*cells, style="bold" if is_overall else None)
    if summary.overall.unreadable:
        table.caption = f"{summary.overall.unreadable} pictures could not be read and count as wrong;\n{table.caption}"
    return table
