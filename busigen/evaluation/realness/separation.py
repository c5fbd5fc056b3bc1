"""How well a classifier separates two sets of images whose rows come in groups: folds, scores, AUC and its null."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata
from sklearn.model_selection import StratifiedGroupKFold

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RIDGE = 0.1
"""Weight of the ridge term against a kernel whose diagonal is about one.

Of 0.001 to 10 the value that told 210 BUSI and BUS-BRA images with planted defects from 209 others best.
"""


@dataclass(frozen=True)
class Task:
    """Rows of both sets, joined.

    Attributes:
        side: N, 0 for the first set and 1 for the second.
        label: N class numbers. Rows are compared within their class only, so a different mix of classes cannot tell the
            sets apart.
        group: N groups, no group on both sides.
    """

    side: Ints
    label: Ints
    group: Ints

    def take(self, rows: Ints) -> Task:
        """The task of some rows."""
        return Task(self.side[rows], self.label[rows], self.group[rows])


def folds(task: Task, count: int, seed: int) -> Ints:
    """The fold in which each row is tested: groups stay together, classes and sides are spread evenly.

    Raises:
        ValueError: fewer groups than folds.
    """
    result = np.zeros(len(task.side), np.int64)
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        # "The least populated class has fewer members than folds": then some folds hold none of it, which is fine.
        warnings.simplefilter("ignore", UserWarning)
        parts = splitter.split(task.side, 2 * task.label + task.side, task.group)
        for fold, (_, test) in enumerate(parts):
            result[test] = fold
    return result


def auc(scores: Floats, task: Task, fold: Ints, weights: Floats | None = None) -> float:
    """Chance that a row of side 1 scores above one of side 0 **of the same class and fold**; ties count half.

    Scores of different folds come from different classifiers and are not comparable. NaN where no pair exists.

    Args:
        scores: N scores.
        task: Sides and classes.
        fold: N fold numbers.
        weights: N weights, such as how often a bootstrap drew each row.
    """
    above = pairs = 0.0
    stratum = task.label * (int(fold.max()) + 1) + fold
    for value in np.unique(stratum):
        first, second = (np.flatnonzero((stratum == value) & (task.side == side)) for side in (0, 1))
        if weights is None:
            # Mann and Whitney's U by ranks: a permutation test calls this a thousand times.
            ranks = rankdata(scores[np.concatenate([second, first])])[: len(second)]
            above += float(ranks.sum()) - len(second) * (len(second) + 1) / 2
            pairs += len(first) * len(second)
            continue
        difference = np.sign(scores[second][:, None] - scores[first][None, :])
        above += float(weights[second] @ (0.5 + 0.5 * difference) @ weights[first])
        pairs += float(weights[second].sum() * weights[first].sum())
    return above / pairs if pairs else float("nan")


def bootstrap_auc(
    scores: Floats, task: Task, fold: Ints, rng: np.random.Generator, resamples: int
) -> tuple[float, float]:
    """95 % percentile interval of ``auc``: whole groups of each side drawn with replacement, the scores held fixed."""
    _, code = np.unique(task.group, return_inverse=True)
    side_of = np.zeros(code.max() + 1, np.int64)
    side_of[code] = task.side
    values = []
    for _ in range(resamples):
        drawn = np.zeros(len(side_of))
        for side in (0, 1):
            members = np.flatnonzero(side_of == side)
            drawn += np.bincount(rng.choice(members, len(members)), minlength=len(side_of))
        values.append(auc(scores, task, fold, drawn[code]))
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def shuffled_sides(task: Task, rng: np.random.Generator) -> Ints:
    """Sides exchanged between whole groups of one class: what "both sets are one" allows."""
    _, first, code = np.unique(task.group, return_index=True, return_inverse=True)
    side, label = task.side[first], task.label[first]
    for value in np.unique(label):
        members = np.flatnonzero(label == value)
        side[members] = side[rng.permutation(members)]
    return side[code].reshape(len(task.side))


class Ridge:
    """Ridge classifier on fixed features, whose out-of-fold scores are linear in the labels.

    So a permutation test can train anew for every permutation, at the price of a matrix product: the null holds the
    whole procedure, and not just fixed scores.
    """

    def __init__(self, features: NDArray[np.float32], task: Task, fold: Ints) -> None:
        self.task, self.fold = task, fold
        scaled = (features - features.mean(0)) / np.maximum(features.std(0), 1e-6)
        kernel = scaled.astype(np.float64) @ scaled.T.astype(np.float64) / features.shape[1]
        count = len(kernel)
        self._map = np.zeros((count, count))
        for value in np.unique(fold):
            test, train = np.flatnonzero(fold == value), np.flatnonzero(fold != value)
            inner = kernel[np.ix_(train, train)]
            centre = inner.mean(0)
            # Both kernels centred at the training rows' mean: an intercept that the ridge term does not shrink.
            inner = inner - centre[None, :] - centre[:, None] + centre.mean()
            outer = kernel[np.ix_(test, train)]
            outer = outer - outer.mean(1, keepdims=True) - centre[None, :] + centre.mean()
            solved = np.linalg.solve(inner + RIDGE * np.eye(len(train)), outer.T)
            self._map[np.ix_(test, train)] = solved.T

    def scores(self, side: Ints) -> Floats:
        """N out-of-fold scores after training on these sides, each class's share of side 1 taken out."""
        result = np.zeros(len(side))
        for value in np.unique(self.fold):
            test, train = self.fold == value, self.fold != value
            target = np.where(train, side, 0).astype(np.float64)
            for label in np.unique(self.task.label):
                rows = train & (self.task.label == label)
                if rows.any():
                    target[rows] -= target[rows].mean()
            result[test] = self._map[test] @ target
        return result
