"""Metrics against closed forms, and against the libraries whose definitions they follow."""

from __future__ import annotations

import numpy as np
import pytest
from prdc import compute_prdc
from sklearn.metrics.pairwise import euclidean_distances

from busigen.evaluation.fidelity.measures import (
    CLIP,
    MEASURES,
    NEAREST_DENSITY,
    NEAREST_PRECISION,
    comparison,
    frechet_bias,
    frechet_distance,
    mmd2,
    neighbourhoods,
    polynomial_kernel,
    simulated_frechet_bias,
    standardised,
)
from busigen.evaluation.statistics.grouped import disjoint_draws, draws, matched_size, permutations


def _exactly(rng: np.random.Generator, count: int, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """A sample whose estimated mean and covariance are exactly these."""
    generated = rng.normal(size=(count, len(mean)))
    generated -= generated.mean(axis=0)
    whitened = generated @ np.linalg.inv(np.linalg.cholesky(np.cov(generated, rowvar=False))).T
    return whitened @ root.T + mean


def test_frechet_distance_of_gaussians_with_known_moments() -> None:
    rng = np.random.default_rng(0)
    mean = rng.normal(size=5)
    axes = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    first, second = rng.uniform(0.5, 3, (2, 5))
    a = _exactly(rng, 60, np.zeros(5), axes * first)
    b = _exactly(rng, 40, mean, axes * second)
    # Covariances that commute: the distance is that of means and of standard deviations, axis by axis.
    expected = np.sum(mean**2) + np.sum((first - second) ** 2)
    # Both samples have these moments to rounding.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_bias_in_closed_form_is_what_simulation_finds() -> None:
    rng = np.random.default_rng(2)
    variances = np.linspace(0.2, 2, 12)
    found = [simulated_frechet_bias(variances, 400, rng) for _ in range(60)]
    # The next order is D/N = 3 % of it, the mean of 60 draws has a standard error of about 2 %.
    assert np.mean(found) == pytest.approx(frechet_bias(variances, 400, 400), rel=0.09)
    # One over N: half the images, twice the bias.
    assert frechet_bias(variances, 200, 200) == pytest.approx(2 * frechet_bias(variances, 400, 400))


def test_mmd_with_a_linear_kernel_is_the_squared_shift_of_means() -> None:
    rng = np.random.default_rng(3)
    shift = np.array([0.5, -1.0, 0.0])
    a, b = rng.normal(size=(2000, 3)), rng.normal(size=(1500, 3)) + shift
    both = np.concatenate([a, b])
    rows = np.arange(2000), np.arange(2000, 3500)
    # Standard error of |shift + noise|^2: 2 |shift| sqrt(1/n + 1/m) = 0.076; four of those.
    assert mmd2(both @ both.T, *rows) == pytest.approx(float(shift @ shift), abs=0.31)


def test_mmd_is_unbiased_and_sees_a_shift() -> None:
    rng = np.random.default_rng(4)
    rows = np.arange(40), np.arange(40, 100)
    same = [mmd2(polynomial_kernel(rng.normal(size=(100, 8))), *rows) for _ in range(200)]
    # Four standard errors of the mean; a biased estimate would lie far outside.
    assert abs(np.mean(same)) < 4 * np.std(same) / np.sqrt(len(same))
    assert min(same) < 0
    shifted = rng.normal(size=(100, 8))
    shifted[40:] += 1.0
    assert mmd2(polynomial_kernel(shifted), *rows) > max(same)


def test_neighbourhoods_are_those_of_prdc() -> None:
    rng = np.random.default_rng(6)
    real, synthetic = rng.normal(size=(120, 4)), rng.normal(0.5, 1.2, size=(80, 4))
    found = neighbourhoods(euclidean_distances(np.concatenate([synthetic, real])), np.arange(80), np.arange(80, 200))
    precision, density = (
        compute_prdc(real, synthetic, NEAREST_PRECISION),
        compute_prdc(real, synthetic, NEAREST_DENSITY),
    )
    expected = (precision["precision"], precision["recall"], density["density"], density["coverage"])
    # Counts of the same comparisons.
    assert found == pytest.approx(expected, abs=1e-12)


def test_identical_sets_have_precision_and_recall_1_and_disjoint_ones_0() -> None:
    rng = np.random.default_rng(7)
    real = rng.normal(size=(60, 5))
    rows = np.arange(60), np.arange(60, 120)
    precision, recall, density, coverage = neighbourhoods(euclidean_distances(np.concatenate([real, real])), *rows)
    assert (precision, recall, coverage) == (1, 1, 1)
    # Every image lies in its own neighbourhood and on average in k others, the last of which is the one on the rim,
    # where rounding decides.
    assert 1 <= density <= (NEAREST_DENSITY + 1) / NEAREST_DENSITY
    assert neighbourhoods(euclidean_distances(np.concatenate([real + 100, real])), *rows) == (0, 0, 0, 0)


def test_standardising_ignores_far_outliers_and_constant_columns() -> None:
    rng = np.random.default_rng(8)
    real = np.column_stack([rng.normal(10, 2, 4000), np.full(4000, 3.0), rng.normal(-1, 0.1, 4000)])
    real[:5, 0] = 1e6
    (standard,) = standardised(real)
    assert standard.shape == (4000, 2)
    # Four standard errors of a median and of an interquartile range at 4,000 rows are below 0.1.
    assert np.median(standard, axis=0) == pytest.approx([0, 0], abs=0.1)
    assert standard[5:].std(axis=0) == pytest.approx([1, 1], abs=0.1)
    assert np.abs(standard).max() == CLIP


def test_draws_keep_patients_together_and_sizes_equal() -> None:
    rng = np.random.default_rng(9)
    first, second = np.repeat(np.arange(30), 2), np.arange(45)
    size = matched_size(first, second)
    assert size == 22
    assert all(len(set(a.tolist())) == len(set(b.tolist())) == size for a, b in draws(first, second, size, rng, 20))
    for a, b in disjoint_draws(first, size, rng, 20):
        assert not set(first[a]) & set(first[b])
        assert len(a) == len(b) == size
    for a, b in permutations(first, second, rng, 20):
        assert sorted([*a, *b]) == list(range(105))
        # The cut falls between groups, and the largest group has two rows.
        assert 0 <= len(a) - len(first) <= 1
        assert not {row // 2 for row in a if row < 60} & {row // 2 for row in b if row < 60}


def test_a_narrow_set_loses_recall_and_coverage_but_no_precision() -> None:
    rng = np.random.default_rng(10)
    rows = np.concatenate([0.2 * rng.normal(size=(100, 3)), rng.normal(size=(100, 3))])
    found = dict(
        zip([name for name, *_ in MEASURES], comparison(rows)(np.arange(100), np.arange(100, 200)), strict=True)
    )
    assert found["precision"] > 0.95
    # A fifth of the spread along three axes holds about 1 % of the real set.
    assert found["recall"] < 0.2
    assert found["coverage"] < 0.5
