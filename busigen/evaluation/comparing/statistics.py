"""Intervals, floors and tests that respect groups: images of one patient are not independent of each other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Rows = NDArray[np.int64]
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

    Args:
        sizes: Rows of each group.
        wanted: Rows to hold.
        rng: Source of the order.
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
