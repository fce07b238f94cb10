"""The report's charts as inline SVG that takes its colours from the page, so that dark and light both work."""

import io
import re
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from data_pipeline.geneval_text import TAGS
from eval.geneval.statistics import Summary

__all__ = ["loss_chart", "score_chart"]

# Colours that only serve as names: each is replaced by a variable of the page's style sheet.
INK, GRID, FIRST, SECOND, MARK = "#000001", "#000002", "#000003", "#000004", "#000005"
MODELS = ("#000010", "#000011", "#000012", "#000013", "#000014", "#000015")
"""Of the models in turn, one after the other; the page's `--model0` and so on."""
_PAGE_COLORS = {
    INK: "currentColor", GRID: "var(--line)", FIRST: "var(--accent)", SECOND: "var(--second)", MARK: "var(--mark)",
    **{name: f"var(--model{number})" for number, name in enumerate(MODELS)},
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": GRID, "legend.frameon": False,
}  # fmt: skip
MOST_POINTS = 800
CEILING_STYLES: tuple[Any, ...] = ("-", (0, (2, 1.5)))
"""Of the marks at the ceilings in turn; the page's legend knows them as solid and dashed."""

Points = Sequence[tuple[int, float]]


def _svg(figure: Figure, label: str) -> str:
    """A figure as an <svg> element for an HTML page, without the parts that only a file of its own needs."""
    stream = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": label}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    text = stream.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    for name, page_color in _PAGE_COLORS.items():
        text = text.replace(name, page_color)
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)


def _thinned(points: Points) -> tuple[list[float], list[float]]:
    """At most `MOST_POINTS` points, each the mean of a stretch of the curve."""
    parts = np.array_split(np.array(points, dtype=np.float64), min(len(points), MOST_POINTS))
    means = np.array([part.mean(axis=0) for part in parts])
    return means[:, 0].tolist(), means[:, 1].tolist()


def loss_chart(training: Points, validation: Points) -> str:
    """Loss over steps: (step, loss) points of training and, perhaps none, of validation."""
    with rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        axes = figure.subplots()
        if training:
            axes.plot(*_thinned(training), color=FIRST, linewidth=1.3, label="training")
        if validation:
            axes.plot(*_thinned(validation), color=SECOND, linewidth=1.6, marker="o", markersize=3, label="validation")
        # The first points, from a loss of ln(vocabulary) or more, would flatten everything that follows.
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("step")
        axes.set_ylabel("cross-entropy, nats a token")
        axes.grid(axis="y", linewidth=0.6)
        axes.legend()
        return _svg(figure, "Loss over training steps")


def score_chart(summaries: Sequence[Summary], ceilings: Sequence[Mapping[str, Summary]]) -> str:
    """Scores per task and overall of one model or several, as bars with their 95% intervals.

    A model's bars have its colour, and marks at its ceilings. Names are left to the page: they may be anything.
    """
    tags = [tag for tag in (*TAGS, "overall") if any(tag in summary.tags for summary in summaries)]
    height = 0.76 / len(summaries)

    def place_of(tag: str, number: int) -> float:
        return tags.index(tag) - 0.38 + (number + 0.5) * height

    with rc_context(_STYLE):
        figure = Figure(figsize=(4.8, 0.5 + len(tags) * max(0.3, 0.16 * len(summaries))), layout="constrained")
        axes = figure.subplots()
        for number, (summary, limits) in enumerate(zip(summaries, ceilings, strict=True)):
            scores = [summary[tag].per_image for tag in summary.tags]
            places, values = [place_of(tag, number) for tag in summary.tags], [score.value for score in scores]
            ends = np.array([(score.value - score.low, score.high - score.value) for score in scores]).T
            axes.barh(places, values, height=0.88 * height, color=MODELS[number % len(MODELS)])
            axes.errorbar(
                values, places, xerr=np.maximum(ends, 0), fmt="none", ecolor=INK, elinewidth=1.1,
                capsize=min(3.0, 9 * height),
            )  # fmt: skip
            for ceiling, style in zip(limits.values(), cycle(CEILING_STYLES), strict=False):
                tags_there = [tag for tag in summary.tags if tag in ceiling.tags]
                middles = np.array([place_of(tag, number) for tag in tags_there])
                axes.vlines(
                    [ceiling[tag].per_image.value for tag in tags_there], middles - height / 2, middles + height / 2,
                    color=MARK, linewidth=1.6, linestyle=style,
                )  # fmt: skip
        axes.axhline(len(tags) - 1.5, color=GRID, linewidth=0.8)  # overall is no task
        names = {summary.overall_name for summary in summaries}
        overall = names.pop() if len(names) == 1 else "overall (tasks differ)"
        axes.set_yticks(
            range(len(tags)),
            [overall.replace(" (", "\n(") if tag == "overall" else tag.replace("_", " ") for tag in tags],
        )
        axes.set_xlim(0, 1.02)
        axes.invert_yaxis()
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        return _svg(figure, "Scores by task with 95% intervals; the table of scores has the numbers")
