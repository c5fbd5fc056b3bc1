"""Fidelity: how far a set is from real images, and how much of their variety it covers.

All measures are taken over the radiomic vector (`physics.features`), in the spirit of the Frechet radiomic distance
(Konz et al. 2024, arXiv 2412.01496), and over Inception's features where its weights are at hand (`inception`). What is
costly (kernel, pairwise distances) is computed once, and every measure takes that array and two sets of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from sklearn.metrics import pairwise

from busigen.errors import BusigenError
from busigen.evaluation.context import AuditContext, Better, Figure, ImageSet, SectionResult
from busigen.evaluation.fidelity import inception
from busigen.evaluation.physics import features as radiomics
from busigen.evaluation.statistics import grouped
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, Rows, adjusted
from busigen.registry import LESION_CLASSES

Array = NDArray[np.float64]

DRAWS = 100  # Draws behind an interval and behind a floor
PERMUTATIONS = {"quick": 1999, "full": 9999}  # Per test; fewer give 18 tests no adjusted p-value below ALPHA
INCEPTION_PERMUTATIONS = {"quick": 199, "full": 1999}  # Six tests, each thirty times as long
NEAREST_PRECISION = 3  # Neighbours for precision and recall (Kynkaanniemi et al. 2019, section 3.1)
NEAREST_DENSITY = 5  # Neighbours for density and coverage (Naeem et al. 2020, section 4)
_LEAST = NEAREST_DENSITY + 1  # Images that hold a neighbourhood
SMALLEST = 2 * (_LEAST + 1)  # Images a side below which there are no figures: half of them must hold a neighbourhood
CLIP = 5.0  # Greatest standardised feature: the tails of ratios such as kurtosis would otherwise decide a covariance
_TO_SIGMA = 1.349  # Interquartile range of a normal distribution in standard deviations
_INCEPTION_FEATURES = 2048
_PAPER_SIZE = 600


MEASURES: tuple[tuple[str, str, Better, str], ...] = (
    ("frechet", "Frechet distance", "lower", "squared robust standard deviations"),
    ("mmd", "MMD²", "lower", "unbiased: 0 on average between equal distributions, may be negative"),
    ("precision", "precision", "higher", f"share of synthetic within reach of a real image, k = {NEAREST_PRECISION}"),
    ("recall", "recall", "higher", f"share of real within reach of a synthetic image, k = {NEAREST_PRECISION}"),
    ("density", "density", "higher", f"real neighbourhoods around a synthetic image over k = {NEAREST_DENSITY}"),
    ("coverage", "coverage", "higher", f"share of real whose neighbourhood is visited, k = {NEAREST_DENSITY}"),
)
"""What a `comparison` computes, in order: its name, its label, which way is better, and a note for the report."""


class _Scope(NamedTuple):
    """The rows of both sets that one comparison takes."""

    name: str
    synthetic: Rows
    real: Rows


class _Space(NamedTuple):
    """Features of both sets, one row per image, and how they are compared."""

    name: str
    label: str
    synthetic: Array
    real: Array
    permutations: int
    kernel: Callable[[Array], Array]
    mmd: str


def run(context: AuditContext) -> SectionResult:
    """Figures ``fidelity.<radiomic|inception>.<all|class>.<measure>.value`` of the synthetic set against the real one.

    Only classes that both sets hold are compared, the synthetic ones thinned to the real shares for all together.
    """
    result = SectionResult("fidelity")
    scopes = _scopes(context, result)
    if not scopes:
        return result
    # Before the long part: whoever brought weights that cannot be used hears of it now.
    network = inception.try_load(context)
    real, synthetic = radiomic_vectors(context, context.real, context.synthetic)
    count = PERMUTATIONS[context.effort]
    space = _Space("radiomic", "radiomic features", synthetic, real, count, gaussian_kernel, "MMD², Gaussian kernel")
    _compare(context, space, scopes, result)
    _explain_bias(real[scopes[0].real], len(scopes[0].synthetic), context, result)
    _inception(context, network, scopes[0], result)
    return result


def radiomic_vectors(context: AuditContext, reference: ImageSet, *others: ImageSet) -> list[Array]:
    """Radiomic vectors ``(N, K)`` of the reference and of other sets, all standardised by the reference.

    Features that do not vary in the reference are left out, and values lie within `CLIP`.
    """
    tables = [radiomics.for_set(context, images) for images in (reference, *others)]
    return standardised(*(radiomics.matrix(table, tables[0]) for table in tables))


def standardised(reference: Array, *others: Array) -> list[Array]:
    """Features ``(N, D)`` as ``(N, K)``; see `radiomic_vectors`."""
    low, centre, high = np.percentile(reference, [25, 50, 75], axis=0)
    scale = (high - low) / _TO_SIGMA
    columns = np.flatnonzero(scale > 1e-12 * np.maximum(np.abs(centre), 1e-12))
    centre, scale = centre[columns], scale[columns]
    return [((values[:, columns] - centre) / scale).clip(-CLIP, CLIP) for values in (reference, *others)]


def _inception(context: AuditContext, network: inception.Network, scope: _Scope, result: SectionResult) -> None:
    """Inception's figures; weights that fail cost these figures and no others."""
    features, text = None, network.text
    try:
        features = inception.features_of(context, network)
    except inception.LOADING_ERRORS as error:
        text = inception.not_computed(error)
    result.details["inception"] = network.source if features is not None else None
    result.note(text)
    if features is None:
        return
    count = INCEPTION_PERMUTATIONS[context.effort]
    space = _Space("inception", "Inception", features.synthetic, features.real, count, polynomial_kernel, "KID")
    _compare(context, space, [scope], result)
    try:
        result.figures += inception.library_figures(features, scope.synthetic, scope.real, context)
    except BusigenError as error:
        result.note(f"FID over all images and the Inception score were not computed: {error}")


def _scopes(context: AuditContext, result: SectionResult) -> list[_Scope]:
    """All classes together, then each class of lesions, as far as they can be compared; notes say what cannot."""
    synthetic, real = context.synthetic.classes, context.real.classes
    common = [name for name in np.unique(real) if name in synthetic]
    if common:
        scopes = [_same_mix(context, common, result)]
        scopes += [
            _Scope(name, np.flatnonzero(synthetic == name), np.flatnonzero(real == name))
            for name in LESION_CLASSES
            if name in common and len(common) > 1
        ]
        if missing := sorted(set(real.tolist()) - set(common)):
            result.note(f"Not compared, because the synthetic set holds none: {', '.join(missing)}.")
    else:
        # Without classes in common, such as in a folder that names none, lesions are compared with lesions.
        rows = [np.flatnonzero(s.masks.any(axis=(1, 2))) for s in (context.synthetic, context.real)]
        scopes = [_Scope("all", rows[0], rows[1])]
        result.note(
            "The two sets have no class in common: all lesion images are compared together, "
            f"{len(rows[0])} of {len(synthetic)} synthetic and {len(rows[1])} of {len(real)} real images."
        )
    kept = []
    for scope in scopes:
        groups = context.synthetic.groups[scope.synthetic], context.real.groups[scope.real]
        sizes = f"{len(scope.synthetic)} synthetic and {len(scope.real)} real"
        if min(len(scope.synthetic), len(scope.real)) < SMALLEST:
            result.note(f"Too few images to compare ({scope.name}: {sizes}; at least {SMALLEST} a side are needed).")
        elif not grouped.divisible(*groups, _LEAST, context.rng("fidelity", "divisible", scope.name)):
            counts = f"{len(np.unique(groups[0]))} synthetic and {len(np.unique(groups[1]))} real groups"
            result.note(
                f"Too few independent images to compare ({scope.name}: {sizes} images are of {counts}): a group, such "
                "as a patient, is never divided, and whole groups do not make two samples that can be compared."
            )
        else:
            kept.append(scope)
    return kept


def _same_mix(context: AuditContext, common: list[str], result: SectionResult) -> _Scope:
    """Synthetic rows with the real set's shares of classes, as many as there can be, and the real rows."""
    synthetic, real = context.synthetic.classes, context.real.classes
    have = {name: np.flatnonzero(synthetic == name) for name in common}
    want = {name: int((real == name).sum()) for name in common}
    mixed = common

    def sizes(names: list[str]) -> dict[str, int]:
        scale = min(len(have[name]) / want[name] for name in names)
        return {name: max(round(scale * want[name]), 1) for name in names}

    while len(mixed) > 1:
        rarest = min(mixed, key=lambda name: len(have[name]) / want[name])
        others = [name for name in mixed if name != rarest]
        # A handful of one class would thin all the others to its share.
        if len(have[rarest]) >= SMALLEST or sum(sizes(others).values()) <= sum(sizes(mixed).values()):
            break
        mixed = others
        result.note(
            f"Left out where all classes are taken together: {rarest}, of which there are only {len(have[rarest])} "
            f"synthetic images ({want[rarest]} real). Keeping the real shares would have thinned the other classes to "
            "as few."
        )
    rng = context.rng("fidelity", "mix")
    rows = np.sort(np.concatenate([rng.permutation(have[name])[:size] for name, size in sizes(mixed).items()]))
    scope = _Scope("all", rows.astype(np.int64), np.flatnonzero(np.isin(real, mixed)))
    result.note(
        f"All classes together: {len(scope.synthetic)} of {len(synthetic)} synthetic and {len(scope.real)} of "
        f"{len(real)} real images were used, the synthetic ones drawn with the real set's shares of "
        f"{', '.join(mixed)}."
    )
    return scope


def _compare(context: AuditContext, space: _Space, scopes: list[_Scope], result: SectionResult) -> None:
    figures = [figure for scope in scopes for figure in _figures(context, space, scope)]
    p_values = adjusted(np.array([figure.p for figure in figures], dtype=np.float64))
    for figure, p in zip(figures, p_values, strict=True):
        judge(figure, float(p), min(figure.synthetic, figure.real), "halves of the real set", result)


def judge(
    figure: Figure, p: float, smallest: int, reference: str, result: SectionResult, *, allowed: bool = True
) -> None:
    """Add a figure, flagged where it lies beyond its floor and its adjusted ``p`` is below ``ALPHA``.

    ``smallest``: Images of the smallest side; too few are never flagged. ``reference``: What the floor comes from.
    """
    floor, value = figure.floor, figure.value.value
    assert floor is not None and floor.low is not None and floor.high is not None
    beyond = value < floor.low if figure.better == "higher" else value > floor.high
    enough = smallest >= FEWEST_TO_FLAG
    flagged = bool(beyond and enough and p < ALPHA and allowed)
    note = figure.note if enough else f"{figure.note}; fewer than {FEWEST_TO_FLAG} images: never flagged"
    result.figures.append(replace(figure, p=p, flagged=flagged, note=note))
    if flagged:
        ends = f"{floor.low:.3g} to {floor.high:.3g}"
        result.flag(f"{figure.label}: {value:.3g}, where {reference} give {ends} (p = {p:.2g}).", figure.key)


def _figures(context: AuditContext, space: _Space, scope: _Scope) -> list[Figure]:
    """One figure per measure; ``p`` is not adjusted yet."""
    groups = context.synthetic.groups[scope.synthetic], context.real.groups[scope.real]
    count = len(scope.synthetic)
    compare = comparison(np.concatenate([space.synthetic[scope.synthetic], space.real[scope.real]]), space.kernel)
    size = grouped.matched_size(*groups)
    rng = context.rng("fidelity", space.name, scope.name)
    values = [compare(a, b + count) for a, b in grouped.draws(*groups, size, rng, DRAWS)]
    floors = [compare(a + count, b + count) for a, b in grouped.disjoint_draws(groups[1], size, rng, DRAWS, _LEAST)]
    observed = compare(np.arange(count), np.arange(count, count + len(scope.real)))
    # Greater values speak against the synthetic set.
    signs = np.array([-1.0 if better == "higher" else 1.0 for _, _, better, _ in MEASURES])
    beyond = np.zeros(len(MEASURES))
    rounds = grouped.permutations(*groups, rng, space.permutations, _LEAST)
    for a, b in context.track(f"testing {space.label}, {scope.name}", rounds, space.permutations):
        beyond += signs * compare(a, b) >= signs * observed
    p_values = (beyond + 1) / (space.permutations + 1)
    figures = []
    for k, (name, label, better, note) in enumerate(MEASURES):
        key = f"fidelity.{space.name}.{scope.name}.{name}.value"
        label = f"{space.mmd if name == 'mmd' else label}, {space.label}, {scope.name}"
        value, floor = (grouped.middle([found[k] for found in draws]) for draws in (values, floors))
        figure = Figure(key, label, value, floor, count, len(scope.real), better, p=float(p_values[k]))
        headline = scope.name == "all" and name in ("frechet", "mmd", "precision", "recall")
        note = f"{note}; value and floor between samples of {size} images a side"
        figures.append(replace(figure, headline=headline, note=note))
    return figures


def _explain_bias(real: Array, synthetic_size: int, context: AuditContext, result: SectionResult) -> None:
    """Say in figures why a Frechet distance means little without the sample's size."""
    rng = context.rng("fidelity", "bias")
    variances = np.linalg.eigvalsh(np.cov(real, rowvar=False)).clip(0.0)
    size = min(synthetic_size, len(real)) // 2
    expected = frechet_bias(variances, size, size)
    flat, falling = np.ones(_INCEPTION_FEATURES), 1.0 / np.arange(1, _INCEPTION_FEATURES + 1)
    shares = [simulated_frechet_bias(v, _PAPER_SIZE, rng) / v.sum() for v in (flat, falling)]
    result.details["frechet_bias"] = {
        "features": len(variances),
        "size": size,
        "closed_form": expected,
        "closed_form_full": frechet_bias(variances, synthetic_size, len(real)),
        "simulated": float(np.mean([simulated_frechet_bias(variances, size, rng) for _ in range(10)])),
        "inception_share_flat": shares[0],
        "inception_share_falling": shares[1],
    }
    result.note(
        "A Frechet distance is never 0 between two finite samples of one and the same distribution: their estimated "
        f"means and covariances differ. For these {len(variances)} features and {size} images a side it is "
        f"{expected:.2g} on average for Gaussians (closed form, first order in 1/N), and it falls as 1/N: figures of "
        "sets of different sizes cannot be compared, so value and floor are taken at one size here. FID is worse "
        f"off: with {_PAPER_SIZE} images its 2,048 x 2,048 covariances have rank {_PAPER_SIZE - 1}, and two samples of "
        f"one distribution lie {shares[1]:.0%} (variances falling as 1/j) to {shares[0]:.0%} (equal variances) of the "
        "features' total variance apart, by simulation. MMD (KID) is unbiased and has no such term (Binkowski et al. "
        "2018, Chong and Forsyth 2020).",
        *(figure.key for figure in result.figures if figure.key.endswith("all.frechet.value")),
    )


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
