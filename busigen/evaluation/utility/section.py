"""Utility: Dice and F1 of networks trained with and without the set, their gains, and what of it is a defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from busigen.evaluation.context import CLEAN, AuditContext, Better, Figure, ImageSet, Interval, SectionResult
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, Rows, adjusted, bootstrap, permutation_p
from busigen.evaluation.utility import training
from busigen.evaluation.utility.training import ADDED, ALONE, ARMS, CLASSIC, REAL, Counts, Outcome, Split, dice

SECTION = "utility"

HARM = 0.05  # Loss of Dice through *added* synthetic images that is a defect; smaller ones come with the seed
FAILURE = 0.10  # Loss of Dice with synthetic *instead of* real images that is a defect: two readers differ so
OFFSET = 1.5  # Median displacement in pixels, beyond the real set's, that is a defect; about one of the quick network's
LEARNT = 0.3  # Least mean Dice of a network that knows lesions; a box of a third of the image reaches as much
NEAR = 0.3  # Least Dice at which prediction and mask mean the same lesion, so that their displacement means something
FALSE_POSITIVE_AREA = 0.003  # Share of a normal image that a prediction must cover: that of BUSI's smallest lesion

PERMUTATIONS = 999

Floats = NDArray[np.float64]


def run(context: AuditContext) -> SectionResult:
    """Train the arms of `training.ARMS` with equal optimiser steps and test all of them on the same real images.

    With ``context.train``, those images train and all of ``real`` tests; else group folds of ``real``. Besides, the
    network trained on real images alone segments the synthetic ones. Every training is kept under the section's folder.
    """
    result = SectionResult(SECTION)
    context = context.without_overlays()
    synthetic, lesions = (int(part.masks.any(axis=(1, 2)).sum()) for part in (context.synthetic, context.real))
    if not synthetic or lesions < 2:
        result.note(f"Not run: it takes synthetic and real lesions, and there are {synthetic} and {lesions}.")
        return result
    parts, notes = training.splits(context, synthetic)
    if not parts or not all(len(part.train) for part in parts):
        result.note(" ".join(notes))
        return result
    smallest = min(len(part.train) for part in parts)
    arms, left_out = training.arms_for(context, smallest, synthetic)
    found = training.outcomes(context, parts, arms)
    figures = _arm_figures(context, found, parts, smallest) + probe_figures(context, found, parts)
    # A yardstick that measures nothing must accuse nobody.
    lesion = np.asarray(context.real.masks.any(axis=(1, 2)))
    tests = {part.name: lesion[part.test] for part in parts}
    scores = [dice(one.test[tests[one.split]]) for one in found if one.arm == REAL]
    weak = sum(len(part) > 0 and float(part.mean()) < LEARNT for part in scores)
    flagged(figures, result, trusted=not weak)
    if weak:
        result.note(
            f"{weak} of the trainings on real images did not learn to find lesions (Dice below {LEARNT}), for want of "
            "images or steps, so nothing is flagged."
        )
    for text in (*notes, *left_out, CLEAN):
        result.note(text)
    images, labels = {part.name: len(part.train) for part in parts}, {arm.name: arm.label for arm in arms}
    seeds = training.EXTENTS[context.effort].seeds
    result.details["experiment"] = {"training_images": images, "seeds": seeds, "arms": labels}
    return result


def flagged(figures: list[Figure], result: SectionResult, *, trusted: bool = True) -> None:
    """Adjust p-values and add figures and findings to the result; only ``trusted`` networks' defects are flagged."""
    p_values = adjusted(np.array([np.nan if figure.p is None else figure.p for figure in figures]))
    for figure, p in zip(figures, p_values, strict=True):
        enough = min(figure.synthetic, figure.real) >= FEWEST_TO_FLAG
        text = _defect(figure) if trusted and enough and p < ALPHA else None
        result.figures.append(replace(figure, p=None if np.isnan(p) else float(p), flagged=text is not None))
        if text is not None:
            result.flag(text, figure.key)


def _defect(figure: Figure) -> str | None:
    """What a figure accuses the set of; None where it is no defect, or none of the figures that can be."""
    value, high, floor, key = figure.value.value, figure.value.high, figure.floor, figure.key
    low = None if floor is None else floor.low
    # What another seed alone makes an arm lose is no defect.
    by_chance = 0.0 if low is None else low
    if key == f"{SECTION}.{ADDED}.gain_over_{REAL}" and value < min(-HARM, by_chance):
        return f"Added to real training images, the set makes the network worse: Dice {value:+.3f}."
    if key == f"{SECTION}.{ALONE}.gain_over_{REAL}" and high is not None and high < min(-FAILURE, by_chance):
        return f"A network trained on the set alone fails on real images: its Dice is {-value:.3f} lower."
    if floor is None:
        return None
    if key == f"{SECTION}.masks.dice" and low is not None and value < low:
        return (
            f"A network trained on real images agrees less with this set's masks (Dice {value:.2f}) than with those of "
            f"real images that it has not seen either ({floor.value:.2f}): masks and images do not fit."
        )
    if key.startswith(f"{SECTION}.masks.offset_") and abs(value - floor.value) >= OFFSET:
        return (
            f"{figure.label}: {value:+.1f} px, {floor.value:+.1f} px in real images. "
            "Masks are shifted, or the lesions lie elsewhere than their masks say: faint, or lost in their own shadow."
        )
    return None


def _arm_figures(context: AuditContext, found: list[Outcome], parts: list[Split], train: int) -> list[Figure]:
    """All figures of all arms, p-values not yet adjusted. ``train``: Real training images."""
    tests = {part.name: part.test for part in parts}
    scores: dict[str, list[Counts]] = {}
    seeds: dict[tuple[str, int], Counts] = {}
    for one in found:
        if (one.arm, one.seed) not in seeds:
            seeds[one.arm, one.seed] = np.full((len(context.real), 3), -1, np.int64)
            scores.setdefault(one.arm, []).append(seeds[one.arm, one.seed])
        seeds[one.arm, one.seed][tests[one.split]] = one.test
    tested = np.unique(np.concatenate(list(tests.values())))
    figures = _on(context, scores, context.real, tested, train, external=False)
    if context.external is not None and len(context.external):
        outside = {name: [one.external for one in found if one.arm == name] for name in scores}
        figures += _on(context, outside, context.external, np.arange(len(context.external)), train, external=True)
    return figures


def _on(
    context: AuditContext, scores: dict[str, list[Counts]], real: ImageSet, tested: Rows, train: int, external: bool
) -> list[Figure]:
    """Every arm's figures on one test set. ``scores``: Counts of each arm on every image, an array per seed."""
    lesion = np.asarray(real.masks.any(axis=(1, 2)))
    rows, normals = tested[lesion[tested]], tested[~lesion[tested]]
    if not len(rows):
        return []
    prefix, words = (f"{SECTION}.external.", "external: ") if external else (f"{SECTION}.", "")
    floor = _seed_floor(scores[REAL], rows, real.groups[rows], context.rng(SECTION, prefix, "floor"))
    figures: list[Figure] = []
    lesions = int(context.synthetic.masks.any(axis=(1, 2)).sum())
    least = FALSE_POSITIVE_AREA * training.RECIPES[context.effort].side ** 2
    averages = {name: np.mean([dice(counts) for counts in seeds], axis=0) for name, seeds in scores.items()}
    rngs = {name: context.rng(SECTION, prefix, name) for name in scores}
    alone = "To be compared with the arm 'real': between halves of a set there is no such figure."

    def add(
        arm: str, key: str, label: str, statistic: Callable[[Rows], float], members: Rows, after: str = "", **more: Any
    ) -> None:
        value = bootstrap(statistic, rngs[arm], real.groups[members])
        key, label = f"{prefix}{arm}.{key}", f"{label}, {words}{ARMS[arm].label}{after}"
        synthetic = min(round(ARMS[arm].synthetic * train), lesions)
        figure = Figure(key, label, value, None, synthetic, len(members), better="higher", note=alone)
        figures.append(replace(figure, **more))

    for name, seeds in scores.items():
        mine = averages[name]
        add(name, "dice", "Dice", mean_of(mine[rows]), rows, headline=not external and name == REAL)
        add(name, "f1", "Pooled F1 of lesion images", f1_of([counts[rows] for counts in seeds]), rows)
        for stratum, members in strata(real, rows).items():
            add(name, f"{stratum.replace(' ', '_')}.dice", "Dice", mean_of(mine[members]), members, f", {stratum}")
        for reference in (REAL, CLASSIC):
            if reference in scores and name not in (REAL, reference):
                difference = (mine - averages[reference])[rows]
                about: dict[str, Any] = {
                    "floor": floor,
                    "p": grouped_wilcoxon(difference, real.groups[rows]),
                    "headline": not external and reference == REAL and name in (ADDED, ALONE, CLASSIC),
                    "note": "The floor is what another seed alone changes. P by paired Wilcoxon over groups.",
                }
                key, label = f"gain_over_{reference}", f"Dice gained over '{ARMS[reference].label}'"
                add(name, key, label, mean_of(difference), rows, **about)
        if len(normals):
            share = mean_of(np.mean([counts[normals, 1] >= least for counts in seeds], axis=0), scale=100.0)
            key, label = "normals.false_positives", "Normals with a false lesion"
            add(name, key, label, share, normals, unit="%", better="lower")
    return figures


def mean_of(values: Floats, *, scale: float = 1.0) -> Callable[[Rows], float]:
    """The mean of some rows of ``values``, times ``scale``."""
    return lambda rows: scale * float(values[rows].mean())


def f1_of(seeds: list[Counts]) -> Callable[[Rows], float]:
    """The pooled F1 of some rows, averaged over seeds."""
    return lambda rows: float(np.mean([training.pooled_f1(counts[rows]) for counts in seeds]))


def strata(real: ImageSet, rows: Rows) -> dict[str, Rows]:
    """Test lesions per class, and by thirds of lesion area."""
    area = np.asarray(real.masks[rows].sum(axis=(1, 2)), np.float64)
    third = np.searchsorted(np.quantile(area, [1 / 3, 2 / 3]), area)
    by_class = {str(name): rows[real.classes[rows] == name] for name in np.unique(real.classes[rows])}
    by_size = {name: rows[third == k] for k, name in enumerate(("small lesions", "medium lesions", "large lesions"))}
    return {name: members for name, members in {**by_class, **by_size}.items() if len(members)}


def _seed_floor(seeds: list[Counts], rows: Rows, groups: Rows, rng: np.random.Generator) -> Interval | None:
    """What another seed changes: zero, plus and minus the largest end of any seed pair's interval."""
    ends = []
    for first, second in combinations(seeds, 2):
        span = bootstrap(mean_of((dice(second) - dice(first))[rows]), rng, groups)
        ends += [abs(span.low or 0.0), abs(span.high or 0.0)]
    return Interval(0.0, -max(ends), max(ends)) if ends else None


def grouped_wilcoxon(differences: Floats, groups: Rows) -> float:
    """P-value of the paired Wilcoxon test on each group's mean difference; 1 where there is none at all."""
    _, code = np.unique(groups, return_inverse=True)
    means = np.bincount(code, differences) / np.bincount(code)
    # Zeros count half for either sign.
    return float(wilcoxon(means, zero_method="zsplit").pvalue) if means.any() else 1.0


def probe_figures(context: AuditContext, found: list[Outcome], parts: list[Split]) -> list[Figure]:
    """Dice and displacement on the synthetic images, against the same on real images that the network has not seen.

    Only classes that both sides have count, each with the same weight. P-values exchange whole groups between both
    sides and are not yet adjusted.
    """
    synthetic, real = context.synthetic.with_lesions(), context.real
    mine = [one for one in found if one.arm == REAL]
    # Columns: Dice, and the offsets down and to the right; NaN where no network tested or found the lesion.
    on_real = np.full((len(real), 3), np.nan)
    for part in parts:
        on_real[part.test] = _scores([(one.test, one.offsets) for one in mine if one.split == part.name])
    on_synthetic = _scores([(one.synthetic, one.synthetic_offsets) for one in mine])
    common = sorted(set(real.classes.tolist()) & set(synthetic.classes.tolist()))
    sides = []
    for images, scores in ((real, on_real), (synthetic, on_synthetic)):
        usable = images.masks.any(axis=(1, 2)) & (np.isin(images.classes, common) | (not common))
        classes = np.searchsorted(common, images.classes) if common else np.zeros(len(images), np.int64)
        sides.append((scores[usable], classes[usable], images.groups[usable]))
    figures: list[Figure] = []

    def add(column: int, name: str, label: str, statistic: Callable[[Floats, Rows], float]) -> None:
        first, second = (
            (scores[known, column], classes[known], groups[known])
            for scores, classes, groups in sides
            for known in [~np.isnan(scores[:, column])]
        )
        count = len(first[0])
        if min(count, len(second[0])) < 2:
            return
        values, labels = (np.concatenate([first[k], second[k]]) for k in (0, 1))

        def of(rows: Rows) -> float:
            return statistic(values[rows], labels[rows])

        rng = context.rng(SECTION, "masks", name)
        floor = bootstrap(of, rng, first[2])
        value = bootstrap(lambda rows: of(rows + count), rng, second[2])
        p = permutation_p(lambda a, b: abs(of(a) - of(b)), first[2], second[2], rng, PERMUTATIONS)
        note = (
            "The network trained on real images segments synthetic ones; the floor is the same on held-out real images."
        )
        better: Better = "higher" if name == "dice" else "near"
        key, unit, counts = f"{SECTION}.masks.{name}", "" if name == "dice" else "px", (len(second[0]), count)
        figure = Figure(key, label, value, floor, *counts, better, unit, p, headline=name == "dice", note=note)
        figures.append(figure)

    def median(values: Floats, labels: Rows) -> float:
        return float(np.median(values))

    add(0, "dice", "Agreement of a real-trained network with the masks", _balanced_mean)
    add(1, "offset_y", "Downward offset of that network from the masks", median)
    add(2, "offset_x", "Rightward offset of that network from the masks", median)
    return figures


def _scores(tested: list[tuple[Counts, Floats]]) -> Floats:
    """``(N, 3)``: Dice averaged over networks, and offsets over those that found the lesion, NaN where none did."""
    overlaps = [dice(counts) for counts, _ in tested]
    stack = np.stack([np.where((d >= NEAR)[:, None], o, np.nan) for d, (_, o) in zip(overlaps, tested, strict=True)])
    known = (~np.isnan(stack)).sum(axis=0)
    offsets = np.where(known > 0, np.nansum(stack, axis=0) / np.maximum(known, 1), np.nan)
    return np.column_stack([np.mean(overlaps, axis=0), offsets])


def _balanced_mean(values: Floats, labels: Rows) -> float:
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))
