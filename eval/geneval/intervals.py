"""Intervals of scores: bootstraps over prompts, and Wilson's of independent answers.

The images of one prompt are not independent, so the prompt is the unit that is resampled.

A bootstrap that draws prompts with replacement knows only of what was seen: of 80 prompts that are all right it makes
[1, 1], and of a true score of 0.98 its intervals miss in one case of six. Shares therefore have a Bayesian bootstrap
(Rubin 1981: prompts get random weights, exponentially distributed) with half a prompt that is all right and half a
prompt that is all wrong beside those that were seen. Where a prompt is right or wrong as a whole, that is exactly the
interval of Jeffreys, one of those that Brown, Cai & DasGupta (2001) recommend for a proportion.

Legend of name suffixes: R bootstrap replicates, P prompts, G groups of prompts that are alike.

Sources: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile intervals); Rubin 1981, The
Bayesian Bootstrap; Brown, Cai & DasGupta 2001, Interval Estimation for a Binomial Proportion.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "LEVEL",
    "REPLICATES",
    "Interval",
    "bootstrap_means",
    "mean_interval",
    "percentiles",
    "prompt_draws",
    "share_interval",
    "share_replicates",
    "wilson_interval",
]

LEVEL = 0.95
REPLICATES = 10_000
PRIOR = 0.5
"""Prompts that are all right, and as many that are all wrong, added to those that were seen: Jeffreys's."""


@dataclass(frozen=True)
class Interval:
    """An estimate (a score in 0..1, or a difference of two) and the ends of its 95% interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def prompt_draws(prompts: int, rng: np.random.Generator, replicates: int = REPLICATES) -> NDArray[np.int64]:
    """How often each bootstrap sample holds each prompt, int64 [R, P]; every row sums to P."""
    return rng.multinomial(prompts, np.full(prompts, 1.0 / prompts), size=replicates)


def bootstrap_means(
    totals_P: NDArray[np.float64],
    weights_P: NDArray[np.float64],
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> NDArray[np.float64]:
    """Means of `replicates` bootstrap samples of the prompts, float64 [R]: of values that have no bounds near.

    A prompt contributes `totals_P` to the sum and `weights_P` to what it is divided by.
    """
    counts_RP = prompt_draws(len(totals_P), rng, replicates)
    return np.asarray((counts_RP @ totals_P) / (counts_RP @ weights_P), dtype=np.float64)


def share_replicates(
    right_P: NDArray[np.float64],
    images_P: NDArray[np.float64],
    rng: np.random.Generator,
    replicates: int = REPLICATES,
) -> NDArray[np.float64]:
    """The share of right pictures in `replicates` samples of the Bayesian bootstrap, float64 [R], each within 0..1.

    A prompt contributes `right_P` right pictures out of `images_P`; see the module's description.
    """
    # Weights of prompts that are alike only ever appear as their sum, which is gamma distributed.
    kinds_2G, count_G = np.unique(np.stack([right_P, images_P]), axis=1, return_counts=True)
    weights_RG = rng.standard_gamma(count_G, size=(replicates, len(count_G)))
    prior_R2 = rng.standard_gamma(PRIOR, size=(replicates, 2)) * images_P.mean()
    right_R = weights_RG @ kinds_2G[0] + prior_R2[:, 0]
    return np.asarray(right_R / (weights_RG @ kinds_2G[1] + prior_R2.sum(axis=1)), dtype=np.float64)


def percentiles(value: float, replicates_R: NDArray[np.float64]) -> Interval:
    """The percentile interval of a bootstrap."""
    low, high = np.quantile(replicates_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(float(value), float(low), float(high))


def share_interval(value: float, replicates_R: NDArray[np.float64]) -> Interval:
    """The interval of `share_replicates`; it holds the score, which at 0 and 1 no replicate reaches."""
    raw = percentiles(value, replicates_R)
    return Interval(raw.value, min(raw.low, raw.value), max(raw.high, raw.value))


def mean_interval(values: Sequence[float], replicates: Sequence[NDArray[np.float64]]) -> Interval:
    """The mean of several tasks' scores, with an interval from their `share_replicates`.

    Replicates of a share lie a little nearer to one half than the share does. In a mean of tasks that adds up, while
    chance does not, so the replicates are moved back onto the score.
    """
    value = float(np.mean(values))
    if len(values) == 1:
        return share_interval(value, replicates[0])
    means_R = np.mean(replicates, axis=0)
    raw = percentiles(value, means_R + (value - means_R.mean()))
    # Clipped to what a score can be; rounding may put an end a hair beyond the score.
    return Interval(value, max(0.0, min(raw.low, value)), min(1.0, max(raw.high, value)))


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
