"""Many features of two labelled sets compared at once: distances, intervals, floors and group-aware tests."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from busigen.evaluation.comparing.resampling import ALL, Floats, Plan, Sample
from busigen.evaluation.comparing.statistics import RESAMPLES

__all__ = ["ALL", "Comparison", "Distances", "Sample", "compare", "tail_p"]

PERMUTATIONS = 400
"""Exchanges of groups between the sets. Smaller p-values come from a gamma tail fitted to these (see `tail_p`)."""

FLOOR_HALVINGS = 100
"""Halvings of the real set. They are cheap here, and a 97.5 % point of 20 would be their greatest."""

SMALLEST_P = 1e-6
"""No p-value is given below this: that far out, a fitted tail is a guess."""


@dataclass(frozen=True)
class Distances:
    """A distance for every scope and feature; arrays are ``float64 (S, D)``, NaN where undefined.

    Of a feature that few images have, a draw may hold none. Such draws are left out; where they are more than half of
    them, what is taken from the draws is NaN.

    Attributes:
        value: Between the two sets.
        low: Lower end of its 95 % bootstrap interval.
        high: Upper end.
        floor: Median between group-disjoint halves of the real set.
        floor_low: Their 2.5 % point.
        floor_high: Their 97.5 % point.
        p: Of "both sets are one", not adjusted.
    """

    value: Floats
    low: Floats
    high: Floats
    floor: Floats
    floor_low: Floats
    floor_high: Floats
    p: Floats


@dataclass(frozen=True)
class Comparison:
    """What two sets differ in.

    Attributes:
        scopes: Names of the S scopes: each class that both sets have, and `ALL`.
        ks: Kolmogorov-Smirnov distance, 0 to 1.
        wasserstein: First Wasserstein distance in units of the real scope's standard deviation.
        swap: ``(1, 1)``: 0 where classes differ as real ones do, 0.5 where not at all, 1 where exchanged (see
            `resampling.Plan.swap`); NaN unless there are two classes.
        shift: ``(S, D)``, probability that a synthetic value exceeds a real one, minus 0.5 (Mann-Whitney).
        synthetic: ``int (S, D)``, synthetic images with a value.
        real: ``int (S, D)``, real ones.
        reweighted: Class shares differ by more than 5 %, and `ALL` makes up for it.
    """

    scopes: tuple[str, ...]
    ks: Distances
    wasserstein: Distances
    swap: Distances
    shift: Floats
    synthetic: NDArray[np.int64]
    real: NDArray[np.int64]
    reweighted: bool


def compare(real: Sample, synthetic: Sample, rng: np.random.Generator) -> Comparison:
    """Compare all features of two sets, per class and with the classes together.

    In the scope `ALL`, each class counts with its share of the *real* set on both sides, so that another mix of classes
    alone is no difference. Groups stay together in every draw, and permutations exchange groups within classes. Where
    the sets share no class, classes are ignored.

    The bootstrap's distances are greater than the sets' own, because repeated images make samples rougher; the interval
    is moved back by the difference between the draws' median and the value.

    Args:
        real: The reference.
        synthetic: What is judged; as many features.
        rng: Source of all draws.

    Returns:
        The comparison. Floors and p-values are NaN where too few groups have a value to divide them.
    """
    plan = Plan(real, synthetic)
    whole = plan.statistics(plan.mine, ~plan.mine)
    boots = [plan.statistics(*plan.bootstrap(rng)) for _ in range(RESAMPLES)]
    nulls = [plan.statistics(*plan.permutation(rng)) for _ in range(PERMUTATIONS)]
    floors = [plan.statistics(*plan.halving(rng)) for _ in range(FLOOR_HALVINGS)]
    ks, wasserstein, swap = (
        _summary(*(np.asarray(part) for part in parts))
        for parts in zip(whole, *(zip(*draws, strict=True) for draws in (boots, nulls, floors)), strict=True)
    )
    shift = np.stack([scope.shift(plan.mine, ~plan.mine) for scope in plan.scopes.values()])
    counts = [
        np.stack(
            [(~np.isnan(plan.values) & (side & scope.rows)[:, None]).sum(axis=0) for scope in plan.scopes.values()]
        )
        for side in (plan.mine, ~plan.mine)
    ]
    return Comparison(
        scopes=tuple(plan.scopes),
        ks=ks,
        wasserstein=wasserstein,
        swap=swap,
        shift=shift,
        synthetic=counts[0],
        real=counts[1],
        reweighted=plan.reweighted,
    )


def tail_p(observed: Floats, null: Floats) -> Floats:
    """P-values from permutations, with a fitted tail where the observation lies beyond nearly all of them.

    From ten exceedances on it is their share. Below, it is that of a gamma distribution with the permutations' first
    three moments, which needs far fewer of them (Winkler et al. 2016, NeuroImage 141, section 2.2.4).

    Args:
        observed: ``(...)``, greater speaks against the null hypothesis.
        null: ``(P, ...)``, from the permutations; NaN where one is undefined, which leaves it out.

    Returns:
        ``(...)``, at least ``SMALLEST_P``; NaN where most of the null is undefined.
    """
    null = _mostly_known(null)
    draws = (~np.isnan(null)).sum(axis=0)
    beyond = (null >= observed).sum(axis=0)
    counted = (beyond + 1.0) / (draws + 1.0)
    with np.errstate(divide="ignore", invalid="ignore"), warnings.catch_warnings():
        # What has no draw at all is NaN, as it should be, but numpy warns of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        centre, spread = np.nanmean(null, axis=0), np.nanstd(null, axis=0)
        skew = np.maximum(np.nanmean((null - centre) ** 3, axis=0) / spread**3, 0.05)
        fitted = stats.pearson3.sf((observed - centre) / spread, skew)
    p = np.where(beyond >= 10, counted, np.minimum(fitted, 11.0 / (draws + 1.0)))
    return np.where(np.isnan(observed) | ~(spread > 0), np.nan, np.maximum(p, SMALLEST_P))


def _mostly_known(draws: Floats) -> Floats:
    """The draws, all NaN where more than half of them are: the rest would be a chosen few."""
    return np.where(np.isnan(draws).mean(axis=0) > 0.5, np.nan, draws)


def _percentiles(draws: Floats) -> Floats:
    """2.5, 50 and 97.5 % points of the draws that are defined, ``(3, S, D)``."""
    with warnings.catch_warnings():
        # What has no draw at all is NaN, as it should be, but numpy warns of it.
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.asarray(np.nanpercentile(_mostly_known(draws), [2.5, 50.0, 97.5], axis=0))


def _summary(value: Floats, boots: Floats, nulls: Floats, floors: Floats) -> Distances:
    low, middle, high = _percentiles(boots)
    floor_low, floor, floor_high = _percentiles(floors)
    bias = middle - value
    return Distances(
        value=value,
        # A distance is not negative, whatever the correction says; the swap may be.
        low=np.minimum(np.maximum(low - bias, np.where((floors < 0).any(axis=0), -np.inf, 0.0)), value),
        high=high - bias,
        floor=floor,
        floor_low=floor_low,
        floor_high=floor_high,
        p=tail_p(value, nulls),
    )
