"""Scores and intervals: exact values, agreement with scipy, and coverage."""

import json
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console

from data_pipeline.geneval_text import TAGS
from eval.geneval.statistics import score_table, summarize


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
    assert 0 < spread.high - spread.low < 0.05


def test_prompts_weigh_by_their_images() -> None:
    rows = rows_of("colors", [1], images=1) + [{"tag": "colors", "metadata": "x", "correct": False}] * 3
    assert summarize(rows)["colors"].per_image.value == 0.25


def test_all_right_and_all_wrong_are_no_points() -> None:
    right, wrong = (summarize(rows_of("colors", [count] * 80)) for count in (4, 0))
    for name in ("per_image", "per_prompt"):
        one, other = getattr(right["colors"], name), getattr(wrong["colors"], name)
        assert (one.value, one.high) == (1.0, 1.0)
        assert (other.value, other.low) == (0.0, 0.0)
        assert one.low == pytest.approx(0.969, abs=0.002)  # Jeffreys's of 80 of 80
        assert other.high == pytest.approx(0.031, abs=0.002)
        assert getattr(right.overall, name) == one  # of one task, overall is that task
    six = summarize([row for tag in TAGS for row in rows_of(tag, [4] * 80)])
    assert six.overall.per_image.high == 1.0
    assert six["colors"].per_image.low < six.overall.per_image.low < 1.0


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


def test_an_overall_score_of_some_tasks_says_so() -> None:
    some = summarize(rows_of("colors", [4, 2]) + rows_of("counting", [1, 0]))
    assert some.overall_name == "overall (2 of 6 tasks)"
    assert some.missing == ("single_object", "two_object", "position", "color_attr")
    for ceilings in (None, {"ground truth": some}):
        lines = rendered(score_table(some, ceilings))
        assert "(2 of 6 tasks)" in lines
    every = summarize([row for tag in TAGS for row in rows_of(tag, [1])])
    assert (every.overall_name, every.missing) == ("overall", ())
    assert "tasks)" not in rendered(score_table(every))


def rendered(table: Any) -> str:
    console = Console(width=160)
    with console.capture() as shown:
        console.print(table)
    return shown.get()


def test_nothing_to_summarise_and_unknown_tasks_are_errors() -> None:
    with pytest.raises(ValueError, match="no results"):
        summarize([])
    with pytest.raises(ValueError, match="'shapes'"):
        summarize([{"tag": "shapes", "metadata": "", "correct": True}])
