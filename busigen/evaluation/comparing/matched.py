"""Draws of rows by group, for measures whose value depends on the number of rows.

Frechet distance, recall and the like change with the sample's size, and a bootstrap that repeats rows breaks them: a
repeated image is its own nearest neighbour, and a covariance of repeats has too low a rank. So value and floor are
both taken between samples of one size, drawn by whole groups without replacement (subsampling: Politis and Romano
1994). With halves the draws spread as the figure of the full sets does (delete-half jackknife: Shao and Wu 1989).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from busigen.evaluation.comparing.statistics import Rows, deal, joint_groups, rows_by_group, sizes_of

Groups = NDArray[np.int64]

_TRIALS = 100
_DEALS = 1000
"""Deals after which none is looked for any more. Where `divisible`, that many fail with a chance of 2^-1000."""


def matched_size(first: Groups, second: Groups) -> int:
    """Rows a side: half of the smaller set."""
    return min(len(first), len(second)) // 2


def draws(
    first: Groups, second: Groups, size: int, rng: np.random.Generator, count: int
) -> Iterator[tuple[Rows, Rows]]:
    """``count`` times ``size`` rows of the first and of the second set, whole groups but for the last."""
    parts = rows_by_group(first), rows_by_group(second)
    for _ in range(count):
        yield take(parts[0], size, rng), take(parts[1], size, rng)


def divisible(first: Groups, second: Groups, least: int, rng: np.random.Generator) -> bool:
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
    groups: Groups, size: int, rng: np.random.Generator, count: int, least: int = 1
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
    first: Groups, second: Groups, rng: np.random.Generator, count: int, least: int = 1
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
