"""Means and distributions of one number per image, between two sets, by group: all resampling at once as matrices.

``statistics`` takes any statistic; these two are linear in sums over groups, so that thousands of permutations cost a
matrix product, and p-values are fine enough to survive adjustment for many tests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from busigen.evaluation.comparing.statistics import RESAMPLES
from busigen.evaluation.results import Interval

PERMUTATIONS = 4999
"""Exchanges of groups; the smallest p-value is one in so many and one."""

HALVINGS = 200
"""Random halves of the real set behind a floor."""

BINS = 64
"""Steps of the empirical distributions that are compared, at quantiles of both sets together."""

Side = Literal["greater", "less", "both"]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """A measure of one set against another: value with interval, floor, p-value before adjustment."""

    value: Interval
    floor: Interval
    p: float


@dataclass(frozen=True)
class Groups:
    """Sums per group of both sets, and how permutations, bootstraps and halvings weigh the groups.

    Attributes:
        first: Group index per image of the first set, from 0.
        second: The same for the second set, counted on.
        sides: ``float32 (PERMUTATIONS, G)``: 1 where a permutation puts a group into the first set.
        draws: Two ``float32 (RESAMPLES, G)``: how often a bootstrap draw takes a group of either set.
        halves: ``float32 (HALVINGS, G)``: 1 where a halving puts a group of the second set into the first half.
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    sides: NDArray[np.float32]
    draws: tuple[NDArray[np.float32], NDArray[np.float32]]
    halves: NDArray[np.float32]

    @classmethod
    def of(cls, first: NDArray[np.int64], second: NDArray[np.int64], rng: np.random.Generator) -> Groups:
        """Number the groups of two sets, which share none, and draw all the resampling."""
        _, one = np.unique(first, return_inverse=True)
        _, two = np.unique(second, return_inverse=True)
        count = int(one.max(initial=-1)) + 1
        two = two + count
        total = int(two.max(initial=count - 1)) + 1
        sizes = np.bincount(np.concatenate([one, two]), minlength=total)
        of_second = np.arange(total) >= count
        return cls(
            first=one.astype(np.int64),
            second=two.astype(np.int64),
            sides=_parts(np.arange(total), sizes, len(one), PERMUTATIONS, rng),
            draws=(_bootstrap(~of_second, rng), _bootstrap(of_second, rng)),
            halves=_parts(np.flatnonzero(of_second), sizes, len(two) // 2, HALVINGS, rng),
        )

    def sums(self, first: Array, second: Array) -> Array:
        """Sum rows ``(images, M)`` of both sets into ``(G, M)``."""
        total = np.zeros((self.sides.shape[1], first.shape[1]))
        np.add.at(total, self.first, first)
        np.add.at(total, self.second, second)
        return total

    @property
    def of_second(self) -> NDArray[np.bool_]:
        """``bool (G,)``: the group is the second set's."""
        of_second = np.ones(self.sides.shape[1], np.bool_)
        of_second[self.first] = False
        return of_second


def compare_means(first: Array, second: Array, groups: Groups, side: Side) -> Comparison:
    """Mean over the first set; its floor is the mean over halves of the second.

    Args:
        first: One number per image, NaN where there is none; shares are means of 0 and 1.
        second: The same for the real set.
        groups: Of both.
        side: On which side of the second set's mean a value speaks against the first set.
    """
    sums = groups.sums(_mean_terms(first), _mean_terms(second))
    own = (~groups.of_second[None]).astype(np.float32)

    def mean(weights: NDArray[np.float32]) -> Array:
        total, count = (weights @ sums).T
        return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))

    sign = -1.0 if side == "less" else 1.0
    difference = sign * (mean(groups.sides) - mean(1 - groups.sides))
    observed = sign * float((mean(own) - mean(1 - own))[0])
    if side == "both":
        difference, observed = np.abs(difference), abs(observed)
    value = float(mean(own)[0])
    return Comparison(
        value=Interval(value, *_ends(mean(groups.draws[0]))),
        floor=_middle(mean(groups.halves)),
        p=_p(difference, observed),
    )


def compare_distributions(first: Array, second: Array, groups: Groups) -> Comparison:
    """Kolmogorov-Smirnov distance, 0 to 1, between two sets; its floor is that between halves of the second.

    Args:
        first: One number per image, NaN where there is none.
        second: The same for the real set.
        groups: Of both.
    """
    known = np.concatenate([first, second])
    known = known[~np.isnan(known)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS))) if known.size else np.zeros(1)

    def steps(values: Array) -> Array:
        # Row i holds 1 from the bin on in which image i lies: sums of rows are cumulative counts.
        return np.asarray(values[:, None] <= edges[None], dtype=np.float64)

    sums = groups.sums(steps(first), steps(second))
    own = (~groups.of_second[None]).astype(np.float32)

    def distance(one: NDArray[np.float32], two: NDArray[np.float32]) -> Array:
        parts = []
        for weights in (one, two):
            counts = weights @ sums
            total = counts[:, -1:]
            parts.append(np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0))
        return np.asarray(np.abs(parts[0] - parts[1]).max(axis=1))

    value = float(distance(own, 1 - own)[0])
    rest = (1 - own) - groups.halves
    return Comparison(
        value=_unbiased(value, distance(*groups.draws)),
        floor=_middle(distance(groups.halves, rest)),
        p=_p(distance(groups.sides, 1 - groups.sides), value),
    )


def _mean_terms(values: Array) -> Array:
    known = ~np.isnan(values)
    return np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1)


def _parts(
    groups: NDArray[np.int64], sizes: NDArray[np.int64], images: int, times: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Random sets of whole groups that hold about so many images each, as 0 and 1 per group."""
    chosen = np.zeros((times, len(sizes)), np.float32)
    for row in chosen:
        order = rng.permutation(groups)
        # The group that crosses the line is in or out by where its middle lies: sizes come out right on average.
        ends = np.cumsum(sizes[order])
        row[order[ends - sizes[order] / 2 <= images]] = 1
    return chosen


def _bootstrap(members: NDArray[np.bool_], rng: np.random.Generator) -> NDArray[np.float32]:
    draws = np.zeros((RESAMPLES, len(members)), np.float32)
    count = int(members.sum())
    if count:
        draws[:, members] = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws


def _ends(values: Array) -> tuple[float | None, float | None]:
    if np.isnan(values).all():
        return None, None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def _unbiased(value: float, draws: Array) -> Interval:
    """A distance with its bootstrap interval, moved by as much as resampling makes distances larger."""
    low, high = _ends(draws)
    if low is None or high is None:
        return Interval(value)
    bias = float(np.nanmedian(draws)) - value
    return Interval(value, min(max(low - bias, 0.0), value), max(high - bias, value))


def _middle(values: Array) -> Interval:
    if np.isnan(values).all():
        return Interval(float("nan"))
    return Interval(float(np.nanmedian(values)), *_ends(values))


def _p(permuted: Array, observed: float) -> float:
    known = permuted[~np.isnan(permuted)]
    if not known.size or np.isnan(observed):
        return float("nan")
    # A hair below, or ties that differ by rounding alone would count for the flag.
    return float((np.sum(known >= observed - 1e-9) + 1) / (known.size + 1))
