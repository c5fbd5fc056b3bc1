"""Intervals, floors and tests that respect groups: images of one patient are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from busigen.evaluation.context import Interval

Rows = NDArray[np.int64]
Sides = tuple[Rows, Rows]
Array = NDArray[np.float64]
Weights = NDArray[np.float32]
Side = Literal["greater", "less"]

ALPHA = 0.01  # Adjusted p-value below which a difference beyond the floor is a defect, in every section
FEWEST_TO_FLAG = 20  # Images (or lesions) on either side below which a section shows a figure but never flags it
RESAMPLES = 200  # Bootstrap draws. Enough for a 95 % interval whose ends move by a few percent of its width
HALVINGS = 20  # Random splits of the real set that give the floor
PERMUTATIONS = 4999  # Exchanges of groups in Groups; the smallest p-value is one in so many and one
GROUPED_HALVINGS = 200  # Random halves of the real set behind a floor of Groups
BINS = 64  # Steps of the empirical distributions that are compared, at quantiles of both sets together
_TRIALS = 100
_DEALS = 1000  # Deals after which none is looked for any more. Where divisible, that many fail with a chance of 2^-1000


def rows_by_group(groups: Rows) -> list[Rows]:
    """Row numbers of each group."""
    order = np.argsort(groups, kind="stable")
    cuts = np.flatnonzero(np.diff(groups[order])) + 1
    return [part.astype(np.int64) for part in np.split(order, cuts)] if len(groups) else []


def joint_groups(first: Rows, second: Rows) -> Rows:
    """Groups of the concatenation of two sets, which share none: those of the second are numbered on."""
    return np.concatenate([first, second + (int(first.max()) + 1 - int(second.min()))])


def deal(sizes: Rows, wanted: int, rng: np.random.Generator) -> tuple[Rows, int]:
    """All group numbers in random order, and how many from the start hold ``wanted`` rows: all plus one if none do."""
    order = rng.permutation(len(sizes))
    return order, int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1


def sizes_of(parts: list[Rows]) -> Rows:
    """Rows of each group of ``rows_by_group``."""
    return np.array([len(part) for part in parts], dtype=np.int64)


def ends(values: Array | list[float]) -> tuple[float | None, float | None]:
    """Where the middle 95 % of some draws lie; None where none of them is known."""
    low, high = (None, None) if np.isnan(values).all() else np.nanpercentile(values, [2.5, 97.5]).tolist()
    return low, high


def middle(draws: Array | list[float]) -> Interval:
    """The median of some draws, with the interval that holds 95 % of them."""
    return Interval(float(np.percentile(draws, 50.0)), *ends(draws))


def bootstrap(statistic: Callable[..., float], rng: np.random.Generator, *groups: Rows) -> Interval:
    """A statistic of one or more sets' row numbers; for its 95 % interval, whole groups are drawn with replacement."""
    sides = [rows_by_group(side) for side in groups]

    def resample(parts: list[Rows]) -> Rows:
        return np.concatenate([parts[k] for k in rng.integers(0, len(parts), len(parts))])

    draws = [statistic(*map(resample, sides)) for _ in range(RESAMPLES)]
    return Interval(statistic(*(np.arange(len(side)) for side in groups)), *ends(draws))


def halves(groups: Rows, rng: np.random.Generator) -> Sides:
    """Two random group-disjoint halves of about the same number of rows, each sorted; `ValueError` for one group."""
    parts = rows_by_group(groups)
    if len(parts) < 2:
        raise ValueError(f"a floor needs at least two groups, not {len(parts)}")
    sides: tuple[list[int], list[int]] = ([], [])
    for k in rng.permutation(len(parts)):
        min(sides, key=len).extend(parts[k].tolist())
    return np.sort(sides[0]), np.sort(sides[1])


def permutation_p(
    statistic: Callable[[Rows, Rows], float],
    first: Rows,
    second: Rows,
    rng: np.random.Generator,
    permutations: int = RESAMPLES,
) -> float:
    """P-value of "both sets are one", by exchanging whole groups between them (greater values speak against it).

    ``statistic`` takes row numbers into the *concatenation* of both sets; ``first`` and ``second`` are their groups.
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


def adjusted(p_values: Array) -> Array:
    """P-values adjusted for their number (Benjamini and Hochberg 1995); NaN stays NaN and does not count."""
    known = ~np.isnan(p_values)
    result = np.array(p_values, dtype=np.float64)
    if known.any():
        result[known] = stats.false_discovery_control(result[known])
    return result


@dataclass(frozen=True)
class Comparison:
    """A measure of one set against another: value with interval, floor if known, p-value before adjustment."""

    value: Interval
    floor: Interval | None
    p: float


class Groups:
    """How permutations, bootstrap draws and halvings weigh the G groups of two sets that share none.

    Attributes:
        own: ``float32 (1, G)``: 1 for the first set's groups.
        sides: ``float32 (PERMUTATIONS, G)``: 1 where a permutation puts a group into the first set.
        draws: Two ``float32 (RESAMPLES, G)``: how often a bootstrap draw takes a group of either set.
        halves: ``float32 (GROUPED_HALVINGS, G)``: 1 where a halving puts a group of the second set into one half.
    """

    def __init__(self, first: Rows, second: Rows, rng: np.random.Generator) -> None:
        _, one = np.unique(first, return_inverse=True)
        _, two = np.unique(second, return_inverse=True)
        count = int(one.max(initial=-1)) + 1
        self._group = np.concatenate([one, two + count])
        sizes = np.bincount(self._group)
        of_first = np.arange(len(sizes)) < count
        self.own = of_first[None].astype(np.float32)
        self.sides = _parts(np.arange(len(sizes)), sizes, len(one), PERMUTATIONS, rng)
        self.draws = _bootstrap(of_first, rng), _bootstrap(~of_first, rng)
        self.halves = _parts(np.flatnonzero(~of_first), sizes, len(two) // 2, GROUPED_HALVINGS, rng)

    def sums(self, rows: Array) -> Array:
        """Sum rows ``(images, M)``, the first set's before the second's, into ``(G, M)``."""
        total = np.zeros((self.own.shape[1], rows.shape[1]))
        np.add.at(total, self._group, rows)
        return total


def compare_means(first: Array, second: Array, groups: Groups, side: Side) -> Comparison:
    """Mean over the first set; its floor is the mean over halves of the second. Each image has a number, or NaN.

    ``side``: On which side of the second set's mean a value speaks against the first set.
    """
    values = np.concatenate([first, second])
    known = ~np.isnan(values)
    sums = groups.sums(np.stack([np.where(known, values, 0.0), known.astype(np.float64)], axis=1))

    def mean(weights: Weights) -> Array:
        total, count = (weights @ sums).T
        return np.asarray(np.divide(total, count, out=np.full_like(total, np.nan), where=count > 0))

    sign = -1.0 if side == "less" else 1.0
    difference = sign * (mean(groups.sides) - mean(1 - groups.sides))
    value = mean(groups.own)
    p = _p(difference, sign * float((value - mean(1 - groups.own))[0]))
    return Comparison(Interval(float(value[0]), *ends(mean(groups.draws[0]))), _middle(mean(groups.halves)), p)


def compare_distributions(first: Array, second: Array, groups: Groups) -> Comparison:
    """Kolmogorov-Smirnov distance, 0 to 1, between two sets; its floor is that between halves of the second.

    The interval is moved back by as much as resampling makes distances larger.
    """
    values = np.concatenate([first, second])
    known = values[~np.isnan(values)]
    edges = np.unique(np.quantile(known, np.linspace(0, 1, BINS))) if known.size else np.zeros(1)
    # Row i holds 1 from the bin on in which image i lies: sums of rows are cumulative counts.
    sums = groups.sums((values[:, None] <= edges[None]).astype(np.float64))

    def shares(weights: Weights) -> Array:
        counts = weights @ sums
        total = counts[:, -1:]
        return np.asarray(np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0))

    def distance(one: Weights, two: Weights) -> Array:
        return np.asarray(np.abs(shares(one) - shares(two)).max(axis=1))

    value = float(distance(groups.own, 1 - groups.own)[0])
    draws = distance(*groups.draws)
    low, high = ends(draws)
    if low is not None and high is not None:
        bias = float(np.nanmedian(draws)) - value
        low, high = min(max(low - bias, 0.0), value), max(high - bias, value)
    floor = _middle(distance(groups.halves, (1 - groups.own) - groups.halves))
    return Comparison(Interval(value, low, high), floor, _p(distance(groups.sides, 1 - groups.sides), value))


def _parts(groups: Rows, sizes: Rows, images: int, times: int, rng: np.random.Generator) -> Weights:
    """Random sets of whole groups that hold about so many images each: 1 for a group that is in."""
    chosen = np.zeros((times, len(sizes)), np.float32)
    for row in chosen:
        order = rng.permutation(groups)
        # The group that crosses the line is in or out by where its middle lies: sizes come out right on average.
        row[order[np.cumsum(sizes[order]) - sizes[order] / 2 <= images]] = 1
    return chosen


def _bootstrap(members: NDArray[np.bool_], rng: np.random.Generator) -> Weights:
    draws = np.zeros((RESAMPLES, len(members)), np.float32)
    count = int(members.sum())
    if count:
        draws[:, members] = rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)
    return draws


def _middle(values: Array) -> Interval | None:
    """`middle` of the draws that are known, if any is."""
    return None if np.isnan(values).all() else Interval(float(np.nanmedian(values)), *ends(values))


def _p(permuted: Array, observed: float) -> float:
    known = permuted[~np.isnan(permuted)]
    if not known.size or np.isnan(observed):
        return float("nan")
    # A hair below, or ties that differ by rounding alone would count for the flag.
    return float((np.sum(known >= observed - 1e-9) + 1) / (known.size + 1))


def matched_size(first: Rows, second: Rows) -> int:
    """Rows a side: half of the smaller set."""
    return min(len(first), len(second)) // 2


def draws(first: Rows, second: Rows, size: int, rng: np.random.Generator, count: int) -> Iterator[Sides]:
    """``count`` times ``size`` rows of the first and of the second set, whole groups but for the last."""
    parts = rows_by_group(first), rows_by_group(second)
    for _ in range(count):
        yield take(parts[0], size, rng), take(parts[1], size, rng)


def divisible(first: Rows, second: Rows, least: int, rng: np.random.Generator) -> bool:
    """Whether whole groups can be dealt to two sides of ``least`` rows: the second set's own, and both sets'.

    Tried out: at least half of the deals must do. Then the draws below deal again where one does not.
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


def disjoint_draws(groups: Rows, size: int, rng: np.random.Generator, count: int, least: int = 1) -> Iterator[Sides]:
    """``count`` times two group-disjoint samples of ``size`` rows, or of ``least`` to that where groups forbid it."""
    parts = rows_by_group(groups)
    sizes = sizes_of(parts)
    for _ in range(count):
        first, second = _sides(sizes, size, rng, least)
        yield np.concatenate([parts[k] for k in first])[:size], np.concatenate([parts[k] for k in second])[:size]


def permutations(first: Rows, second: Rows, rng: np.random.Generator, count: int, least: int = 1) -> Iterator[Sides]:
    """Rows of the *concatenated* sets, dealt anew by whole groups to two sides of about the same sizes as before."""
    _, index, sizes = np.unique(joint_groups(first, second), return_inverse=True, return_counts=True)
    for _ in range(count):
        chosen = np.isin(index, _sides(sizes, len(first), rng, least)[0])
        yield np.flatnonzero(chosen), np.flatnonzero(~chosen)


def take(parts: list[Rows], size: int, rng: np.random.Generator) -> Rows:
    """``size`` rows, or all: whole groups of ``rows_by_group`` in random order, the last of them cut to fit."""
    order, cut = deal(sizes_of(parts), size, rng)
    return np.concatenate([parts[k] for k in order[:cut]])[:size]


def _sides(sizes: Rows, wanted: int, rng: np.random.Generator, least: int = 1) -> Sides:
    """Group numbers of two sides of ``least`` rows or more, the first ending where it reaches ``wanted`` rows."""
    if len(sizes) < 2:
        raise ValueError(f"two sides need at least two groups, not {len(sizes)}")
    for _ in range(_DEALS):
        order, cut = deal(sizes, wanted, rng)
        cut = min(cut, len(sizes) - 1)
        first, second = order[:cut], order[cut:]
        if min(int(sizes[first].sum()), int(sizes[second].sum())) >= least:
            return first, second
    raise ValueError(f"groups cannot be dealt to two sides of {least} rows")
