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

from eval.geneval.statistics import Summary

__all__ = ["loss_chart", "score_chart"]

# Colours that only serve as names: each is replaced by a variable of the page's style sheet.
INK, GRID, FIRST, SECOND, MARK = "#000001", "#000002", "#000003", "#000004", "#000005"
_PAGE_COLORS = {
    INK: "currentColor", GRID: "var(--line)", FIRST: "var(--accent)", SECOND: "var(--second)", MARK: "var(--mark)",
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9, "text.color": INK, "axes.edgecolor": GRID,
    "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
    "axes.spines.right": False, "grid.color": GRID, "legend.frameon": False,
}  # fmt: skip
MOST_POINTS = 800

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
        figure = Figure(figsize=(5.2, 2.9), layout="constrained")
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


def score_chart(summary: Summary, ceilings: Mapping[str, Summary]) -> str:
    """Scores per task and overall as bars with their 95% intervals, and a mark at each ceiling."""
    scores = (*summary.tasks, summary.overall)
    places = np.arange(len(scores))
    values = np.array([score.per_image.value for score in scores])
    errors = np.array([
        [score.per_image.value - score.per_image.low, score.per_image.high - score.per_image.value] for score in scores
    ]).T  # fmt: skip
    with rc_context(_STYLE):
        figure = Figure(figsize=(5.2, 0.36 * len(scores) + 0.9), layout="constrained")
        axes = figure.subplots()
        axes.barh(places, values, height=0.6, color=[FIRST] * len(summary.tasks) + [SECOND])
        axes.errorbar(
            values, places, xerr=np.maximum(errors, 0), fmt="none", ecolor=INK, elinewidth=1.2, capsize=3,
            label="95% interval",
        )  # fmt: skip
        for (name, ceiling), style in zip(ceilings.items(), cycle(("-", (0, (2, 1.5)))), strict=False):
            found = [(place, ceiling[s.tag].per_image.value) for place, s in enumerate(scores) if s.tag in ceiling.tags]
            axes.vlines(
                [value for _, value in found], [place - 0.4 for place, _ in found], [place + 0.4 for place, _ in found],
                color=MARK, linewidth=1.6, linestyle=style, label=f"ceiling: {name}",
            )  # fmt: skip
        axes.set_yticks(places, [score.tag.replace("_", " ") for score in scores])
        axes.set_xlim(0, 1.02)
        axes.invert_yaxis()
        axes.grid(axis="x", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        figure.legend(loc="outside lower center", ncols=3, handlelength=1.4, columnspacing=1.2)
        return _svg(figure, "Scores by task with intervals and ceilings")
