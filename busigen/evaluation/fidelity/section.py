"""Fidelity: how far a set is from real images, and how much of their variety it covers.

All `measures` are taken over the radiomic vector (`physics.features`), in the spirit of the Frechet radiomic distance
(Konz et al. 2024, arXiv 2412.01496), and over Inception's features where its weights are at hand (`inception`); the MMD
also over `coarse` structure. The published distance is computed where its authors' package is there (`frd`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from busigen.errors import BusigenError
from busigen.evaluation.context import CLEAN, AuditContext, Figure, ImageSet, Interval, SectionResult
from busigen.evaluation.fidelity import frd, inception
from busigen.evaluation.fidelity.measures import (
    FRD,
    MEASURES,
    MMD,
    NEAREST_DENSITY,
    Array,
    Measure,
    comparison,
    frd_alone,
    frechet_bias,
    mmd_alone,
    polynomial_kernel,
    simulated_frechet_bias,
    standardised,
)
from busigen.evaluation.physics import features as radiomics
from busigen.evaluation.statistics import grouped
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, Rows, adjusted
from busigen.registry import LESION_CLASSES

DRAWS = 100  # Draws behind an interval and behind a floor
PERMUTATIONS = {"quick": 1999, "full": 9999}  # Per test; fewer give 18 tests no adjusted p-value below ALPHA
INCEPTION_PERMUTATIONS = {"quick": 199, "full": 1999}  # Six tests, each thirty times as long
_LEAST = NEAREST_DENSITY + 1  # Images that hold a neighbourhood
SMALLEST = 2 * (_LEAST + 1)  # Images a side below which there are no figures: half of them must hold a neighbourhood
_INCEPTION_FEATURES = 2048
_PAPER_SIZE = 600


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
    compare: Callable[[Array], Callable[[Rows, Rows], Array]]
    mmd: str = "MMD²"
    measures: tuple[Measure, ...] = MEASURES


def run(context: AuditContext) -> SectionResult:
    """Figures ``fidelity.<space>.<all|class>.<measure>.value`` of the synthetic set against the real one.

    Spaces: ``radiomic``, by class as well; ``coarse``, ``coarse_contrast_removed``, ``frd`` and ``inception``.

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
    space = _Space("radiomic", "radiomic features", synthetic, real, count, comparison, "MMD², Gaussian kernel")
    _compare(context, space, scopes, result)
    _explain_bias(real[scopes[0].real], len(scopes[0].synthetic), context, result)
    _coarse(context, scopes[0], result)
    _frd(context, scopes[0], result)
    _inception(context, network, scopes[0], result)
    return result


def radiomic_vectors(context: AuditContext, reference: ImageSet, *others: ImageSet) -> list[Array]:
    """Radiomic vectors ``(N, K)`` of the reference and of other sets, all standardised by the reference.

    Features that do not vary in the reference are left out, and values lie within `CLIP`.
    """
    tables = [radiomics.for_set(context, images) for images in (reference, *others)]
    return standardised(*(radiomics.matrix(table, tables[0]) for table in tables))


def _coarse(context: AuditContext, scope: _Scope, result: SectionResult) -> None:
    """MMD of the coarse structure, as it is and with every image's mean and contrast taken out."""
    from busigen.evaluation.fidelity import coarse
    from busigen.evaluation.realness.classifiers import VIEWS

    clean = context.without_overlays()
    synthetic, real = (VIEWS["coarse"].of(images) for images in (clean.synthetic, clean.real))
    joint = np.concatenate([synthetic, real])
    used = np.concatenate([scope.synthetic, len(synthetic) + scope.real])
    count = PERMUTATIONS[context.effort]
    for name, label, pixels in (
        ("coarse", "coarse structure", joint),
        ("coarse_contrast_removed", "coarse structure, contrast removed", coarse.without_contrast(joint)),
    ):
        # Axes of both sets together, so that exchanging images between them changes nothing but the sides.
        space = coarse.Space(pixels[used])
        sides = np.split(_placed(space.fitted, used, len(pixels)), [len(synthetic)])
        compare = partial(mmd_alone, kernel=space.kernel)
        _compare(context, _Space(name, label, sides[0], sides[1], count, compare, measures=MMD), [scope], result)
    result.note(
        "Coarse structure: images at 64 x 48 pixels, where speckle is averaged away and skin, fat, fascia and muscle "
        f"are not; the first {coarse.AXES} axes of the classifier's scattering features, fitted on both sets together. "
        f"{CLEAN}",
        *(figure.key for figure in result.figures if figure.key.startswith("fidelity.coarse")),
    )


def _placed(values: Array, rows: Rows, count: int) -> Array:
    """Rows of a scope in their places among all of a set, ``(count, D)``."""
    placed = np.zeros((count, values.shape[1]))
    placed[rows] = values
    return placed


def _frd(context: AuditContext, scope: _Scope, result: SectionResult) -> None:
    """FRD where its authors' package is there, as published, and between samples of one size, which has a floor."""
    if not frd.is_there():
        result.note(frd.ABSENT)
        return
    clean = context.without_overlays()
    try:
        real, synthetic = (
            frd.features(context, images.take(rows))
            for images, rows in ((clean.real, scope.real), (clean.synthetic, scope.synthetic))
        )
    except frd.ERRORS as error:
        result.note(f"FRD was not computed: {(str(error).splitlines() or [type(error).__name__])[0]}")
        return
    found = frd.standardised(real, synthetic)
    places = (found[1], scope.synthetic, len(context.synthetic)), (found[0], scope.real, len(context.real))
    sides = [_placed(*place) for place in places]
    count = INCEPTION_PERMUTATIONS[context.effort]
    space = _Space("frd", "at one size", sides[0], sides[1], count, frd_alone, measures=FRD)
    _compare(context, space, [scope], result)
    value = float(frd_alone(np.concatenate(found))(*np.split(np.arange(len(real) + len(synthetic)), [len(real)]))[0])
    note = "as published, which grows with few images, so no floor: judge by FRD between samples of one size"
    key, counts = "fidelity.frd.all.frd.all_images", (len(synthetic), len(real))
    result.figures.append(Figure(key, "FRD over all images", Interval(value), None, *counts, note=note))
    result.note(
        f"FRD (Konz et al., arXiv 2412.01496), by its authors' package frd-score {version('frd-score')}: "
        f"{found[0].shape[1]} features of whole images. {CLEAN}",
        key,
    )


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
    compare = partial(comparison, kernel=polynomial_kernel)
    space = _Space("inception", "Inception", features.synthetic, features.real, count, compare, "KID")
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
    rows = np.concatenate([space.synthetic[scope.synthetic], space.real[scope.real]])
    compare = space.compare(rows)
    size = grouped.matched_size(*groups)
    rng = context.rng("fidelity", space.name, scope.name)
    values = [compare(a, b + count) for a, b in grouped.draws(*groups, size, rng, DRAWS)]
    floors = [compare(a + count, b + count) for a, b in grouped.disjoint_draws(groups[1], size, rng, DRAWS, _LEAST)]
    observed = compare(np.arange(count), np.arange(count, count + len(scope.real)))
    # Greater values speak against the synthetic set.
    signs = np.array([-1.0 if better == "higher" else 1.0 for _, _, better, _ in space.measures])
    beyond = np.zeros(len(space.measures))
    rounds = grouped.permutations(*groups, rng, space.permutations, _LEAST)
    for a, b in context.track(f"testing {space.label}, {scope.name}", rounds, space.permutations):
        beyond += signs * compare(a, b) >= signs * observed
    p_values = (beyond + 1) / (space.permutations + 1)
    figures = []
    for k, (name, label, better, note) in enumerate(space.measures):
        key = f"fidelity.{space.name}.{scope.name}.{name}.value"
        label = f"{space.mmd if name == 'mmd' else label}, {space.label}, {scope.name}"
        value, floor = (grouped.middle([found[k] for found in draws]) for draws in (values, floors))
        figure = Figure(key, label, value, floor, count, len(scope.real), better, p=float(p_values[k]))
        headline = scope.name == "all" and name in ("frechet", "mmd", "precision", "recall", "frd")
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
