"""Charts: the colours of the page, and no more points than are seen."""

import re

import numpy as np

from eval.geneval.charts import MODELS, loss_chart, score_chart
from eval.geneval.results import Results


def test_charts_take_the_colors_of_the_page(models: list[Results]) -> None:
    summaries = [results.summary for results in models] * 4
    chart = score_chart(summaries, [results.ceilings for results in models] * 4)
    for drawn in (loss_chart(((1, 2.0), (2, 1.0)), ()), chart):
        assert "currentColor" in drawn
        assert not re.findall(r"#0000\d\d", drawn)
    # More models than colours begin again.
    assert {f"var(--model{number})" for number in range(len(MODELS))} <= set(re.findall(r"var\(--model\d+\)", chart))
    assert chart.count("<path") > score_chart(summaries[:1], [{}]).count("<path")


def test_a_long_run_has_a_small_chart() -> None:
    rng = np.random.default_rng(0)
    points = [(step, float(rng.random())) for step in range(100_000)]
    assert len(loss_chart(points, points[::1000])) < 100_000
