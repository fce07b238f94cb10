"""Intervals: agreement with scipy, ends that are no points, and how often they hold the truth."""

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray

from eval.geneval.intervals import (
    Interval,
    bootstrap_means,
    mean_interval,
    share_interval,
    share_replicates,
    wilson_interval,
)

IMAGES = 4


def test_interval_reads_well() -> None:
    assert str(Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


@pytest.mark.parametrize(("right", "total"), [(0, 8), (8, 8), (1, 3), (37, 128), (128, 128), (1, 1)])
def test_wilsons_interval_agrees_with_scipy(right: int, total: int) -> None:
    ours = wilson_interval(right, total)
    theirs = scipy.stats.binomtest(right, total).proportion_ci(0.95, method="wilson")
    assert ours.value == right / total
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_a_bootstrap_of_means_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(5)
    chance = 0.7
    hits = 0
    for _ in range(200):
        right = rng.binomial(1, chance, size=80).astype(float)
        low, high = np.quantile(bootstrap_means(right, np.ones(80), rng, replicates=500), [0.025, 0.975])
        hits += low <= chance <= high
    assert 0.88 <= hits / 200 <= 0.99


@pytest.mark.parametrize(("right", "prompts"), [(0, 80), (80, 80), (1, 12), (37, 100), (1, 1)])
def test_of_prompts_that_are_right_or_wrong_as_a_whole_it_is_jeffreys(right: int, prompts: int) -> None:
    right_P = np.array([float(IMAGES)] * right + [0.0] * (prompts - right))
    replicates_R = share_replicates(right_P, np.full(prompts, float(IMAGES)), np.random.default_rng(0), 100_000)
    exact = scipy.stats.beta(right + 0.5, prompts - right + 0.5)
    assert np.quantile(replicates_R, [0.025, 0.5, 0.975]) == pytest.approx(exact.ppf([0.025, 0.5, 0.975]), abs=6e-3)


def test_prompts_weigh_by_their_pictures_and_kinds_of_prompts_are_only_a_short_cut() -> None:
    """Against the definition written out, with a weight for each prompt."""
    rng = np.random.default_rng(2)
    images_P = rng.integers(1, 6, size=30).astype(float)
    right_P = np.floor(images_P * rng.random(30))
    found_R = share_replicates(right_P, images_P, rng, 40_000)
    weights_RP, prior_R2 = rng.exponential(size=(40_000, 30)), rng.gamma(0.5, size=(40_000, 2)) * images_P.mean()
    slow_R = (weights_RP @ right_P + prior_R2[:, 0]) / (weights_RP @ images_P + prior_R2.sum(1))
    places = [0.025, 0.3, 0.7, 0.975]
    assert np.quantile(found_R, places) == pytest.approx(np.quantile(slow_R, places), abs=6e-3)


def pictures(share: float, clustering: float, prompts: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Right pictures of each prompt, whose chances are Beta distributed with a + b = `clustering`."""
    return rng.binomial(IMAGES, rng.beta(share * clustering, (1 - share) * clustering, size=prompts))


@pytest.mark.parametrize("prompts", [10, 80])
@pytest.mark.parametrize("share", [0.05, 0.5, 0.98])
def test_intervals_hold_the_truth_near_the_ends_too(share: float, prompts: int) -> None:
    """Between-prompt spreads from nearly whole prompts to nearly independent pictures; a plain bootstrap has 0.2 to 0.8."""
    rng = np.random.default_rng(0)
    images_P = np.full(prompts, float(IMAGES))
    hits, widths, plain = [], [], []
    for clustering in (1, 2, 8):
        for _ in range(250):
            right_P = pictures(share, clustering, prompts, rng).astype(float)
            value = right_P.mean() / IMAGES
            interval = share_interval(value, share_replicates(right_P, images_P, rng, 400))
            assert 0 <= interval.low <= value <= interval.high <= 1
            hits.append(interval.low <= share <= interval.high)
            widths.append(interval.high - interval.low)
            plain.append(2 * 1.96 * (right_P / IMAGES).std() / prompts**0.5)
    assert np.mean(hits) >= 0.92
    if share == 0.5:
        assert np.mean(widths) < 1.1 * np.mean(plain)  # and in the middle it costs nothing


@pytest.mark.parametrize("shares", [[0.98] * 6, [0.05] * 6, [1.0, 0.8, 0.6, 0.95, 0.3, 0.02]])
def test_the_mean_of_tasks_holds_the_truth(shares: list[float]) -> None:
    rng = np.random.default_rng(1)
    prompts = 20
    images_P, hits = np.full(prompts, float(IMAGES)), []
    for trial in range(250):
        tasks = [pictures(min(share, 1 - 1e-9), (1, 2, 8)[trial % 3], prompts, rng).astype(float) for share in shares]
        values = [float(right_P.mean() / IMAGES) for right_P in tasks]
        interval = mean_interval(values, [share_replicates(right_P, images_P, rng, 300) for right_P in tasks])
        assert 0 <= interval.low <= interval.value <= interval.high <= 1
        hits.append(interval.low <= np.mean(shares) <= interval.high)
    assert np.mean(hits) >= 0.92


def test_one_task_is_its_own_mean() -> None:
    replicates_R = share_replicates(np.array([4.0, 4.0]), np.array([4.0, 4.0]), np.random.default_rng(0), 500)
    assert mean_interval([1.0], [replicates_R]) == share_interval(1.0, replicates_R)
    assert mean_interval([1.0, 1.0], [replicates_R, replicates_R]).high == 1.0
