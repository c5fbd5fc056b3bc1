"""What readers' answers add up to: can they tell, do they agree with themselves and each other, how do lesions read.

AUCs are areas under the ROC curve of the rating, which is how often a synthetic image is rated above a real one, ties
by half. Intervals hold 95 %, by resampling cases. Where they are to hold for other readers as well, readers are
resampled with them, so that the difference between readers is part of it: the question of Obuchowski and Rockette
(Communications in Statistics - Simulation and Computation 24, 285-308, 1995), answered by the bootstrap (Beiden, Wagner
and Campbell, Academic Radiology 7, 341-349, 2000).
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from busigen.evaluation.context import Interval
from busigen.evaluation.reader_study.records import CATEGORIES, SCALE, SYNTHETIC_FROM, Answers, Key
from busigen.evaluation.statistics.grouped import bootstrap

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Rows = NDArray[np.int64]

GRADED = tuple(number for number in CATEGORIES if number)  # Categories in the order of suspicion; 0 is outside of it.
_WORDS = {0.2: "slight", 0.4: "fair", 0.6: "moderate", 0.8: "substantial", 1.0: "almost perfect"}


@dataclass(frozen=True)
class Reading:
    """One reader's answers: ``float64 (C,)`` for each case, at its first showing, NaN where nothing was said.

    ``again`` are those at the second showing, NaN for cases that come once.
    """

    reader: str
    rating: Array
    birads: Array
    rating_again: Array
    birads_again: Array

    @classmethod
    def of(cls, answers: Answers, key: Key) -> Reading:
        """The answers by case."""
        values = np.full((4, len(key.cases)), np.nan)
        first: dict[int, int] = {}
        for place, shown in enumerate(key.shown):
            first.setdefault(shown.case, place)
        for answer in answers.answers:
            case = key.shown[answer.image - 1].case
            row = 0 if first[case] == answer.image - 1 else 2
            for offset, value in enumerate((answer.rating, answer.birads)):
                if value is not None:
                    values[row + offset, case] = value
        return cls(answers.reader, *values)

    @property
    def called(self) -> Array:
        """1 where the image was called synthetic, 0 where real, NaN where nothing was said."""
        return _called(self.rating)


@dataclass(frozen=True)
class Kappa:
    """Agreement of two series of ``count`` answers: how many are alike, and Cohen's kappa, None where undefined.

    Kappa is weighted by squared differences for ratings and categories, which have an order.
    """

    count: int
    alike: int
    kappa: float | None

    @property
    def word(self) -> str:
        """The strength of agreement in words of Landis and Koch (Biometrics 33, 159-174, 1977)."""
        if self.kappa is None:
            return "undefined"
        if self.kappa < 0:
            return "poor"
        # A hair above 1 by rounding is 1.
        return next(word for most, word in _WORDS.items() if self.kappa <= most + 1e-9)


@dataclass(frozen=True)
class Accuracy:
    """How many of ``count`` images were called what they are.

    Attributes:
        share: Of right answers, with the exact binomial interval (Clopper and Pearson 1934).
        chance: The share that who cannot tell would have with as many answers "synthetic".
        p: Of "cannot tell", by Fisher's exact test, two-sided.
        synthetic: Share of synthetic images that were called synthetic.
        real: Share of real images that were called synthetic.
    """

    count: int
    share: Interval
    chance: float
    p: float
    synthetic: float
    real: float


def auc(positive: Array, negative: Array) -> float:
    """Probability that a positive's value is above a negative's, ties by half; values that are NaN do not count."""
    positive, negative = positive[~np.isnan(positive)], negative[~np.isnan(negative)]
    if not positive.size or not negative.size:
        return float("nan")
    return float((np.sign(positive[:, None] - negative[None]) + 1).mean() / 2)


def right(positive: Array, negative: Array) -> float:
    """Share of calls that are right, of synthetic and of real images; NaN where there is none."""
    said = np.concatenate([positive, 1 - negative])
    return _mean(said.tolist())


def over_readers(
    measure: Callable[[Array, Array], float],
    values: Array,
    positive: Mask,
    negative: Mask,
    rng: np.random.Generator,
    *,
    readers: bool = False,
) -> Interval | None:
    """Mean over the readers of `auc` or `right` of ``values`` ``(R, C)``, with its interval; None where none has one.

    ``positive`` and ``negative`` ``(C,)`` are the cases to tell apart; ``readers`` resamples these as well.
    """
    high, low = values[:, positive], values[:, negative]

    def mean(some: Rows, others: Rows, who: Rows | None = None) -> float:
        return _mean([measure(high[k, some], low[k, others]) for k in (range(len(values)) if who is None else who)])

    return _bootstrap(mean, rng, high.shape[1], low.shape[1], *([len(values)] if readers else []))


def auc_difference(
    values: Array, first: tuple[Mask, Mask], second: tuple[Mask, Mask], rng: np.random.Generator
) -> Interval | None:
    """The mean AUC of the first positives and negatives minus that of the second, with its interval."""
    sides = [values[:, mask] for mask in (*first, *second)]

    def difference(*rows: Rows) -> float:
        parts = [side[:, row] for side, row in zip(sides, rows, strict=True)]
        return _mean([auc(a, b) - auc(c, d) for a, b, c, d in zip(*parts, strict=True)])

    return _bootstrap(difference, rng, *(side.shape[1] for side in sides))


def accuracy(called: Array, synthetic: Mask) -> Accuracy | None:
    """How often a reader was right; None without an answer on either side."""
    said = ~np.isnan(called)
    yes, truth = called[said] == 1, synthetic[said]
    if truth.all() or not truth.any():
        return None
    count, right = len(yes), int((yes == truth).sum())
    low, high = stats.binomtest(right, count).proportion_ci()
    table = [[int((yes & side).sum()), int((~yes & side).sum())] for side in (truth, ~truth)]
    chance = yes.mean() * truth.mean() + (1 - yes.mean()) * (1 - truth.mean())
    p = float(stats.fisher_exact(table).pvalue)
    share = Interval(right / count, float(low), float(high))
    return Accuracy(count, share, float(chance), p, float(yes[truth].mean()), float(yes[~truth].mean()))


def agreement(first: Array, second: Array, labels: Sequence[int], *, weighted: bool) -> Kappa:
    """Agreement of two series of labels; pairs in which either is missing, or no label of these, do not count."""
    both = np.isin(first, labels) & np.isin(second, labels)
    one, two = first[both].astype(int), second[both].astype(int)
    if not one.size:
        return Kappa(0, 0, None)
    with warnings.catch_warnings(action="ignore"):
        # Who always gives one answer leaves nothing to agree on: 0 by 0.
        value = cohen_kappa_score(one, two, labels=list(labels), weights="quadratic" if weighted else None)
    return Kappa(len(one), int((one == two).sum()), float(value) if np.isfinite(value) else None)


def agreements(first: Sequence[Array], second: Sequence[Array]) -> dict[str, Kappa]:
    """Agreement of two (rating, BI-RADS) pairs: on real or synthetic, on the rating, on the category."""
    (rating, birads), (other_rating, other_birads) = first, second
    return {
        "call": agreement(_called(rating), _called(other_rating), (0, 1), weighted=False),
        "rating": agreement(rating, other_rating, range(1, len(SCALE) + 1), weighted=True),
        "birads": agreement(birads, other_birads, GRADED, weighted=True),
    }


def between(readings: Sequence[Reading]) -> dict[tuple[str, str], dict[str, Kappa]]:
    """`agreements` of every two readers."""
    return {
        (one.reader, two.reader): agreements((one.rating, one.birads), (two.rating, two.birads))
        for one, two in itertools.combinations(readings, 2)
    }


def _called(rating: Array) -> Array:
    return np.where(np.isnan(rating), np.nan, rating >= SYNTHETIC_FROM)


def _mean(values: Sequence[float]) -> float:
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")


def _bootstrap(statistic: Callable[..., float], rng: np.random.Generator, *sizes: int) -> Interval | None:
    if not all(sizes) or np.isnan(statistic(*(np.arange(size) for size in sizes))):
        return None
    return bootstrap(statistic, rng, *(np.arange(size) for size in sizes))
