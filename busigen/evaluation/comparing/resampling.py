"""Weighing the rows of two sets for bootstrap, permutation and floor, and the distances of such weightings.

Every draw (bootstrap, permutation, halving) is a weight per image and serves all features and classes: features are
sorted once, and a draw costs two cumulative sums over the sorted weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

ALL = "all"
"""The scope of all classes together."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Sample:
    """One side of a comparison.

    Attributes:
        values: ``float64 (N, D)``, NaN where a feature is undefined.
        classes: N class names.
        groups: N group numbers.
    """

    values: Floats
    classes: NDArray[np.str_]
    groups: NDArray[np.int64]


class Scope:
    """The images of some classes, each feature sorted once."""

    def __init__(self, values: Floats, rows: NDArray[np.bool_], codes: NDArray[np.int64], shares: Floats) -> None:
        self.rows = rows
        self._at = np.flatnonzero(rows)
        values = values[rows]
        self._order = np.argsort(values, axis=0)
        sorted_values = np.take_along_axis(values, self._order, axis=0)
        self._known = ~np.isnan(sorted_values)
        self._gaps = np.nan_to_num(np.diff(sorted_values, axis=0))
        # Inside a run of equal values the two cumulative sums are out of step.
        self._last = np.ones(values.shape, dtype=np.bool_)
        self._last[:-1] = self._gaps > 0
        self._last[:-1] |= ~self._known[1:]
        self._codes = codes[rows]
        self._shares = shares

    def scaled(self, values: Floats, real: NDArray[np.bool_]) -> Floats:
        """Standard deviations of the scope's real images, ``(D,)``; NaN where there is none or it is 0."""
        inside = values[self.rows & real]
        known = ~np.isnan(inside)
        count = np.maximum(known.sum(axis=0), 1)
        centred = np.where(known, inside - np.where(known, inside, 0.0).sum(axis=0) / count, 0.0)
        spread = np.sqrt((centred**2).sum(axis=0) / count)
        return np.where(spread > 0, spread, np.nan)

    def _weights(self, draw: NDArray[np.generic]) -> Floats:
        weight = draw[self._at].astype(np.float64)
        totals = np.bincount(self._codes, weight, minlength=len(self._shares))
        with np.errstate(divide="ignore", invalid="ignore"):
            factors = np.where(totals > 0, self._shares / totals, 0.0)
        return np.asarray(weight * factors[self._codes])

    def _steps(self, draw: NDArray[np.generic]) -> Floats:
        """Cumulative distribution of each feature at the sorted values, ``(n, D)``."""
        sums = np.cumsum(self._weights(draw)[self._order] * self._known, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray(sums / sums[-1])

    def distances(self, first: NDArray[np.generic], second: NDArray[np.generic]) -> tuple[Floats, Floats]:
        """Kolmogorov-Smirnov and first Wasserstein distance of each feature, ``(D,)`` both, the latter in its unit."""
        apart = np.abs(self._steps(first) - self._steps(second))
        return (apart * self._last).max(axis=0), (apart[:-1] * self._gaps).sum(axis=0)

    def shift(self, first: NDArray[np.generic], second: NDArray[np.generic]) -> Floats:
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


class Plan:
    """The joint set, and how draws weigh its rows. ``mine`` marks synthetic rows."""

    def __init__(self, real: Sample, synthetic: Sample) -> None:
        shared = sorted(set(real.classes.tolist()) & set(synthetic.classes.tolist()))
        keep = [np.isin(side.classes, shared) | (not shared) for side in (synthetic, real)]
        mine, theirs = (side.values[kept] for side, kept in zip((synthetic, real), keep, strict=True))
        self.values = np.concatenate([mine, theirs])
        self.mine = np.arange(len(self.values)) < len(mine)
        labels = np.concatenate([synthetic.classes[keep[0]], real.classes[keep[1]]]) if shared else None
        self._codes = np.zeros(len(self.values), np.int64) if labels is None else np.searchsorted(shared, labels)
        kinds = max(len(shared), 1)
        real_share, my_share = (
            np.bincount(self._codes[side], minlength=kinds) / max(side.sum(), 1) for side in (~self.mine, self.mine)
        )
        self.reweighted = bool(np.abs(real_share - my_share).max() > 0.05)
        self.scopes = {
            name: Scope(self.values, self._codes == code, self._codes, np.eye(kinds)[code])
            for code, name in enumerate(shared if len(shared) > 1 else [])
        }
        everyone = np.ones(len(self.values), np.bool_)
        self.scopes[shared[0] if len(shared) == 1 else ALL] = Scope(self.values, everyone, self._codes, real_share)
        self._scales = np.stack([scope.scaled(self.values, ~self.mine) for scope in self.scopes.values()])
        groups = np.concatenate([synthetic.groups[keep[0]], real.groups[keep[1]]])
        keys = np.stack([self.mine, self._codes, groups], axis=1)
        _, self._unit = np.unique(keys, axis=0, return_inverse=True)
        self._unit = self._unit.ravel()
        self._unit_sizes = np.bincount(self._unit)
        self._unit_code, self._unit_mine = (np.zeros(len(self._unit_sizes), np.int64) for _ in range(2))
        self._unit_code[self._unit], self._unit_mine[self._unit] = self._codes, self.mine
        ranks = stats.rankdata(self.values, axis=0, nan_policy="omit") / max(len(self.values), 1)
        self._ranked = (~np.isnan(ranks)).astype(np.float64)
        self._ranks = np.nan_to_num(ranks)
        # Always that of the whole real set: where classes are exchanged, permuted sides have no axis of their own.
        places = self._class_means(~self.mine)
        self._axis = np.nan_to_num(places[1] - places[0])

    def statistics(self, first: NDArray[np.generic], second: NDArray[np.generic]) -> tuple[Floats, Floats, Floats]:
        """KS and scaled Wasserstein distances ``(S, D)`` and the swap ``(1, 1)`` of two weightings of the rows."""
        pairs = [scope.distances(first, second) for scope in self.scopes.values()]
        ks, wasserstein = (np.stack(part) for part in zip(*pairs, strict=True))
        return ks, wasserstein / self._scales, np.full((1, 1), self.swap(first, second))

    def bootstrap(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Whole groups with replacement, class by class and side by side."""
        counts = np.zeros(len(self._unit_sizes))
        for units in self._strata(np.arange(len(counts)), self._unit_mine):
            counts[units] = np.bincount(rng.integers(0, len(units), len(units)), minlength=len(units))
        weight = counts[self._unit]
        return weight * self.mine, weight * ~self.mine

    def permutation(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Groups exchanged between the sides within each class, sizes kept to within a group."""
        first = np.zeros(len(self._unit_sizes))
        for units in self._strata(np.arange(len(first))):
            target = self._unit_sizes[units][self._unit_mine[units] == 1].sum()
            first[self._cut(units, target, rng)] = 1.0
        return first[self._unit], 1.0 - first[self._unit]

    def halving(self, rng: np.random.Generator) -> tuple[Floats, Floats]:
        """Two group-disjoint halves of the real rows, each class halved."""
        real = np.flatnonzero(self._unit_mine == 0)
        sides = np.zeros((2, len(self._unit_sizes)))
        sides[1, real] = 1.0
        for units in self._strata(real):
            chosen = self._cut(units, self._unit_sizes[units].sum() / 2, rng)
            sides[:, chosen] = [[1.0], [0.0]]
        return sides[0][self._unit], sides[1][self._unit]

    def _strata(self, units: NDArray[np.int64], also: NDArray[np.int64] | None = None) -> list[NDArray[np.int64]]:
        keys = self._unit_code[units] * 2 + (0 if also is None else also[units])
        return [units[keys == key] for key in np.unique(keys)]

    def _cut(self, units: NDArray[np.int64], target: float, rng: np.random.Generator) -> NDArray[np.int64]:
        shuffled = rng.permutation(units)
        sizes = self._unit_sizes[shuffled]
        return np.asarray(shuffled[np.cumsum(sizes) - sizes / 2 < target])

    def swap(self, first: NDArray[np.generic], second: NDArray[np.generic]) -> float:
        """How far the first side's classes lie on the way to each other's place, by mean ranks over all features.

        0 where each class of the first side lies where the second side's does, 1 where each has gone the whole way
        from one real class to the other, below 0 where they lie further apart. Only the component along the axis
        between the real classes counts.
        """
        if self._codes.max(initial=0) != 1:
            return float("nan")
        mine, theirs = self._class_means(first), self._class_means(second)
        ways = np.nan_to_num(mine - theirs) @ self._axis / max(float(self._axis @ self._axis), 1e-12)
        return float((ways[0] - ways[1]) / 2)

    def _class_means(self, draw: NDArray[np.generic]) -> Floats:
        """Mean ranks of the first two classes, ``(2, D)``."""
        weights = np.stack([draw * (self._codes == code) for code in (0, 1)]).astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.asarray((weights @ self._ranks) / (weights @ self._ranked))
