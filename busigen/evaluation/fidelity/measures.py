"""The measures of fidelity: of two sets of rows of one feature matrix, whose costly parts are computed once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from sklearn.metrics import pairwise

from busigen.evaluation.context import Better
from busigen.evaluation.statistics.grouped import Rows

Array = NDArray[np.float64]

NEAREST_PRECISION = 3  # Neighbours for precision and recall (Kynkaanniemi et al. 2019, section 3.1)
NEAREST_DENSITY = 5  # Neighbours for density and coverage (Naeem et al. 2020, section 4)
CLIP = 5.0  # Greatest standardised feature: the tails of ratios such as kurtosis would otherwise decide a covariance
_TO_SIGMA = 1.349  # Interquartile range of a normal distribution in standard deviations

Measure = tuple[str, str, Better, str]

MEASURES: tuple[Measure, ...] = (
    ("frechet", "Frechet distance", "lower", "squared robust standard deviations"),
    ("mmd", "MMD²", "lower", "unbiased: 0 on average between equal distributions, may be negative"),
    ("precision", "precision", "higher", f"share of synthetic within reach of a real image, k = {NEAREST_PRECISION}"),
    ("recall", "recall", "higher", f"share of real within reach of a synthetic image, k = {NEAREST_PRECISION}"),
    ("density", "density", "higher", f"real neighbourhoods around a synthetic image over k = {NEAREST_DENSITY}"),
    ("coverage", "coverage", "higher", f"share of real whose neighbourhood is visited, k = {NEAREST_DENSITY}"),
)
"""What a `comparison` computes, in order: its name, its label, which way is better, and a note for the report."""
MMD = MEASURES[1:2]
FRD: tuple[Measure, ...] = (("frd", "FRD", "lower", "logarithm of the squared Frechet distance; may be negative"),)


def standardised(reference: Array, *others: Array) -> list[Array]:
    """Features ``(N, D)`` as ``(N, K)``: in units of the reference, and without those that do not vary there.

    Values lie within `CLIP`.
    """
    low, centre, high = np.percentile(reference, [25, 50, 75], axis=0)
    scale = (high - low) / _TO_SIGMA
    columns = np.flatnonzero(scale > 1e-12 * np.maximum(np.abs(centre), 1e-12))
    centre, scale = centre[columns], scale[columns]
    return [((values[:, columns] - centre) / scale).clip(-CLIP, CLIP) for values in (reference, *others)]


def gaussian_kernel(rows: Array) -> Array:
    """``(N, N)``: a Gaussian as wide as the median distance (Gretton et al. 2012, section 8)."""
    # Bounded, so that no single image far out decides the sum, as it does with a cubic kernel.
    squared = pairwise.euclidean_distances(rows, squared=True)
    median = float(np.median(squared[np.triu_indices(len(rows), 1)]))
    return np.asarray(np.exp(-squared / (2.0 * max(median, 1e-12))), dtype=np.float64)


def polynomial_kernel(rows: Array) -> Array:
    """``(N, N)``: the kernel of KID, ``(x'y / D + 1)^3`` (Binkowski et al. 2018, section 4)."""
    return np.asarray(pairwise.polynomial_kernel(rows, degree=3, coef0=1.0), dtype=np.float64)


def comparison(rows: Array, kernel: Callable[[Array], Array] = gaussian_kernel) -> Callable[[Rows, Rows], Array]:
    """Maps synthetic and real rows of one feature matrix ``(N, D)`` to `MEASURES`. ``kernel``: Of the MMD."""
    kernels, distances = kernel(rows), pairwise.euclidean_distances(rows)

    def measures(synthetic: Rows, real: Rows) -> Array:
        frechet = frechet_distance(rows[synthetic], rows[real])
        return np.array([frechet, mmd2(kernels, synthetic, real), *neighbourhoods(distances, synthetic, real)])

    return measures


def mmd_alone(rows: Array, kernel: Callable[[Array], Array]) -> Callable[[Rows, Rows], Array]:
    """The same, to `MMD` alone."""
    kernels = kernel(rows)
    return lambda synthetic, real: np.array([mmd2(kernels, synthetic, real)])


def frd_alone(rows: Array) -> Callable[[Rows, Rows], Array]:
    """The same, to `FRD` alone."""
    return lambda first, second: np.log(np.maximum([frechet_distance(rows[first], rows[second])], 1e-12))


def frechet_distance(first: Array, second: Array) -> float:
    """Frechet distance of the Gaussians fitted to samples ``(N, D)`` and ``(M, D)`` (Heusel et al. 2017).

    The trace of the square root of the covariances' product is the sum of the singular values of ``A'B``, where ``AA'``
    and ``BB'`` are the two covariances, exactly for any rank. Squared, as usual (eq. 6).
    """
    roots = [_root(sample) for sample in (first, second)]
    shift = first.mean(axis=0) - second.mean(axis=0)
    spread = sum(float(np.sum(root**2)) for root in roots)
    common = float(linalg.svdvals(roots[0].T @ roots[1]).sum())
    return max(float(shift @ shift) + spread - 2.0 * common, 0.0)


def _root(sample: Array) -> Array:
    """``A`` with ``AA'`` the sample's covariance, with as few columns as sample size and dimension allow."""
    centred = (sample - sample.mean(axis=0)) / np.sqrt(len(sample) - 1)
    if len(sample) <= sample.shape[1]:
        return np.asarray(centred.T)
    variances, axes = np.linalg.eigh(centred.T @ centred)
    return np.asarray(axes * np.sqrt(variances.clip(0.0)))


def frechet_bias(variances: Array, first: int, second: int) -> float:
    """What `frechet_distance` gives on average for two samples of one Gaussian, larger than the dimension, ``(D,)``.

    To first order in 1/N: the sum of the variances, and of the covariances the second-order term of the Bures metric,
    ``sum_ij E[d_ij^2] / (2 (v_i + v_j))``, with the Wishart distribution's ``E[d_ij^2] = v_i v_j (1 + [i = j]) / N``.
    """
    positive = variances[variances > 0]
    pairs = np.outer(positive, positive) / (2.0 * np.add.outer(positive, positive))
    return float((positive.sum() + pairs.sum() + np.trace(pairs)) * (1.0 / first + 1.0 / second))


def simulated_frechet_bias(variances: Array, size: int, rng: np.random.Generator) -> float:
    """`frechet_distance` of two samples of ``size`` rows drawn from one Gaussian with these variances, ``(D,)``."""
    first, second = (rng.normal(size=(size, len(variances))) * np.sqrt(variances) for _ in range(2))
    return frechet_distance(first, second)


def mmd2(kernel: Array, first: Rows, second: Rows) -> float:
    """Unbiased squared maximum mean discrepancy (Gretton et al. 2012, eq. 3) of two sets of rows of ``(N, N)``."""
    ones = np.zeros((len(kernel), 2))
    ones[first, 0], ones[second, 1] = 1.0, 1.0
    sums = ones.T @ (kernel @ ones)
    diagonal = np.diagonal(kernel)
    n, m = len(first), len(second)
    one = (sums[0, 0] - diagonal[first].sum()) / (n * (n - 1))
    other = (sums[1, 1] - diagonal[second].sum()) / (m * (m - 1))
    return float(one + other - 2.0 * sums[0, 1] / (n * m))


def neighbourhoods(distance: Array, synthetic: Rows, real: Rows) -> tuple[float, float, float, float]:
    """Precision, recall (Kynkaanniemi et al. 2019, eq. 1), density, coverage (Naeem et al. 2020, eqs. 4 and 7).

    ``distance``: ``(N, N)`` over the rows of both samples. ``synthetic``: More than `NEAREST_DENSITY` rows.
    """
    across = distance[np.ix_(synthetic, real)]
    # The distance of each row to its k-th other, by k: its own 0 comes first.
    both = (NEAREST_PRECISION, NEAREST_DENSITY)
    of_synthetic, of_real = (np.partition(distance[np.ix_(rows, rows)], both, axis=1).T for rows in (synthetic, real))
    within = across <= of_real[NEAREST_DENSITY]
    return (
        float((across <= of_real[NEAREST_PRECISION]).any(axis=1).mean()),
        float((across <= of_synthetic[NEAREST_PRECISION][:, None]).any(axis=0).mean()),
        float(within.mean() * len(real) / NEAREST_DENSITY),
        float(within.any(axis=0).mean()),
    )
