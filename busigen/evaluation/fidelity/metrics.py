"""Distances between two samples of feature vectors: Frechet, kernel, and by nearest neighbours.

Intervals, floors and tests evaluate these thousands of times on subsets of the same rows. So what is costly (kernel,
pairwise distances) is computed once for all rows, and every measure takes that array and two sets of row numbers.
scikit-learn supplies the pairwise arrays; the tests hold the measures against torchmetrics and prdc.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from sklearn.metrics import pairwise

from busigen.evaluation.results import Better
from busigen.evaluation.statistics.grouped import Rows

Array = NDArray[np.float64]

NEAREST_PRECISION = 3
"""Neighbours that span the manifold for precision and recall (Kynkaanniemi et al. 2019, section 3.1)."""

NEAREST_DENSITY = 5
"""Neighbours for density and coverage (Naeem et al. 2020, section 4)."""

CLIP = 5.0
"""Robust standard deviations beyond which a standardised feature says no more than "far out". Ratios such as kurtosis
have tails so long that single images would otherwise decide a covariance."""

_TO_SIGMA = 1.349
"""Interquartile range of a normal distribution in standard deviations."""


@dataclass(frozen=True)
class Standardiser:
    """Median and robust standard deviation of each kept column.

    Attributes:
        columns: ``int64 (K,)``: the columns that vary; the others are left out.
        centre: ``float64 (K,)``: medians.
        scale: ``float64 (K,)``: interquartile range over 1.349.
    """

    columns: Rows
    centre: Array
    scale: Array

    @classmethod
    def fit(cls, real: Array) -> Standardiser:
        """Take centre and scale from real images, ``(N, D)``: only then does the synthetic set not change the ruler."""
        low, centre, high = np.percentile(real, [25, 50, 75], axis=0)
        scale = (high - low) / _TO_SIGMA
        columns = np.flatnonzero(scale > 1e-12 * np.maximum(np.abs(centre), 1e-12)).astype(np.int64)
        return cls(columns, centre[columns], scale[columns])

    def __call__(self, features: Array) -> Array:
        """Standardise ``(N, D)`` to ``(N, K)``, within ``CLIP`` of 0."""
        standard: Array = ((features[:, self.columns] - self.centre) / self.scale).clip(-CLIP, CLIP)
        return standard


def frechet_distance(first: Array, second: Array) -> float:
    """Frechet distance of the Gaussians fitted to two samples (Heusel et al. 2017, eq. 6, squared as usual).

    The trace of the square root of the covariances' product is the sum of the singular values of ``A'B``, where ``AA'``
    and ``BB'`` are the two covariances. That is exact for any rank, so samples smaller than the dimension need no
    shrinkage, no offset on the diagonal and no complex square roots; only their bias remains, see `frechet_bias`.

    Args:
        first: ``(N, D)``, N at least 2.
        second: ``(M, D)``, M at least 2.

    Returns:
        The distance in squared units of the features, at least 0.
    """
    roots = [_root(sample) for sample in (first, second)]
    shift = first.mean(axis=0) - second.mean(axis=0)
    spread = sum(float(np.sum(root**2)) for root in roots)
    common = float(linalg.svdvals(roots[0].T @ roots[1]).sum())
    return max(float(shift @ shift) + spread - 2.0 * common, 0.0)


def frechet_bias(variances: Array, first: int, second: int) -> float:
    """What `frechet_distance` gives on average for two samples of one Gaussian, to first order in 1/N.

    The means contribute the sum of the variances; the covariances the second-order term of the Bures metric,
    ``sum_ij E[d_ij^2] / (2 (v_i + v_j))``, with the Wishart distribution's ``E[d_ij^2] = v_i v_j (1 + [i = j]) / N``.
    Holds for samples much larger than the dimension.

    ``variances``: ``(D,)`` eigenvalues of the covariance.
    """
    positive = variances[variances > 0]
    pairs = np.outer(positive, positive) / (2.0 * np.add.outer(positive, positive))
    return float((positive.sum() + pairs.sum() + np.trace(pairs)) * (1.0 / first + 1.0 / second))


def simulated_frechet_bias(variances: Array, size: int, rng: np.random.Generator) -> float:
    """`frechet_distance` of two samples of ``size`` rows drawn from one Gaussian with these variances, ``(D,)``."""
    first, second = (rng.normal(size=(size, len(variances))) * np.sqrt(variances) for _ in range(2))
    return frechet_distance(first, second)


def polynomial_kernel(rows: Array) -> Array:
    """``(N, N)``: the kernel of KID, ``(x'y / D + 1)^3`` (Binkowski et al. 2018, section 4)."""
    return np.asarray(pairwise.polynomial_kernel(rows, degree=3, coef0=1.0), dtype=np.float64)


def gaussian_kernel(rows: Array) -> Array:
    """``(N, N)``: a Gaussian as wide as the median distance (Gretton et al. 2012, section 8).

    Bounded, so that no single image far out decides the sum, as it does with a cubic kernel.
    """
    squared = pairwise.euclidean_distances(rows, squared=True)
    median = float(np.median(squared[np.triu_indices(len(rows), 1)]))
    return np.asarray(np.exp(-squared / (2.0 * max(median, 1e-12))), dtype=np.float64)


def distances(rows: Array) -> Array:
    """``(N, N)`` Euclidean distances."""
    return np.asarray(pairwise.euclidean_distances(rows), dtype=np.float64)


def mmd2(kernel: Array, first: Rows, second: Rows) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3): 0 on average for equal distributions.

    ``kernel``: ``(N, N)`` over the rows of both samples.
    """
    ones = np.zeros((len(kernel), 2))
    ones[first, 0], ones[second, 1] = 1.0, 1.0
    sums = ones.T @ (kernel @ ones)
    diagonal = np.diagonal(kernel)
    n, m = len(first), len(second)
    within = (sums[0, 0] - diagonal[first].sum()) / (n * (n - 1)) + (sums[1, 1] - diagonal[second].sum()) / (
        m * (m - 1)
    )
    return float(within - 2.0 * sums[0, 1] / (n * m))


def neighbourhoods(distance: Array, synthetic: Rows, real: Rows) -> tuple[float, float, float, float]:
    """Precision, recall (Kynkaanniemi et al. 2019, eq. 1), density, coverage (Naeem et al. 2020, eqs. 4 and 7).

    ``distance``: ``(N, N)`` over the rows of both samples. ``synthetic``: More than `NEAREST_DENSITY` rows.

    Returns:
        The four, each 0 to 1 but density, which may exceed 1.
    """
    across = distance[np.ix_(synthetic, real)]
    real_radii = _radii(distance[np.ix_(real, real)])
    synthetic_radii = _radii(distance[np.ix_(synthetic, synthetic)])
    precision = (across <= real_radii[NEAREST_PRECISION]).any(axis=1).mean()
    recall = (across <= synthetic_radii[NEAREST_PRECISION][:, None]).any(axis=0).mean()
    within = across <= real_radii[NEAREST_DENSITY]
    return (
        float(precision),
        float(recall),
        float(within.mean() * len(real) / NEAREST_DENSITY),
        float(within.any(axis=0).mean()),
    )


@dataclass(frozen=True)
class Measure:
    """One column of a comparison."""

    name: str
    label: str
    better: Better
    note: str = ""

    @property
    def sign(self) -> float:
        """Makes greater values speak against the synthetic set."""
        return -1.0 if self.better == "higher" else 1.0


MEASURES = (
    Measure("frechet", "Frechet distance", "lower", "squared robust standard deviations"),
    Measure(
        "mmd", "MMD², cubic kernel", "lower", "unbiased: 0 on average between equal distributions, may be negative"
    ),
    Measure(
        "precision", "precision", "higher", f"share of synthetic within reach of a real image, k = {NEAREST_PRECISION}"
    ),
    Measure("recall", "recall", "higher", f"share of real within reach of a synthetic image, k = {NEAREST_PRECISION}"),
    Measure("density", "density", "higher", f"real neighbourhoods around a synthetic image over k = {NEAREST_DENSITY}"),
    Measure("coverage", "coverage", "higher", f"share of real whose neighbourhood is visited, k = {NEAREST_DENSITY}"),
)
"""What a `Comparison` computes, in order."""


class Comparison:
    """All `MEASURES` between rows of one feature matrix.

    Args:
        rows: ``(N, D)``: the rows of both sets.
        kernel: Of the MMD: `gaussian_kernel` for standardised features, `polynomial_kernel` makes it KID.
    """

    def __init__(self, rows: Array, kernel: Callable[[Array], Array] = gaussian_kernel) -> None:
        self._rows = rows
        self._kernel = kernel(rows)
        self._distance = distances(rows)

    def __call__(self, synthetic: Rows, real: Rows) -> Array:
        """``float64 (6,)``: the measures, ``synthetic`` in the synthetic set's place."""
        frechet = frechet_distance(self._rows[synthetic], self._rows[real])
        return np.array(
            [frechet, mmd2(self._kernel, synthetic, real), *neighbourhoods(self._distance, synthetic, real)]
        )


def _root(sample: Array) -> Array:
    """``A`` with ``AA'`` the sample's covariance, with as few columns as sample size and dimension allow."""
    centred = (sample - sample.mean(axis=0)) / np.sqrt(len(sample) - 1)
    if len(sample) <= sample.shape[1]:
        return np.asarray(centred.T)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    return np.asarray(axes * np.sqrt(variances.clip(0.0)))


def _radii(within: Array) -> dict[int, Array]:
    """Distance of each row to its k-th other, for the two k in use; its own 0 comes first."""
    parted = np.partition(within, (NEAREST_PRECISION, NEAREST_DENSITY), axis=1)
    return {k: parted[:, k] for k in (NEAREST_PRECISION, NEAREST_DENSITY)}
