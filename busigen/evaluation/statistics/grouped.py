"""Intervals, floors and tests that respect groups: images of one patient are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from busigen.evaluation.results import Interval

Rows = NDArray[np.int64]
Array = NDArray[np.float64]
Statistic = Callable[[Rows, Rows], float]
"""Maps rows of the first and of the second set to a number."""

ALPHA = 0.01
"""Adjusted p-value below which a difference counts as a defect, in every section, if it also lies beyond the floor."""

FEWEST_TO_FLAG = 20
"""Images (or lesions) on either side below which a section shows a figure but never flags it."""

RESAMPLES = 200
"""Bootstrap draws. Enough for a 95 % interval whose ends move by a few percent of its width."""

HALVINGS = 20
"""Random splits of the real set that give the floor."""


def rows_by_group(groups: NDArray[np.int64]) -> list[Rows]:
    """Row numbers of each group."""
    order = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.astype(np.int64) for part in np.split(order, cuts)] if len(groups) else []


def joint_groups(first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups of the concatenation of two sets, which share none: those of the second are numbered on."""
    return np.concatenate([first, second + (int(first.max()) + 1 - int(second.min()))])


def deal(sizes: NDArray[np.int64], wanted: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], int]:
    """All group numbers in random order, and how many of them from the start it takes to hold ``wanted`` rows.

    The number is one more than there are groups where all of them hold fewer rows.
    """
    order = rng.permutation(len(sizes))
    return order, int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1


def sizes_of(parts: list[Rows]) -> NDArray[np.int64]:
    """Rows of each group of ``rows_by_group``."""
    return np.array([len(part) for part in parts], dtype=np.int64)


def resample(parts: list[Rows], rng: np.random.Generator) -> Rows:
    """Row numbers of one cluster-bootstrap draw from the groups of ``rows_by_group``: whole ones, with replacement."""
    chosen = rng.integers(0, len(parts), len(parts))
    return np.concatenate([parts[k] for k in chosen])


def ends(values: Array | list[float]) -> tuple[float | None, float | None]:
    """Where the middle 95 % of some draws lie; None where none of them is known."""
    if np.isnan(values).all():
        return None, None
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def middle(draws: Array | list[float]) -> Interval:
    """The median of some draws, with the interval that holds 95 % of them."""
    return Interval(float(np.percentile(draws, 50.0)), *ends(draws))


def bootstrap(statistic: Callable[..., float], rng: np.random.Generator, *groups: NDArray[np.int64]) -> Interval:
    """A statistic of one or more sets' row numbers, with its 95 % cluster-bootstrap interval."""
    sides = [rows_by_group(side) for side in groups]
    draws = [statistic(*(resample(parts, rng) for parts in sides)) for _ in range(RESAMPLES)]
    return Interval(statistic(*(np.arange(len(side)) for side in groups)), *ends(draws))


def halves(groups: NDArray[np.int64], rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Two random group-disjoint halves of about the same number of rows, each sorted.

    Raises:
        ValueError: fewer than two groups.
    """
    parts = rows_by_group(groups)
    if len(parts) < 2:
        raise ValueError(f"a floor needs at least two groups, not {len(parts)}")
    sides: tuple[list[Rows], list[Rows]] = ([], [])
    sizes = [0, 0]
    for k in rng.permutation(len(parts)):
        side = int(sizes[1] < sizes[0])
        sides[side].append(parts[k])
        sizes[side] += len(parts[k])
    first, second = (np.sort(np.concatenate(side)) for side in sides)
    return first, second


def permutation_p(
    statistic: Statistic,
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    rng: np.random.Generator,
    permutations: int = RESAMPLES,
) -> float:
    """P-value of "both sets are one", by exchanging whole groups between them (greater values speak against it).

    ``statistic`` takes row numbers into the *concatenation* of both sets.
    """
    total = len(first)
    joint = joint_groups(first, second)
    observed = statistic(np.arange(total), np.arange(total, len(joint)))
    parts = rows_by_group(joint)
    sizes = sizes_of(parts)
    beyond = counted = 0
    for _ in range(permutations):
        # Cut between groups, where the first side first reaches its size.
        order, cut = deal(sizes, total, rng)
        if cut < len(order):
            sides = (np.concatenate([parts[k] for k in side]) for side in (order[:cut], order[cut:]))
            beyond += statistic(*sides) >= observed
            counted += 1
    return (beyond + 1) / (counted + 1)


def adjusted(p_values: NDArray[np.float64]) -> NDArray[np.float64]:
    """P-values adjusted for their number (Benjamini and Hochberg 1995); NaN stays NaN and does not count."""
    known = ~np.isnan(p_values)
    result = np.array(p_values, dtype=np.float64)
    if known.any():
        result[known] = stats.false_discovery_control(result[known])
    return result


PERMUTATIONS = 4999
"""Exchanges of groups; the smallest p-value is one in so many and one."""

GROUPED_HALVINGS = 200
"""Random halves of the real set behind a floor."""

BINS = 64
"""Steps of the empirical distributions that are compared, at quantiles of both sets together."""

Side = Literal["greater", "less"]


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
            halves=_parts(np.flatnonzero(of_second), sizes, len(two) // 2, GROUPED_HALVINGS, rng),
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

    ``first``: One number per image, NaN where there is none; shares are means of 0 and 1. ``side``: On which side of
    the second set's mean a value speaks against the first set.
    """
    sums = groups.sums(_mean_terms(first), _mean_terms(second))
    own = (~groups.of_second[None]).astype(np.float32)

    def mean(weights: NDArray[np.float32]) -> Array:
        total, count = (weights @ sums).T
        return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))

    sign = -1.0 if side == "less" else 1.0
    difference = sign * (mean(groups.sides) - mean(1 - groups.sides))
    observed = sign * float((mean(own) - mean(1 - own))[0])
    value = float(mean(own)[0])
    return Comparison(
        value=Interval(value, *ends(mean(groups.draws[0]))),
        floor=_middle(mean(groups.halves)),
        p=_p(difference, observed),
    )


def compare_distributions(first: Array, second: Array, groups: Groups) -> Comparison:
    """Kolmogorov-Smirnov distance, 0 to 1, between two sets; its floor is that between halves of the second."""
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


def _unbiased(value: float, draws: Array) -> Interval:
    """A distance with its bootstrap interval, moved by as much as resampling makes distances larger."""
    low, high = ends(draws)
    if low is None or high is None:
        return Interval(value)
    bias = float(np.nanmedian(draws)) - value
    return Interval(value, min(max(low - bias, 0.0), value), max(high - bias, value))


def _middle(values: Array) -> Interval:
    if np.isnan(values).all():
        return Interval(float("nan"))
    return Interval(float(np.nanmedian(values)), *ends(values))


def _p(permuted: Array, observed: float) -> float:
    known = permuted[~np.isnan(permuted)]
    if not known.size or np.isnan(observed):
        return float("nan")
    # A hair below, or ties that differ by rounding alone would count for the flag.
    return float((np.sum(known >= observed - 1e-9) + 1) / (known.size + 1))


_TRIALS = 100
_DEALS = 1000
"""Deals after which none is looked for any more. Where `divisible`, that many fail with a chance of 2^-1000."""


def matched_size(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    """Rows a side: half of the smaller set."""
    return min(len(first), len(second)) // 2


def draws(
    first: NDArray[np.int64], second: NDArray[np.int64], size: int, rng: np.random.Generator, count: int
) -> Iterator[tuple[Rows, Rows]]:
    """``count`` times ``size`` rows of the first and of the second set, whole groups but for the last."""
    parts = rows_by_group(first), rows_by_group(second)
    for _ in range(count):
        yield take(parts[0], size, rng), take(parts[1], size, rng)


def divisible(first: NDArray[np.int64], second: NDArray[np.int64], least: int, rng: np.random.Generator) -> bool:
    """Whether whole groups can be dealt to two sides of ``least`` rows: the second set's own, and both sets'.

    Tried out, because few large groups allow some deals and forbid others: at least half must do. Then the draws below
    deal again where one does not.
    """
    size = matched_size(first, second)
    _, own = np.unique(second, return_counts=True)
    joint = np.concatenate([np.unique(first, return_counts=True)[1], own])
    for sizes, wanted in ((own, size), (joint, len(first))):
        if len(sizes) < 2:
            return False
        sides = [_sides(sizes, wanted, rng) for _ in range(_TRIALS)]
        if 2 * sum(min(int(sizes[a].sum()), int(sizes[b].sum())) >= least for a, b in sides) < _TRIALS:
            return False
    return True


def disjoint_draws(
    groups: NDArray[np.int64], size: int, rng: np.random.Generator, count: int, least: int = 1
) -> Iterator[tuple[Rows, Rows]]:
    """``count`` times two group-disjoint samples of ``size`` rows, or less where groups forbid it.

    Deals again where a sample has fewer than ``least`` rows; see `divisible`.
    """
    parts = rows_by_group(groups)
    sizes = sizes_of(parts)

    def dealt() -> tuple[Rows, Rows]:
        first, second = (np.concatenate([parts[k] for k in side])[:size] for side in _sides(sizes, size, rng))
        return first, second

    for _ in range(count):
        yield _until(dealt, least)


def permutations(
    first: NDArray[np.int64], second: NDArray[np.int64], rng: np.random.Generator, count: int, least: int = 1
) -> Iterator[tuple[Rows, Rows]]:
    """Rows of the *concatenated* sets, dealt anew by whole groups to two sides of about the same sizes as before.

    Deals again where a side has fewer than ``least`` rows; see `divisible`.
    """
    _, index, sizes = np.unique(joint_groups(first, second), return_inverse=True, return_counts=True)

    def dealt() -> tuple[Rows, Rows]:
        chosen = np.zeros(len(sizes), dtype=np.bool_)
        chosen[_sides(sizes, len(first), rng)[0]] = True
        return np.flatnonzero(chosen[index]), np.flatnonzero(~chosen[index])

    for _ in range(count):
        yield _until(dealt, least)


def take(parts: list[Rows], size: int, rng: np.random.Generator) -> Rows:
    """``size`` rows, or all: whole groups of ``rows_by_group`` in random order, the last of them cut to fit."""
    order, cut = deal(sizes_of(parts), size, rng)
    return np.concatenate([parts[k] for k in order[:cut]])[:size]


def _sides(sizes: NDArray[np.int64], wanted: int, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """Group numbers of two sides, the first ending where it reaches ``wanted`` rows; neither is empty."""
    if len(sizes) < 2:
        raise ValueError(f"two sides need at least two groups, not {len(sizes)}")
    order, cut = deal(sizes, wanted, rng)
    cut = min(cut, len(sizes) - 1)
    return order[:cut], order[cut:]


def _until(dealt: Callable[[], tuple[Rows, Rows]], least: int) -> tuple[Rows, Rows]:
    for _ in range(_DEALS):
        first, second = dealt()
        if min(len(first), len(second)) >= least:
            return first, second
    raise ValueError(f"groups cannot be dealt to two sides of {least} rows")
