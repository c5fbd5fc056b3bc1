"""Fidelity: how far a set is from real images, and how much of their variety it covers.

The default needs no neural weights: all measures are taken over the radiomic vector (`radiomics.features`), in the
spirit of the Frechet radiomic distance (Konz et al. 2024, arXiv 2412.01496). Every feature is standardised by the
median and interquartile range of the real set and cut at five robust standard deviations (`metrics.Standardiser`).
Inception's features are compared in the same way where its weights are at hand (`inception`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from busigen.errors import BusigenError
from busigen.evaluation.context import AuditContext
from busigen.evaluation.fidelity import inception
from busigen.evaluation.fidelity.metrics import (
    MEASURES,
    NEAREST_DENSITY,
    Array,
    Comparison,
    Measure,
    Standardiser,
    frechet_bias,
    gaussian_kernel,
    polynomial_kernel,
    simulated_frechet_bias,
)
from busigen.evaluation.physics import features as radiomics
from busigen.evaluation.results import Figure, SectionResult
from busigen.evaluation.statistics import grouped as matched
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, Rows, adjusted
from busigen.registry import LESION_CLASSES

DRAWS = 100
"""Draws behind an interval and behind a floor."""

PERMUTATIONS = {"quick": 1999, "full": 9999}
"""Group permutations per test. With 18 tests, fewer could not get one adjusted p-value below ``ALPHA``."""

INCEPTION_PERMUTATIONS = {"quick": 199, "full": 1999}
"""The same for Inception's 2,048 features: six tests, and a permutation takes thirty times as long."""

SMALLEST = 2 * (NEAREST_DENSITY + 2)
"""Images a side below which there are no figures: half of them must hold a neighbourhood."""

_INCEPTION_FEATURES = 2048
_PAPER_SIZE = 600


@dataclass(frozen=True)
class _Space:
    """Features of both sets, one row per image."""

    name: str
    label: str
    synthetic: Array
    real: Array
    permutations: int
    kernel: Callable[[Array], Array] = gaussian_kernel
    mmd: str = "MMD², Gaussian kernel"


@dataclass(frozen=True)
class _Scope:
    """The rows of both sets that one comparison takes."""

    name: str
    synthetic: Rows
    real: Rows


def run(context: AuditContext) -> SectionResult:
    """Judge the synthetic set against the real one.

    Args:
        context: The audit. Only classes that both sets hold are compared, the synthetic ones thinned to the real shares
            where all classes are taken together: a set may hold as many of a class as it likes.

    Returns:
        Figures ``fidelity.<radiomic|inception>.<all|class>.<measure>.value``.
    """
    result = SectionResult("fidelity")
    scopes = _scopes(context, result)
    if scopes:
        # Before the long part: whoever brought weights that cannot be used hears of it now.
        weights = inception.try_load(context)
        radiomic = _radiomic(context)
        _compare(context, radiomic, scopes, result)
        _explain_bias(radiomic.real[scopes[0].real], len(scopes[0].synthetic), len(scopes[0].real), context, result)
        _inception(context, weights, scopes[0], result)
    return result


def _inception(context: AuditContext, weights: inception.Network, scope: _Scope, result: SectionResult) -> None:
    """Inception's figures; weights that fail cost these figures and no others."""
    try:
        network = inception.features_of(context, weights)
    except inception.LOADING_ERRORS as error:
        network = inception.Inception(None, inception.not_computed(error))
    result.details["inception"] = network.source
    result.note(network.text)
    if network.synthetic is None or network.real is None:
        return
    count = INCEPTION_PERMUTATIONS[context.effort]
    space = _Space("inception", "Inception", network.synthetic, network.real, count, polynomial_kernel, "KID")
    _compare(context, space, [scope], result)
    try:
        result.figures += inception.library_figures(network, scope.synthetic, scope.real, context)
    except BusigenError as error:
        result.note(f"FID over all images and the Inception score were not computed: {error}")


def _scopes(context: AuditContext, result: SectionResult) -> list[_Scope]:
    synthetic, real = context.synthetic.classes, context.real.classes
    common = [name for name in np.unique(real) if name in synthetic]
    if not common:
        # Without classes in common, such as in a folder that names none, lesions are compared with lesions.
        rows = [np.flatnonzero(s.masks.reshape(len(s), -1).any(axis=1)) for s in (context.synthetic, context.real)]
        scopes = [_Scope("all", rows[0], rows[1])]
        result.note(
            "The two sets have no class in common: all lesion images are compared together, "
            f"{len(rows[0])} of {len(synthetic)} synthetic and {len(rows[1])} of {len(real)} real images."
        )
    else:
        scopes = [_same_mix(context, common, result)]
        scopes += [
            _Scope(name, np.flatnonzero(synthetic == name), np.flatnonzero(real == name))
            for name in LESION_CLASSES
            if name in common and len(common) > 1
        ]
    missing = sorted(set(real.tolist()) - set(common))
    if common and missing:
        result.note(f"Not compared, because the synthetic set holds none: {', '.join(missing)}.")
    kept = []
    for scope in scopes:
        groups = context.synthetic.groups[scope.synthetic], context.real.groups[scope.real]
        sizes = f"{len(scope.synthetic)} synthetic and {len(scope.real)} real"
        if min(len(scope.synthetic), len(scope.real)) < SMALLEST:
            result.note(f"Too few images to compare ({scope.name}: {sizes}; at least {SMALLEST} a side are needed).")
        elif not matched.divisible(*groups, NEAREST_DENSITY + 1, context.rng("fidelity", "divisible", scope.name)):
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


def _radiomic(context: AuditContext) -> _Space:
    tables = [radiomics.for_set(context, images) for images in (context.synthetic, context.real)]
    synthetic, real = (radiomics.matrix(table, tables[1]) for table in tables)
    standardise = Standardiser.fit(real)
    return _Space(
        "radiomic", "radiomic features", standardise(synthetic), standardise(real), PERMUTATIONS[context.effort]
    )


def _compare(context: AuditContext, space: _Space, scopes: list[_Scope], result: SectionResult) -> None:
    figures: list[tuple[Measure, Figure]] = []
    for scope in scopes:
        figures += _figures(context, space, scope)
    known = adjusted(np.array([np.nan if figure.p is None else figure.p for _, figure in figures]))
    for (measure, figure), p in zip(figures, known, strict=True):
        floor = figure.floor
        assert floor is not None and floor.low is not None and floor.high is not None
        value = figure.value.value
        beyond = value < floor.low if measure.better == "higher" else value > floor.high
        enough = min(figure.synthetic, figure.real) >= FEWEST_TO_FLAG
        flagged = bool(beyond and enough and p < ALPHA)
        note = figure.note if enough else f"{figure.note}; fewer than {FEWEST_TO_FLAG} images: never flagged"
        figure = replace(figure, p=float(p), flagged=flagged, note=note)
        result.figures.append(figure)
        if flagged:
            result.flag(
                f"{figure.label}: {value:.3g}, where halves of the real set give {floor.low:.3g} to {floor.high:.3g} "
                f"(p = {p:.2g}).",
                figure.key,
            )


def _figures(context: AuditContext, space: _Space, scope: _Scope) -> list[tuple[Measure, Figure]]:
    """One figure per measure; ``p`` is not adjusted yet."""
    groups = context.synthetic.groups[scope.synthetic], context.real.groups[scope.real]
    count = len(scope.synthetic)
    comparison = Comparison(np.concatenate([space.synthetic[scope.synthetic], space.real[scope.real]]), space.kernel)
    size = matched.matched_size(*groups)
    rng = context.rng("fidelity", space.name, scope.name)
    generated = [comparison(a, b + count) for a, b in matched.draws(*groups, size, rng, DRAWS)]
    # Smaller samples hold no neighbourhood.
    least = NEAREST_DENSITY + 1
    halves = matched.disjoint_draws(groups[1], size, rng, DRAWS, least)
    floors = [comparison(a + count, b + count) for a, b in halves]
    observed = comparison(np.arange(count), np.arange(count, count + len(scope.real)))
    beyond = np.zeros(len(MEASURES))
    signs = np.array([measure.sign for measure in MEASURES])
    rounds = matched.permutations(*groups, rng, space.permutations, least)
    for a, b in context.track(f"testing {space.label}, {scope.name}", rounds, space.permutations):
        beyond += signs * comparison(a, b) >= signs * observed
    p_values = (beyond + 1) / (space.permutations + 1)
    return [
        (
            measure,
            Figure(
                key=f"fidelity.{space.name}.{scope.name}.{measure.name}.value",
                label=f"{space.mmd if measure.name == 'mmd' else measure.label}, {space.label}, {scope.name}",
                value=matched.middle([found[k] for found in generated]),
                floor=matched.middle([found[k] for found in floors]),
                synthetic=count,
                real=len(scope.real),
                better=measure.better,
                p=float(p_values[k]),
                headline=scope.name == "all" and measure.name in ("frechet", "mmd", "precision", "recall"),
                note=f"{measure.note}; value and floor between samples of {size} images a side",
            ),
        )
        for k, measure in enumerate(MEASURES)
    ]


def _explain_bias(
    real: Array, synthetic_size: int, real_size: int, context: AuditContext, result: SectionResult
) -> None:
    """Say in figures why a Frechet distance means little without the sample's size."""
    rng = context.rng("fidelity", "bias")
    variances = np.linalg.eigvalsh(np.cov(real, rowvar=False)).clip(0.0)
    size = min(synthetic_size, real_size) // 2
    expected = frechet_bias(variances, size, size)
    flat, falling = np.ones(_INCEPTION_FEATURES), 1.0 / np.arange(1, _INCEPTION_FEATURES + 1)
    shares = [simulated_frechet_bias(v, _PAPER_SIZE, rng) / v.sum() for v in (flat, falling)]
    result.details["frechet_bias"] = {
        "features": len(variances),
        "size": size,
        "closed_form": expected,
        "closed_form_full": frechet_bias(variances, synthetic_size, real_size),
        "simulated": float(np.mean([simulated_frechet_bias(variances, size, rng) for _ in range(10)])),
        "inception_share_flat": shares[0],
        "inception_share_falling": shares[1],
    }
    keys = (f.key for f in result.figures if f.key.endswith("all.frechet.value"))
    result.note(
        "A Frechet distance is never 0 between two finite samples of one and the same distribution: their estimated "
        f"means and covariances differ. For these {len(variances)} features and {size} images a side it is "
        f"{expected:.2g} on average for Gaussians (closed form, first order in 1/N), and it falls as 1/N: figures of "
        "sets of different sizes cannot be compared, so value and floor are taken at one size here. FID is worse "
        f"off: with {_PAPER_SIZE} images its 2,048 x 2,048 covariances have rank {_PAPER_SIZE - 1}, and two samples of "
        f"one distribution lie {shares[1]:.0%} (variances falling as 1/j) to {shares[0]:.0%} (equal variances) of the "
        "features' total variance apart, by simulation. MMD (KID) is unbiased and has no such term (Binkowski et al. "
        "2018, Chong and Forsyth 2020).",
        *keys,
    )
