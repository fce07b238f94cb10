"""FID against Fréchet distances that are known, KID against the sums written out, and the files of both."""

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from eval.distances import FeatureSet, bias_warning, fid, kid

ABOUT = {"resize": "clean", "inception_sha256": "abc"}


def drawn(number: int, width: int, seed: int, shift: float = 0.0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(number, width)) @ rng.normal(size=(width, width)) + shift).astype(np.float32)


def features(number: int = 30, width: int = 4, seed: int = 0, shift: float = 0.0) -> FeatureSet:
    return FeatureSet.from_features(drawn(number, width, seed, shift), ABOUT)


def gaussian(mu: NDArray[np.float64], sigma: NDArray[np.float64]) -> FeatureSet:
    return FeatureSet(mu, sigma, None, {})


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**31))
def test_fid_of_gaussians_with_the_same_axes(width: int, seed: int) -> None:
    """Then it is the distance of the means and of the standard deviations along each axis."""
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.normal(size=(width, width)))[0]
    stds, mus = rng.uniform(0.1, 3, (2, width)), rng.normal(size=(2, width))
    one, other = (gaussian(mu, axes @ np.diag(std**2) @ axes.T) for mu, std in zip(mus, stds, strict=True))
    expected = ((mus[0] - mus[1]) ** 2).sum() + ((stds[0] - stds[1]) ** 2).sum()
    assert fid(one, other) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_fid_is_the_published_formula() -> None:
    one, other = features(seed=1), features(50, seed=2, shift=0.7)
    for each, number in ((one, 30), (other, 50)):
        assert each.features is not None
        data = each.features.astype(np.float64)
        np.testing.assert_allclose(each.mu, data.mean(0))
        np.testing.assert_allclose(each.sigma, (data - data.mean(0)).T @ (data - data.mean(0)) / (number - 1))
    root = scipy.linalg.sqrtm(one.sigma @ other.sigma)
    expected = ((one.mu - other.mu) ** 2).sum() + np.trace(one.sigma + other.sigma - 2 * np.real(root))
    assert fid(one, other) == pytest.approx(expected)
    assert fid(other, one) == pytest.approx(expected)


@pytest.mark.parametrize(("number", "width"), [(40, 6), (5, 12)])
def test_a_set_is_no_distance_from_itself(number: int, width: int) -> None:
    """Also where there are fewer pictures than features, so that covariances have no inverse."""
    one = features(number, width)
    scale = float(np.trace(one.sigma))
    assert abs(fid(one, one)) < 1e-6 * scale
    assert fid(one, features(number, width, shift=0.5)) == pytest.approx(0.25 * width, abs=1e-5 * scale)


def kernel(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float((sum(x * y for x, y in zip(a, b, strict=True)) / len(a) + 1) ** 3)


def slow_mmd(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The unbiased estimate, pair by pair."""
    m = len(one)
    within = sum(kernel(each[i], each[j]) for each in (one, other) for i in range(m) for j in range(m) if i != j)
    across = sum(kernel(one[i], other[j]) for i in range(m) for j in range(m))
    return within / (m * (m - 1)) - 2 * across / (m * m)


def test_kid_of_whole_sets_is_the_sum_over_pairs() -> None:
    one, other = features(9, 3, seed=3), features(9, 3, seed=4, shift=1.0)
    found = kid(one, other)
    assert one.features is not None
    assert other.features is not None
    expected = slow_mmd(one.features.astype(np.float64), other.features.astype(np.float64))
    assert found.value == pytest.approx(expected)
    assert (found.std, found.subsets, found.subset_size) == (None, 1, 9)


def test_kid_is_a_mean_over_subsets_with_its_deviation() -> None:
    one, other = features(14, 3, seed=3), features(11, 3, seed=4, shift=1.0)
    found = kid(one, other, subsets=5, subset_size=8, seed=7)
    assert one.features is not None
    assert other.features is not None
    rng = np.random.RandomState(7)
    expected = [
        slow_mmd(*(each.features.astype(np.float64)[rng.choice(len(each.features), 8, replace=False)] for each in (one, other)))  # type: ignore[union-attr,arg-type]
        for _ in range(5)
    ]  # fmt: skip
    assert found.value == pytest.approx(np.mean(expected))
    assert found.std == pytest.approx(np.std(expected))
    assert (found.subsets, found.subset_size) == (5, 8)
    assert kid(one, other, subset_size=8, seed=1).value != found.value
    few = kid(one, other)  # no subset is larger than the smaller set
    assert (few.subsets, few.subset_size) == (100, 11)
    assert few.std is not None


def test_kid_has_no_bias_where_fid_has() -> None:
    pairs = [(features(20, 4, 0), features(20, 4, 0, shift=0.0))]
    rng = np.random.default_rng(5)
    kids, fids = [], []
    for _ in range(200):
        pairs = [FeatureSet.from_features(rng.normal(size=(12, 4)).astype(np.float32), ABOUT) for _ in range(2)]
        kids.append(kid(*pairs).value)
        fids.append(fid(*pairs))
    assert abs(np.mean(kids)) < 3 * np.std(kids) / 200**0.5
    assert np.mean(fids) > 3 * np.std(fids) / 200**0.5


def test_files_bring_back_what_was_saved(tmp_path: Path) -> None:
    one, other = features(seed=1), features(seed=2)
    one.save(tmp_path / "one.npz")
    loaded = FeatureSet.load(tmp_path / "one.npz", ABOUT)
    assert fid(loaded, other) == fid(one, other)
    assert kid(loaded, other) == kid(one, other)
    assert loaded.pictures == 30
    assert loaded.about == ABOUT
    with np.load(tmp_path / "one.npz", allow_pickle=False) as file:
        assert json.loads(str(file["about"])) == ABOUT
        assert file["mu"].dtype == file["sigma"].dtype == np.float64


def test_statistics_of_others_are_read(tmp_path: Path) -> None:
    one, other = features(seed=1), features(seed=2)
    # As pytorch-fid and ADM write them, the latter with more beside them; and as clean-fid has features.
    np.savez(tmp_path / "plain.npz", mu=one.mu, sigma=one.sigma)
    np.savez(tmp_path / "adm.npz", mu=one.mu.astype(np.float32), sigma=one.sigma.astype(np.float32), mu_s=np.zeros(3))
    np.savez(tmp_path / "clean.npz", feats=one.features)
    for name in ("plain", "adm"):
        loaded = FeatureSet.load(tmp_path / f"{name}.npz", ABOUT)
        assert loaded.features is loaded.pictures is None
        assert fid(loaded, other) == pytest.approx(fid(one, other), rel=1e-4)
        with pytest.raises(ValueError, match="KID needs features, and there are only mu and sigma"):
            kid(other, loaded)
    assert kid(FeatureSet.load(tmp_path / "clean.npz", ABOUT), other) == kid(one, other)


def test_statistics_of_another_way_are_not_compared(tmp_path: Path) -> None:
    features().save(tmp_path / "one.npz")
    with pytest.raises(ValueError, match=r"made with resize 'clean', and this is 'tensorflow'; make it again"):
        FeatureSet.load(tmp_path / "one.npz", {**ABOUT, "resize": "tensorflow"})
    with pytest.raises(ValueError, match="one set has 4 features and the other 5"):
        fid(features(), features(width=5))
    with pytest.raises(ValueError, match="one set has 4 features and the other 5"):
        kid(features(), features(width=5))


def test_files_that_are_none(tmp_path: Path) -> None:
    mu, sigma = np.zeros(3), np.eye(3)
    (tmp_path / "text.npz").write_text("mu")
    features().save(tmp_path / "cut.npz")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-50])
    np.savez(tmp_path / "half.npz", mu=mu, other=sigma)
    np.savez(tmp_path / "square.npz", mu=mu, sigma=np.eye(4))
    np.savez(tmp_path / "nan.npz", mu=mu * np.nan, sigma=sigma)
    np.savez(tmp_path / "objects.npz", mu=np.array([{}], dtype=object), sigma=sigma)
    np.savez(tmp_path / "flat.npz", features=mu)
    np.savez(tmp_path / "one.npz", features=np.zeros((1, 3), dtype=np.float32))
    for name, message in (
        ("none", "is no readable .npz"),
        ("text", "is no readable .npz"),
        ("cut", "is no readable .npz"),
        ("objects", "is no readable .npz"),
        ("half", "holds mu, other; mu and sigma, or features, are needed"),
        ("square", r"has mu \[3\] and sigma \[4, 4\]"),
        ("nan", r"finite \[D\] and \[D, D\] are needed"),
        ("flat", r"has features of shape \[3\]"),
        ("one", "1 picture has no covariance"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            FeatureSet.load(tmp_path / f"{name}.npz", ABOUT)
        assert "\n" not in str(caught.value)


def test_too_few_pictures() -> None:
    with pytest.raises(ValueError, match="1 picture has no covariance; FID and KID take at least 2"):
        FeatureSet.from_features(np.zeros((1, 3), dtype=np.float32), {})
    assert bias_warning(10_000, 10_000) is None
    assert bias_warning(10_000, None) is None
    assert "FID of 9,999 pictures against 50,000" in (bias_warning(9_999, 50_000) or "")
    assert "FID of 50,000 pictures against 5,000 is too high" in (bias_warning(50_000, 5_000) or "")
    assert "FID of 12 pictures is too high" in (bias_warning(12, None) or "")
