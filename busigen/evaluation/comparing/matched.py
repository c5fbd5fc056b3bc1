"""Draws of rows by group, for measures whose value depends on the number of rows.

Frechet distance, recall and the like change with the sample's size, and a bootstrap that repeats rows breaks them: a
repeated image is its own nearest neighbour, and a covariance of repeats has too low a rank. So value and floor are
both taken between samples of one size, drawn by whole groups without replacement (subsampling: Politis and Romano
1994). With halves the draws spread as the figure of the full sets does (delete-half jackknife: Shao and Wu 1989).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from busigen.evaluation.comparing.statistics import Rows, rows_by_group

Groups = NDArray[np.int64]


def matched_size(first: Groups, second: Groups) -> int:
    """Rows a side: half of the smaller set."""
    return min(len(first), len(second)) // 2


def draws(
    first: Groups, second: Groups, size: int, rng: np.random.Generator, count: int
) -> Iterator[tuple[Rows, Rows]]:
    """``count`` times ``size`` rows of the first and of the second set, whole groups but for the last."""
    parts = rows_by_group(first), rows_by_group(second)
    for _ in range(count):
        yield _take(parts[0], size, rng), _take(parts[1], size, rng)


def disjoint_draws(groups: Groups, size: int, rng: np.random.Generator, count: int) -> Iterator[tuple[Rows, Rows]]:
    """``count`` times two group-disjoint samples of ``size`` rows, or a few less where groups forbid it."""
    parts = rows_by_group(groups)
    for _ in range(count):
        order = [parts[k] for k in rng.permutation(len(parts))]
        ends = np.cumsum([len(part) for part in order])
        cut = min(int(np.searchsorted(ends, size)) + 1, len(order) - 1)
        yield np.concatenate(order[:cut])[:size], np.concatenate(order[cut:])[:size]


def permutations(first: Groups, second: Groups, rng: np.random.Generator, count: int) -> Iterator[tuple[Rows, Rows]]:
    """Rows of the *concatenated* sets, dealt anew by whole groups to two sides of about the same sizes as before."""
    joint = np.concatenate([first, second + (int(first.max()) + 1 - int(second.min()))])
    _, index, sizes = np.unique(joint, return_inverse=True, return_counts=True)
    for _ in range(count):
        order = rng.permutation(len(sizes))
        cut = min(int(np.searchsorted(np.cumsum(sizes[order]), len(first))) + 1, len(sizes) - 1)
        chosen = np.zeros(len(sizes), dtype=np.bool_)
        chosen[order[:cut]] = True
        yield np.flatnonzero(chosen[index]), np.flatnonzero(~chosen[index])


def _take(parts: list[Rows], size: int, rng: np.random.Generator) -> Rows:
    order = rng.permutation(len(parts))
    rows, taken = [], 0
    for k in order:
        rows.append(parts[k])
        taken += len(parts[k])
        if taken >= size:
            break
    return np.concatenate(rows)[:size]
