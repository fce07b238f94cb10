"""How far two sets of pictures are apart by their features: FID and KID, by torch-fidelity.

    reference = FeatureSet.from_features(features_ND, about)
    reference.save(Path("reference.npz"))
    fid(FeatureSet.from_features(others_ND, about), FeatureSet.load(Path("reference.npz"), about))

FID compares means and covariances, KID the features themselves, so an `.npz` of statistics alone, the usual format with the
keys `mu` and `sigma` (pytorch-fid, clean-fid, ADM), is enough for FID only. Ours has `features` too, which clean-fid calls
`feats`, and `about`, what they were made with.

Shape suffixes: N pictures, D features.

Sources: Heusel et al. 2017, arXiv 1706.08500 (FID); Bińkowski et al. 2018, arXiv 1801.01401 (KID: the unbiased estimate with
the kernel (x·y/D + 1)³, as mean and standard deviation over random subsets).
"""

import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

from data_pipeline.atomic import replacing

__all__ = ["ENOUGH", "FeatureSet", "Kid", "bias_warning", "fid", "kid"]

ENOUGH = 10_000
"""Pictures of each side below which FID says as much about their number as about them."""
SUBSETS, SUBSET_SIZE = 100, 1000
FEATURES = ("features", "feats")


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What FID and KID need of a set of pictures.

    Attributes:
        mu: Mean of the features, float64 [D].
        sigma: Their covariance, float64 [D, D].
        features: float32 [N, D], or None where only mu and sigma are known.
        about: What the features were made with; empty where nobody knows.
        notes: What else is known of the pictures, such as whether they were cropped; nothing is refused for it.
    """

    mu: NDArray[np.float64]
    sigma: NDArray[np.float64]
    features: NDArray[np.float32] | None
    about: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> int | None:
        """How many, where that is known."""
        return None if self.features is None else len(self.features)

    @classmethod
    def from_features(
        cls, features_ND: NDArray[np.float32], about: Mapping[str, Any], notes: Mapping[str, Any] | None = None
    ) -> Self:
        """Statistics of features, float [N, D]. Raises ValueError for fewer than two pictures."""
        if len(features_ND) < 2:
            raise ValueError(
                f"{len(features_ND)} picture has no covariance; FID and KID take at least 2, and 10,000 to mean much"
            )
        found = fid_features_to_statistics(torch.from_numpy(features_ND.astype(np.float64)))
        return cls(
            found["mu"], np.atleast_2d(found["sigma"]), features_ND.astype(np.float32), dict(about), dict(notes or {})
        )

    def save(self, path: Path) -> None:
        """Write an `.npz`, atomically: mu, sigma, features, and `about` and `notes` as JSON."""
        arrays: dict[str, Any] = {} if self.features is None else {"features": self.features}
        texts = {"about": self.about, "notes": self.notes}
        arrays |= {name: np.array(json.dumps(dict(text))) for name, text in texts.items()}
        with replacing(path) as stream:
            np.savez(stream, mu=self.mu, sigma=self.sigma, **arrays)

    @classmethod
    def load(cls, path: Path, about: Mapping[str, Any]) -> Self:
        """The set in an `.npz`.

        `about` is what features are made with here. Raises ValueError where the file is damaged, has neither mu and sigma nor
        features, or says that it was made with something else.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                found = {
                    name: file[name] for name in ("mu", "sigma", "about", "notes", *FEATURES) if name in file.files
                }
                names = file.files
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{path} is no readable .npz ({error}); give one with mu and sigma, or a folder"
            ) from error
        notes = json.loads(str(found["notes"])) if "notes" in found else {}
        features_ND = next((found[name] for name in FEATURES if name in found), None)
        if "about" in found:
            _check_about(path, json.loads(str(found["about"])), about)
        if features_ND is not None:
            if features_ND.ndim != 2 or not np.isfinite(features_ND).all():
                raise ValueError(
                    f"{path} has features of shape {list(features_ND.shape)}; finite [pictures, features] are needed"
                )
            return cls.from_features(features_ND, about, notes)
        if not {"mu", "sigma"} <= found.keys():
            raise ValueError(f"{path} holds {', '.join(names)}; mu and sigma, or features, are needed")
        mu, sigma = np.asarray(found["mu"], dtype=np.float64), np.asarray(found["sigma"], dtype=np.float64)
        if (
            mu.ndim != 1
            or sigma.shape != (len(mu), len(mu))
            or not (np.isfinite(mu).all() and np.isfinite(sigma).all())
        ):
            raise ValueError(
                f"{path} has mu {list(mu.shape)} and sigma {list(sigma.shape)}; finite [D] and [D, D] are needed"
            )
        return cls(mu, sigma, None, about if "about" in found else {}, notes)


def _check_about(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    for name in {**found, **wanted}:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{path} was made with {name} {found.get(name)!r}, and this is {wanted.get(name)!r}; make it again, or measure "
                "with what it was made with"
            )


@dataclass(frozen=True)
class Kid:
    """KID as the mean over subsets, and its standard deviation, None where there was but one subset."""

    value: float
    std: float | None
    subsets: int
    subset_size: int


def fid(one: FeatureSet, other: FeatureSet) -> float:
    """Fréchet distance of the Gaussians with the means and covariances of two sets. Raises ValueError for other features."""
    _check_width(one, other)
    statistics = [{"mu": each.mu, "sigma": each.sigma} for each in (one, other)]
    return float(fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID])


def kid(
    one: FeatureSet, other: FeatureSet, subsets: int = SUBSETS, subset_size: int = SUBSET_SIZE, seed: int = 0
) -> Kid:
    """Squared maximum mean discrepancy of two sets of features.

    Subsets are drawn from `seed`. A subset is no larger than the smaller set. Where it is both sets whole, there is only one.

    Raises ValueError where a set has no features, or other ones.
    """
    if one.features is None or other.features is None:
        raise ValueError(
            "KID needs features, and there are only mu and sigma; give a folder of pictures, or leave KID out"
        )
    _check_width(one, other)
    size = min(subset_size, len(one.features), len(other.features))
    whole = size == len(one.features) == len(other.features)
    found = kid_features_to_metric(
        *(torch.from_numpy(each.features.astype(np.float64)) for each in (one, other) if each.features is not None),
        kid_subsets=1 if whole else subsets, kid_subset_size=size, rng_seed=seed, verbose=False,
    )  # fmt: skip
    return Kid(
        float(found[KEY_METRIC_KID_MEAN]),
        None if whole else float(found[KEY_METRIC_KID_STD]),
        1 if whole else subsets,
        size,
    )


def _check_width(one: FeatureSet, other: FeatureSet) -> None:
    if len(one.mu) != len(other.mu):
        raise ValueError(
            f"one set has {len(one.mu)} features and the other {len(other.mu)}; both must be of one network"
        )


def bias_warning(pictures: int, reference: int | None) -> str | None:
    """What to know about an FID of so many pictures against so many (None: unknown); nothing where both are enough."""
    few = [count for count in (pictures, reference) if count is not None and count < ENOUGH]
    if not few:
        return None
    against = "" if reference is None else f" against {reference:,}"
    return (
        f"FID of {pictures:,} pictures{against} is too high: its bias grows as their number falls and is large below "
        f"{ENOUGH:,}; compare it only with FIDs of as many pictures, or use KID, which has no such bias"
    )
