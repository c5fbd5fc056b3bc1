"""Two sets compared feature by feature: distances, their intervals, floors and p-values.

Every draw (bootstrap, permutation, halving) is a weight per image and serves all features and classes: features are
sorted once, and a draw costs two cumulative sums over the sorted weights.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from busigen.evaluation.statistics.grouped import RESAMPLES

Floats = NDArray[np.float64]
Draw = NDArray[np.generic]  # One weight per row of the joint set; two of them make two sides.

ALL = "all"  # The scope of all classes together
PERMUTATIONS = 400  # Exchanges of groups between the sets; `tail_p` fits smaller p-values to them
FLOOR_HALVINGS = 100  # Halvings of the real set. They are cheap here, and a 97.5 % point of 20 would be their greatest
SMALLEST_P = 1e-6  # No p-value is given below this: that far out, a fitted tail is a guess


@dataclass(frozen=True)
class Sample:
    """One side of a comparison: ``float64 (N, D)`` values, NaN where undefined, N class names, N group numbers."""

    values: Floats
    classes: NDArray[np.str_]
    groups: NDArray[np.int64]


@dataclass(frozen=True)
class Distances:
    """A distance for every scope and feature; arrays are ``float64 (S, D)``, NaN where undefined.

    ``value`` lies between the two sets, with its 95 % bootstrap interval; ``floor`` is the median of group-disjoint
    halves of the real set, with their 2.5 and 97.5 % points; ``p`` is of "both sets are one", not adjusted. Where more
    than half of the draws hold no image with the feature, what is taken from them is NaN.
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
    """What two sets differ in."""

    scopes: tuple[str, ...]  # Names of the S scopes: each class that both sets have, and `ALL`
    ks: Distances  # Kolmogorov-Smirnov distance, 0 to 1
    wasserstein: Distances  # First Wasserstein distance in units of the real scope's standard deviation
    swap: Distances  # How far classes are exchanged, ``(1, 1)``: see `_Joint.swap`. NaN unless there are two classes
    shift: Floats  # ``(S, D)``, probability that a synthetic value exceeds a real one, minus 0.5 (Mann-Whitney)
    synthetic: NDArray[np.int64]  # ``(S, D)``, synthetic images with a value
    real: NDArray[np.int64]  # The same
    reweighted: bool  # Class shares differ by more than 5 %, and `ALL` makes up for it


def compare(real: Sample, synthetic: Sample, rng: np.random.Generator) -> Comparison:
    """Compare all features of two sets, per class and with the classes together.

    In the scope `ALL`, each class counts with its share of the *real* set on both sides, so that another mix of classes
    alone is no difference. Groups stay together in every draw, and permutations exchange groups within classes. Where
    the sets share no class, classes are ignored. Floors and p-values are NaN where too few groups have a value.
    """
    joint = _Joint(real, synthetic)
    mine, theirs = joint.mine, ~joint.mine
    whole = joint.statistics(mine, theirs)
    boots = [joint.statistics(*joint.bootstrap(rng)) for _ in range(RESAMPLES)]
    nulls = [joint.statistics(*joint.permutation(rng)) for _ in range(PERMUTATIONS)]
    floors = [joint.statistics(*joint.halving(rng)) for _ in range(FLOOR_HALVINGS)]
    ks, wasserstein, swap = (
        _summary(*(np.asarray(part) for part in parts))
        for parts in zip(whole, *(zip(*draws, strict=True) for draws in (boots, nulls, floors)), strict=True)
    )
    scopes = joint.scopes.values()
    known = ~np.isnan(joint.values)
    counts = [np.stack([(known & (side & one.rows)[:, None]).sum(axis=0) for one in scopes]) for side in (mine, theirs)]
    shift = np.stack([one.shift(mine, theirs) for one in scopes])
    return Comparison(tuple(joint.scopes), ks, wasserstein, swap, shift, counts[0], counts[1], joint.reweighted)


class _Scope:
    """The images of some classes, each feature sorted once."""

    def __init__(self, values: Floats, rows: NDArray[np.bool_], codes: NDArray[np.int64], shares: Floats) -> None:
        self.rows = rows
        values = values[rows]
        self._order = np.argsort(values, axis=0)
        sorted_values = np.take_along_axis(values, self._order, axis=0)
        self._known = ~np.isnan(sorted_values)
        self._gaps = np.nan_to_num(np.diff(sorted_values, axis=0))
        # Inside a run of equal values the two cumulative sums are out of step.
        self._last = np.ones(values.shape, dtype=np.bool_)
        self._last[:-1] = (self._gaps > 0) | ~self._known[1:]
        self._codes = codes[rows]
        self._shares = shares

    def _steps(self, draw: Draw) -> Floats:
        """Cumulative distribution of each feature at the sorted values, ``(n, D)``, classes weighed by their shares."""
        weight = draw[self.rows].astype(np.float64)
        totals = np.bincount(self._codes, weight, minlength=len(self._shares))
        with np.errstate(divide="ignore", invalid="ignore"):
            weight *= np.where(totals > 0, self._shares / totals, 0.0)[self._codes]
            sums = np.cumsum(weight[self._order] * self._known, axis=0)
            return np.asarray(sums / sums[-1])

    def distances(self, first: Draw, second: Draw) -> tuple[Floats, Floats]:
        """Kolmogorov-Smirnov and first Wasserstein distance of each feature, ``(D,)`` both, the latter in its unit."""
        apart = np.abs(self._steps(first) - self._steps(second))
        return (apart * self._last).max(axis=0), (apart[:-1] * self._gaps).sum(axis=0)

    def shift(self, first: Draw, second: Draw) -> Floats:
        """Mann-Whitney's probability minus 0.5, ties by half, from the two cumulative distributions."""
        mine, theirs = self._steps(first), self._steps(second)
        below = np.zeros_like(mine)
        # The distribution at the last of a run of ties holds for the whole run.
        for k in range(mine.shape[1]):
            ends = np.flatnonzero(self._last[:, k])
            step = np.diff(mine[ends, k], prepend=0.0)
            before = np.concatenate([[0.0], theirs[ends[:-1], k]])
            below[ends, k] = step * (before + theirs[ends, k]) / 2
        return np.asarray(below.sum(axis=0) - 0.5)


class _Joint:
    """The joint set, and how draws weigh its rows, of which ``mine`` marks synthetic ones.

    A unit is what draws take or leave: the images of one side, class and group.
    """

    def __init__(self, real: Sample, synthetic: Sample) -> None:
        shared = sorted(set(real.classes.tolist()) & set(synthetic.classes.tolist()))
        keep = [np.isin(side.classes, shared) | (not shared) for side in (synthetic, real)]
        mine, theirs = (side.values[kept] for side, kept in zip((synthetic, real), keep, strict=True))
        self.values = np.concatenate([mine, theirs])
        self.mine = np.arange(len(self.values)) < len(mine)
        labels = np.concatenate([synthetic.classes[keep[0]], real.classes[keep[1]]])
        self._codes = np.searchsorted(shared, labels) if shared else np.zeros(len(labels), np.int64)
        kinds = max(len(shared), 1)
        real_share, my_share = (
            np.bincount(self._codes[side], minlength=kinds) / max(side.sum(), 1) for side in (~self.mine, self.mine)
        )
        self.reweighted = bool(np.abs(real_share - my_share).max() > 0.05)
        self.scopes = {
            name: _Scope(self.values, self._codes == code, self._codes, np.eye(kinds)[code])
            for code, name in enumerate(shared if len(shared) > 1 else [])
        }
        everyone = np.ones(len(self.values), np.bool_)
        self.scopes[shared[0] if len(shared) == 1 else ALL] = _Scope(self.values, everyone, self._codes, real_share)
        with _undefined_allowed():
            scales = [np.nanstd(self.values[scope.rows & ~self.mine], axis=0) for scope in self.scopes.values()]
        self._scales = np.where(np.stack(scales) > 0, scales, np.nan)
        groups = np.concatenate([synthetic.groups[keep[0]], real.groups[keep[1]]])
        units, self._unit = np.unique(np.stack([self.mine, self._codes, groups], axis=1), axis=0, return_inverse=True)
        self._unit = self._unit.ravel()
        self._unit_mine, self._unit_code = units[:, 0], units[:, 1]
        self._unit_sizes = np.bincount(self._unit)
        ranks = stats.rankdata(self.values, axis=0, nan_policy="omit") / max(len(self.values), 1)
        self._ranked = (~np.isnan(ranks)).astype(np.float64)
        self._ranks = np.nan_to_num(ranks)
        # Always that of the whole real set: where classes are exchanged, permuted sides have no axis of their own.
        places = self._class_means(~self.mine)
        self._axis = np.nan_to_num(places[1] - places[0])

    def statistics(self, first: Draw, second: Draw) -> tuple[Floats, Floats, Floats]:
        """KS and scaled Wasserstein distances ``(S, D)`` and the swap ``(1, 1)`` of two weightings of the rows."""
        pairs = [scope.distances(first, second) for scope in self.scopes.values()]
        ks, wasserstein = (np.stack(part) for part in zip(*pairs, strict=True))
        return ks, wasserstein / self._scales, np.full((1, 1), self.swap(first, second))

    def bootstrap(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Whole groups with replacement, class by class and side by side."""
        counts = np.zeros(len(self._unit_sizes))
        for units in self._strata(self._unit_code * 2 + self._unit_mine):
            counts[units] = np.bincount(rng.integers(0, len(units), len(units)), minlength=len(units))
        weight = counts[self._unit]
        return weight * self.mine, weight * ~self.mine

    def permutation(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Groups exchanged between the sides within each class, sizes kept to within a group."""
        first = np.zeros(len(self._unit_sizes))
        for units in self._strata(self._unit_code):
            target = self._unit_sizes[units][self._unit_mine[units] == 1].sum()
            first[self._cut(units, target, rng)] = 1.0
        return first[self._unit], 1.0 - first[self._unit]

    def halving(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Two group-disjoint halves of the real rows, each class halved."""
        sides = np.zeros((2, len(self._unit_sizes)))
        sides[1] = self._unit_mine == 0
        for units in self._strata(np.where(self._unit_mine == 0, self._unit_code, -1)):
            chosen = self._cut(units, self._unit_sizes[units].sum() / 2, rng)
            sides[:, chosen] = [[1.0], [0.0]]
        return sides[0][self._unit], sides[1][self._unit]

    def _strata(self, keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Units by key, those of a negative one left out."""
        return [np.flatnonzero(keys == key) for key in np.unique(keys[keys >= 0])]

    def _cut(self, units: NDArray[np.int64], target: float, rng: np.random.Generator) -> NDArray[np.int64]:
        shuffled = rng.permutation(units)
        sizes = self._unit_sizes[shuffled]
        return np.asarray(shuffled[np.cumsum(sizes) - sizes / 2 < target])

    def swap(self, first: Draw, second: Draw) -> float:
        """How far the first side's classes lie on the way to each other's place, by mean ranks over all features.

        0 where each class of the first side lies where the second side's does, 1 where each has gone the whole way
        along the axis between the real classes, below 0 where they lie further apart.
        """
        if self._codes.max(initial=0) != 1:
            return float("nan")
        mine, theirs = self._class_means(first), self._class_means(second)
        ways = np.nan_to_num(mine - theirs) @ self._axis / max(float(self._axis @ self._axis), 1e-12)
        return float((ways[0] - ways[1]) / 2)

    def _class_means(self, draw: Draw) -> Floats:
        """Mean ranks of the first two classes, ``(2, D)``."""
        weights = np.stack([draw * (self._codes == code) for code in (0, 1)]).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((weights @ self._ranks) / (weights @ self._ranked))


def tail_p(observed: Floats, null: Floats) -> Floats:
    """P-values of observations ``(...)`` from permutations ``(P, ...)``; greater speaks against the null hypothesis.

    From ten exceedances on it is their share. Below, it is that of a gamma distribution with the permutations' first
    three moments (Winkler et al. 2016, NeuroImage 141, section 2.2.4), and at least ``SMALLEST_P``.
    """
    null = _mostly_known(null)
    draws = (~np.isnan(null)).sum(axis=0)
    beyond = (null >= observed).sum(axis=0)
    counted = (beyond + 1.0) / (draws + 1.0)
    with np.errstate(divide="ignore", invalid="ignore"), _undefined_allowed():
        centre, spread = np.nanmean(null, axis=0), np.nanstd(null, axis=0)
        skew = np.maximum(np.nanmean((null - centre) ** 3, axis=0) / spread**3, 0.05)
        fitted = stats.pearson3.sf((observed - centre) / spread, skew)
    p = np.where(beyond >= 10, counted, np.minimum(fitted, 11.0 / (draws + 1.0)))
    return np.where(np.isnan(observed) | ~(spread > 0), np.nan, np.maximum(p, SMALLEST_P))


def _summary(value: Floats, boots: Floats, nulls: Floats, floors: Floats) -> Distances:
    with _undefined_allowed():
        (low, middle, high), (floor_low, floor, floor_high) = (
            np.nanpercentile(_mostly_known(draws), [2.5, 50.0, 97.5], axis=0) for draws in (boots, floors)
        )
    # Repeated images make samples rougher, so that the draws' distances are too great: the interval is moved back.
    bias = middle - value
    # A distance is not negative, whatever the correction says; the swap may be.
    least = np.where((floors < 0).any(axis=0), -np.inf, 0.0)
    low, high = np.minimum(np.maximum(low - bias, least), value), high - bias
    return Distances(value, low, high, floor, floor_low, floor_high, tail_p(value, nulls))


def _mostly_known(draws: Floats) -> Floats:
    """The draws, all NaN where more than half of them are: the rest would be a chosen few."""
    return np.where(np.isnan(draws).mean(axis=0) > 0.5, np.nan, draws)


def _undefined_allowed() -> warnings.catch_warnings[None]:
    """Quiet: what has no value at all is NaN, as it should be, but numpy warns of it."""
    return warnings.catch_warnings(action="ignore", category=RuntimeWarning)
