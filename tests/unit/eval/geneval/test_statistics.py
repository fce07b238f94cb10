"""Scores and intervals: exact values, agreement with scipy, and coverage."""

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from data_pipeline.geneval_text import TAGS
from eval.geneval.statistics import Interval, bootstrap_means, score_table, summarize, wilson_interval


def rows_of(tag: str, right: list[int], images: int = 4) -> list[dict[str, Any]]:
    """`right[i]` of the `images` pictures of prompt i are right."""
    return [
        {"tag": tag, "metadata": f"{tag} {prompt}", "correct": number < count}
        for prompt, count in enumerate(right)
        for number in range(images)
    ]


def test_task_and_overall_values() -> None:
    summary = summarize(rows_of("single_object", [4, 4, 0, 2]) + rows_of("counting", [1, 0]))
    single, counting = summary["single_object"], summary["counting"]
    assert (single.prompts, single.images, single.correct) == (4, 16, 10)
    assert single.per_image.value == 10 / 16
    assert single.per_prompt.value == 3 / 4
    assert counting.per_image.value == 1 / 8
    # The mean of the tasks, not of the pictures.
    assert summary.overall.per_image.value == pytest.approx((10 / 16 + 1 / 8) / 2)
    assert summary.overall.per_prompt.value == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert summary.tags == ("single_object", "counting", "overall")


def test_intervals_agree_with_scipy() -> None:
    right = np.random.default_rng(0).integers(0, 5, size=60)
    ours = summarize(rows_of("colors", right.tolist()))["colors"].per_image
    theirs = scipy.stats.bootstrap(
        (right / 4,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)


def test_images_of_a_prompt_are_not_taken_for_independent() -> None:
    together = summarize(rows_of("colors", [4] * 25 + [0] * 25))["colors"].per_image
    spread = summarize(rows_of("colors", [2] * 50))["colors"].per_image
    assert together.value == spread.value == 0.5
    assert together.high - together.low > 0.2
    assert spread.high == spread.low == 0.5


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    chance = 0.7
    hits = 0
    for _ in range(200):
        right = rng.binomial(1, chance, size=80).astype(float)
        low, high = np.quantile(bootstrap_means(right, np.ones(80), rng, replicates=500), [0.025, 0.975])
        hits += low <= chance <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_prompts_weigh_by_their_images() -> None:
    rows = rows_of("colors", [1], images=1) + [{"tag": "colors", "metadata": "x", "correct": False}] * 3
    assert summarize(rows)["colors"].per_image.value == 0.25


def test_the_same_rows_give_the_same_intervals_and_json() -> None:
    rows = [row for tag in TAGS for row in rows_of(tag, [4, 3, 1, 0, 2])]
    first, second = summarize(rows), summarize(rows)
    assert first == second
    assert json.loads(json.dumps(first.to_json()))["overall"]["per_image"]["value"] == 0.5
    width = {tag: first[tag].per_image.high - first[tag].per_image.low for tag in first.tags}
    assert width["overall"] < min(width[tag] for tag in TAGS)


def test_unreadable_pictures_are_counted_and_shown() -> None:
    rows = rows_of("colors", [1, 1], images=2)
    rows[1]["unreadable"] = True
    summary = summarize(rows)
    assert summary["colors"].unreadable == summary.overall.unreadable == 1
    assert "1 pictures could not be read" in rendered(score_table(summary))


def test_table_has_tasks_overall_and_ceilings() -> None:
    summary = summarize([row for tag in TAGS for row in rows_of(tag, [4, 2])])
    text = rendered(score_table(summary, {"ground truth": summary, "colors only": summarize(rows_of("colors", [4]))}))
    for word in (*TAGS, "overall", "ground", "truth", "0.750", "1.000"):
        assert word in text


def rendered(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


def test_interval_reads_well() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize(("right", "total"), [(0, 8), (8, 8), (1, 3), (37, 128), (128, 128), (1, 1)])
def test_wilsons_interval_agrees_with_scipy(right: int, total: int) -> None:
    ours = wilson_interval(right, total)
    theirs = scipy.stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert ours.value == right / total
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_nothing_to_summarise_and_unknown_tasks_are_errors() -> None:
    with pytest.raises(ValueError, match="no results"):
        summarize([])
    with pytest.raises(ValueError, match="'shapes'"):
        summarize([{"tag": "shapes", "metadata": "", "correct": True}])
