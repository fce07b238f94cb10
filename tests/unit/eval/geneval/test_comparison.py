"""Paired comparisons: against a slow oracle, and what must hold of any two sets of results."""

from itertools import combinations
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.geneval_text import TAGS
from eval.geneval.comparison import any_right, compare
from eval.geneval.statistics import summarize

Rows = list[dict[str, Any]]
REPLICATES = 200


def rows_of(tag: str, right: dict[str, list[bool]]) -> Rows:
    """Prompt -> whether each of its pictures is right."""
    return [{"tag": tag, "metadata": f"{tag} {p}", "correct": one} for p, pictures in right.items() for one in pictures]


verdicts = st.lists(st.booleans(), min_size=1, max_size=4)
prompt_sets = st.dictionaries(st.sampled_from("abcdefghij"), verdicts, min_size=1, max_size=8)
results = st.dictionaries(st.sampled_from(TAGS[:3]), prompt_sets, min_size=1).map(
    lambda tasks: [row for tag, right in tasks.items() for row in rows_of(tag, right)]
)


def prompts(rows: Rows) -> list[str]:
    """In their order."""
    return list(dict.fromkeys(row["metadata"] for row in rows))


def slow_interval(first: Rows, second: Rows, tags: list[str], all_tags: list[str], per_prompt: bool) -> list[float]:
    """The interval in plain Python, one bootstrap sample after the other, over the same random draws."""
    rng = np.random.default_rng(0)
    draws = {}
    shared = {tag: [p for p in prompts(first) if p in prompts(second) and p.startswith(f"{tag} ")] for tag in all_tags}
    for tag in all_tags:
        number = len(shared[tag])
        draws[tag] = [rng.multinomial(number, [1 / number] * number) for _ in range(REPLICATES)]

    def score(rows: Rows, prompt: str) -> float:
        found = [row["correct"] for row in rows if row["metadata"] == prompt]
        return float(any(found)) if per_prompt else sum(found) / len(found)

    gains = []
    for sample in range(REPLICATES):
        tasks = []
        for tag in tags:
            drawn = [p for p, times in zip(shared[tag], draws[tag][sample], strict=True) for _ in range(times)]
            tasks.append(sum(score(second, p) - score(first, p) for p in drawn) / len(drawn))
        gains.append(sum(tasks) / len(tasks))
    return list(np.quantile(gains, [0.025, 0.975]))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.booleans())
def test_intervals_are_those_of_a_slow_oracle(seed: int, per_prompt: bool) -> None:
    rng = np.random.default_rng(seed)

    def made(skip: int) -> Rows:
        kept = {tag: [f"{n}" for n in range(9) if n != skip] for tag in TAGS[:2]}
        return [
            row
            for tag, names in kept.items()
            for row in rows_of(tag, {name: (rng.random(3) < rng.random()).tolist() for name in names})
        ]

    first, second = made(2), made(5)
    found = compare(first, second, replicates=REPLICATES)
    differences = found.per_prompt if per_prompt else found.per_image
    for difference in differences:
        tags = list(TAGS[:2]) if difference.tag == "overall" else [difference.tag]
        low, high = slow_interval(first, second, tags, list(TAGS[:2]), per_prompt)
        value = difference.interval.value
        assert difference.interval.low == pytest.approx(min(low, value))
        assert difference.interval.high == pytest.approx(max(high, value))
    assert (found.only_first, found.only_second) == (2, 2)
    assert [d.prompts for d in differences] == [7, 7, 14]


@settings(max_examples=40, deadline=None)
@given(results)
def test_equal_results_are_not_distinguishable(rows: Rows) -> None:
    found = compare(rows, rows, replicates=50)
    for difference in (*found.per_image, *found.per_prompt):
        assert (difference.interval.low, difference.interval.value, difference.interval.high) == (0, 0, 0)
        assert (difference.verdict, difference.differing) == ("not distinguishable", 0)
    assert found.only_first == found.only_second == 0


@settings(max_examples=60, deadline=None)
@given(results, results)
def test_intervals_hold_the_difference_and_turn_with_the_models(first: Rows, second: Rows) -> None:
    if not set(prompts(first)) & set(prompts(second)):
        with pytest.raises(ValueError, match="A and B have no prompt in common"):
            compare(first, second, ("A", "B"))
        return
    there, back = compare(first, second, replicates=50), compare(second, first, replicates=50)
    assert there.images == back.images[::-1]
    for forth, reverse in zip((*there.per_image, *there.per_prompt), (*back.per_image, *back.per_prompt), strict=True):
        interval = forth.interval
        assert -1 <= interval.low <= interval.value <= interval.high <= 1
        assert interval.value == pytest.approx(forth.second - forth.first)
        assert reverse.interval.value == pytest.approx(-interval.value)
        turned = {"higher": "lower", "lower": "higher"}
        # The order of the prompts is that of the first results, so the two draw different samples.
        if prompts(first) == prompts(second):
            assert reverse.interval.low == pytest.approx(-interval.high)
            assert reverse.verdict == turned.get(forth.verdict, forth.verdict)


def test_scores_are_those_of_the_summaries() -> None:
    rng = np.random.default_rng(1)
    first, second = (
        [row for tag in TAGS for row in rows_of(tag, {str(n): (rng.random(4) < 0.5).tolist() for n in range(10)})]
        for _ in range(2)
    )
    found, ours, theirs = compare(first, second), summarize(first), summarize(second)
    assert [d.tag for d in found.per_image] == [*TAGS, "overall"]
    assert found.same_images
    for image, prompt in zip(found.per_image, found.per_prompt, strict=True):
        assert image.first == pytest.approx(ours[image.tag].per_image.value)
        assert image.second == pytest.approx(theirs[image.tag].per_image.value)
        assert prompt.first == pytest.approx(ours[prompt.tag].per_prompt.value)
        assert prompt.second == pytest.approx(theirs[prompt.tag].per_prompt.value)


def test_pairing_tells_apart_what_single_intervals_do_not() -> None:
    """Prompts of very different difficulty, and a second model that gets one more picture of every fourth right."""
    right = [n % 4 for n in range(60)]
    first = rows_of("colors", {str(n): [k < r for k in range(4)] for n, r in enumerate(right)})
    second = rows_of("colors", {str(n): [k < r + (n % 4 == 0) for k in range(4)] for n, r in enumerate(right)})
    one, other = summarize(first).overall.per_image, summarize(second).overall.per_image
    assert one.high > other.low
    assert compare(first, second).per_image[-1].verdict == "higher"
    assert compare(second, first).per_image[-1].verdict == "lower"


@pytest.mark.parametrize(("differing", "verdict"), [(5, "too few prompts differ"), (6, "higher")])
def test_a_handful_of_prompts_proves_nothing(differing: int, verdict: str) -> None:
    first = rows_of("colors", {str(n): [False] for n in range(20)})
    second = rows_of("colors", {str(n): [n < differing] for n in range(20)})
    difference = compare(first, second).per_image[0]
    assert difference.interval.low > 0
    assert (difference.differing, difference.verdict) == (differing, verdict)


def test_fewer_pictures_of_a_prompt_are_no_disadvantage() -> None:
    first = rows_of("colors", {"a": [True, False, False, False], "b": [True] * 4})
    second = rows_of("colors", {"a": [False], "b": [True]})
    found = compare(first, second)
    assert found.images == ((4, 4), (1, 1))
    assert not found.same_images
    assert found.per_prompt[0].first == pytest.approx((1 / 4 + 1) / 2)


def test_the_chance_of_a_right_one_is_that_over_all_draws() -> None:
    for images in range(1, 6):
        for right in range(images + 1):
            for drawn in range(1, images + 1):
                draws = list(combinations([True] * right + [False] * (images - right), drawn))
                assert any_right(right, images, drawn) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_the_same_results_give_the_same_comparison() -> None:
    first = rows_of("colors", {str(n): [n % 3 == 0, n % 2 == 0] for n in range(30)})
    second = rows_of("colors", {str(n): [n % 5 == 0, n % 2 == 0] for n in range(30)})
    assert compare(first, second) == compare(first, second)
    assert compare(first, second) != compare(first, second, seed=1)
