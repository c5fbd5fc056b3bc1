"""Group-aware means and distributions against known answers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from busigen.evaluation.statistics.grouped import PERMUTATIONS, Groups, compare_distributions, compare_means


def groups_of(first: int, second: int, size: int = 1, seed: int = 0) -> Groups:
    return Groups(np.arange(first) // size, np.arange(second) // size, np.random.default_rng(seed))


def test_values_are_the_plain_ones() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.integers(0, 40, 90).astype(float), rng.integers(5, 45, 70).astype(float)
    groups = groups_of(90, 70)
    assert compare_means(first, second, groups, "both").value.value == pytest.approx(first.mean())
    # Fewer than 64 distinct values, so that the quantile bins lose nothing.
    known = stats.ks_2samp(first, second).statistic
    assert compare_distributions(first, second, groups).value.value == pytest.approx(known)


def test_a_lone_difference_survives_many_tests_and_no_difference_is_none() -> None:
    rng = np.random.default_rng(1)
    first, second = rng.normal(1, 1, 80), rng.normal(0, 1, 80)
    groups = groups_of(80, 80)
    assert compare_means(first, second, groups, "greater").p == 1 / (PERMUTATIONS + 1)
    assert compare_means(first, second, groups, "less").p > 0.99
    assert compare_distributions(first, second, groups).p == 1 / (PERMUTATIONS + 1)


def test_p_values_are_uniform_where_sets_are_alike() -> None:
    p_values = []
    for seed in range(100):
        rng = np.random.default_rng(seed)
        first, second = rng.normal(size=40), rng.normal(size=40)
        p_values.append(compare_means(first, second, groups_of(40, 40, seed=seed), "both").p)
    # Kolmogorov-Smirnov against uniform: an honest test falls below 0.001 once in a thousand choices of seeds.
    assert stats.kstest(p_values, "uniform").pvalue > 0.001


def test_images_of_one_group_are_one_piece_of_evidence() -> None:
    """Ten groups of eight equal images: by image the difference is certain, by group it may well be chance."""
    rng = np.random.default_rng(3)
    first, second = (np.repeat(rng.normal(shift, 1, 10), 8) for shift in (0.4, 0.0))
    by_image = compare_means(first, second, groups_of(80, 80), "both")
    by_group = compare_means(first, second, groups_of(80, 80, size=8), "both")
    assert by_image.value.value == pytest.approx(by_group.value.value)
    assert by_group.p > 10 * by_image.p
    assert by_group.value.high - by_group.value.low > 2 * (by_image.value.high - by_image.value.low)


def test_missing_values_do_not_count() -> None:
    first, second = np.array([1.0, np.nan, 3.0, np.nan]), np.full(4, np.nan)
    found = compare_means(first, second, groups_of(4, 4), "both")
    assert found.value.value == 2
    assert found.floor is None
    assert np.isnan(found.p)


def test_a_distance_lies_inside_its_own_interval() -> None:
    """Resampling makes distances between like sets larger; an interval that is not moved back leaves its value out."""
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = compare_distributions(rng.normal(size=200), rng.normal(size=200), groups_of(200, 200, seed=seed))
        assert 0 <= found.value.low <= found.value.value <= found.value.high
