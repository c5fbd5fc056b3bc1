"""Statistics on nearest neighbours that tell memory from likeness; every test exchanges whole groups.

All take similarities: greater is nearer. ``train`` trained the generator, ``held`` are real images that did not.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from busigen.evaluation.statistics.grouped import (
    Rows,
    deal,
    joint_groups,
    permutations,
    rows_by_group,
    sizes_of,
)

Values = NDArray[np.float64]

COPY_SIGMAS = 6.0
"""Robust standard deviations, on Fisher's z scale, that a copy lies above the usual nearest neighbour."""

LOW_FALSE_POSITIVES = 0.01
"""False positives at which an attack's true positives are read (Carlini et al. 2022, section IV)."""

Measure = Callable[[Values, Values], float]


def copy_threshold(reference: Values) -> float:
    """The correlation above which an image counts as a copy of its nearest neighbour.

    Nearest-neighbour correlations of real images that certainly are no copies say what is usual. Median and median
    absolute deviation of their Fisher z leave a stray near-duplicate among them without influence, which their maximum
    would not; the threshold lies six robust standard deviations up.

    Args:
        reference: Correlations, below 1.
    """
    z = np.arctanh(reference.clip(-0.999999, 0.999999))
    middle = float(np.median(z))
    return float(np.tanh(middle + COPY_SIGMAS * 1.4826 * float(np.median(np.abs(z - middle)))))


def copied_share(nearest: Values, reference: Values) -> float:
    """Share of ``nearest`` above the threshold that ``reference`` sets."""
    return float((nearest > copy_threshold(reference)).mean())


def auc(greater: Values, smaller: Values) -> float:
    """Chance that a value of the first exceeds one of the second: Mann and Whitney's U, scaled. 0.5 where alike."""
    ranks = stats.rankdata(np.concatenate([greater, smaller]))
    n, m = len(greater), len(smaller)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def detected(members: Values, others: Values) -> float:
    """Share of members that lie above 99 % of the others: true positives at 1 % false positives."""
    return float((members > np.quantile(others, 1 - LOW_FALSE_POSITIVES)).mean())


def permuted_p(
    measure: Measure, first: Values, first_groups: Rows, second: Values, second_groups: Rows,
    rng: np.random.Generator, count: int,
) -> float:  # fmt: skip
    """P-value of "both samples are one", groups exchanged; greater values of the measure speak against it."""
    joint = np.concatenate([first, second])
    observed = measure(first, second)
    beyond = sum(
        measure(joint[a], joint[b]) >= observed for a, b in permutations(first_groups, second_groups, rng, count)
    )
    return (beyond + 1) / (count + 1)


def training_preference(
    to_train: Values,
    to_held: Values,
    train_groups: Rows,
    held_groups: Rows,
    rng: np.random.Generator,
    count: int,
) -> tuple[float, Values]:
    """How much more often a synthetic image's nearest real neighbour is a training image than chance would have it.

    Chance is exact here: had the generator seen neither set, exchanging "trained on" and "held out" between groups
    changed nothing. So, unlike distances to the training set alone, this cannot mistake blur, noise or a narrow choice
    of images for memory.

    ``to_train``: ``(S, T)`` similarities. ``to_held``: ``(S, H)`` similarities.

    Returns:
        The share of synthetic images whose neighbour is a training image, less that share of all real images; and
        ``count`` values of the same under exchange.
    """
    joint = joint_groups(train_groups, held_groups)
    total = len(train_groups)
    neighbour = np.concatenate([to_train, to_held], axis=1).argmax(axis=1)
    hits = np.bincount(neighbour, minlength=len(joint))
    parts = rows_by_group(joint)
    sizes = sizes_of(parts)
    votes = np.array([hits[part].sum() for part in parts])
    exchanged = np.empty(count)
    for k in range(count):
        order, cut = deal(sizes, total, rng)
        exchanged[k] = votes[order[:cut]].sum() / len(neighbour) - sizes[order[:cut]].sum() / len(joint)
    return float(hits[:total].sum() / len(neighbour) - total / len(joint)), exchanged


def authentic(to_train: Values, within_train: Values, train_groups: Rows) -> NDArray[np.bool_]:
    """Which images are not nearer to their nearest training image than that is to any other group's training image.

    Alaa et al. 2022, section 3.3. Training images of the same patient do not count as another, because a held-out image
    has no such companion either.

    ``to_train``: ``(N, T)`` similarities. ``within_train``: ``(T, T)`` similarities.
    """
    others = np.where(train_groups[:, None] == train_groups[None, :], -np.inf, within_train).max(axis=1)
    nearest = to_train.argmax(axis=1)
    return np.asarray(to_train.max(axis=1) <= others[nearest])


def joined(groups: Rows, alike: NDArray[np.bool_]) -> Rows:
    """Groups, merged where images are alike: an image that a set repeats is one piece of evidence, not many.

    ``alike``: ``bool (N, N)``.
    """
    rows, columns = np.nonzero(alike | (groups[:, None] == groups[None, :]))
    _, merged = connected_components(
        coo_array((np.ones(len(rows)), (rows, columns)), shape=alike.shape), directed=False
    )
    return np.asarray(merged, dtype=np.int64)
