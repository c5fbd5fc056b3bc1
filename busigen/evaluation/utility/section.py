"""Utility: Dice and F1 of networks trained with and without the set, their gains, and what of it is a defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from busigen.evaluation.context import CLEAN, AuditContext, ImageSet
from busigen.evaluation.results import Figure, Interval, SectionResult
from busigen.evaluation.statistics.grouped import (
    ALPHA,
    FEWEST_TO_FLAG,
    Rows,
    adjusted,
    bootstrap,
    permutation_p,
)
from busigen.evaluation.utility.training import (
    ADDED,
    ALONE,
    ARMS,
    CLASSIC,
    EXTENTS,
    REAL,
    RECIPES,
    Counts,
    Outcome,
    Split,
    arms_for,
    dice,
    outcomes,
    pooled_f1,
    splits,
)

SECTION = "utility"

HARM = 0.05
"""Loss of Dice through *added* synthetic images that counts as a defect; smaller ones come and go with the seed."""

FAILURE = 0.10
"""Loss of Dice with synthetic *instead of* real images that counts as a defect: about what two readers of breast
ultrasound disagree by, so a network that loses more has learnt other outlines."""

LEARNT = 0.3
"""Least mean Dice of a network that has learnt what a lesion is.

A box of a third of the image reaches 0.3 even where it holds all of a lesion of 6 %, the mean in BUSI and BUS-BRA.
"""

FALSE_POSITIVE_AREA = 0.003
"""Share of a normal image that a prediction must cover to count: that of BUSI's smallest lesion."""

Floats = NDArray[np.float64]
Statistic = Callable[[Rows], float]
"""Maps row numbers to a number."""


@dataclass(frozen=True)
class _Scores:
    """An arm's counts on every image of a test set, one array per seed; -1 where no split tested the image."""

    seeds: list[Counts]

    @property
    def dice(self) -> Floats:
        """N Dice coefficients averaged over seeds; meaningless where an image was not tested."""
        return np.asarray(np.mean([dice(counts) for counts in self.seeds], axis=0))

    def f1(self, rows: Rows) -> float:
        """Pooled F1 of some images, averaged over seeds."""
        return float(np.mean([pooled_f1(counts[rows]) for counts in self.seeds]))


def arm_figures(context: AuditContext, found: list[Outcome], parts: list[Split], train: int) -> list[Figure]:
    """All figures of all arms, p-values not yet adjusted."""
    real = context.real
    tested = np.unique(np.concatenate([part.test for part in parts]))
    scores = {name: _gathered(found, name, parts, len(real)) for name in dict.fromkeys(one.arm for one in found)}
    figures = _on(context, scores, real, tested, train, f"{SECTION}.", "")
    if context.external is not None and len(context.external):
        outside = {name: _Scores([one.external for one in found if one.arm == name]) for name in scores}
        everything = np.arange(len(context.external))
        figures += _on(context, outside, context.external, everything, train, f"{SECTION}.external.", "external: ")
    return figures


def untaught(context: AuditContext, found: list[Outcome], parts: list[Split]) -> int:
    """How many trainings of the arm ``real`` did not learn: a yardstick that measures nothing must accuse nobody."""
    lesion = np.asarray(context.real.masks.any(axis=(1, 2)))
    tests = {part.name: lesion[part.test] for part in parts}
    scores = [dice(one.test[tests[one.split]]) for one in found if one.arm == REAL]
    return sum(len(part) > 0 and float(part.mean()) < LEARNT for part in scores)


def flagged(figures: list[Figure], result: SectionResult, *, trusted: bool = True) -> None:
    """Adjust p-values, apply each figure's rule, and add figures and findings to the result.

    ``trusted``: False where the networks did not learn: then nothing is flagged.
    """
    p_values = adjusted(np.array([np.nan if figure.p is None else figure.p for figure in figures]))
    for figure, p in zip(figures, p_values, strict=True):
        rule = next((rule for ending, rule in _RULES.items() if figure.key.endswith(ending)), None)
        enough = min(figure.synthetic, figure.real) >= FEWEST_TO_FLAG
        text = rule(figure) if trusted and rule is not None and enough and p < ALPHA else None
        result.figures.append(replace(figure, p=None if np.isnan(p) else float(p), flagged=text is not None))
        if text is not None:
            result.flag(text, figure.key)


def grouped_wilcoxon(differences: Floats, groups: Rows) -> float:
    """P-value of the paired Wilcoxon test on each group's mean difference: images of one patient are not independent.

    Zeros count half for either sign; 1 where there is nothing else.
    """
    _, code = np.unique(groups, return_inverse=True)
    means = np.bincount(code, differences) / np.bincount(code)
    return float(wilcoxon(means, zero_method="zsplit").pvalue) if means.any() else 1.0


def _gathered(found: list[Outcome], arm: str, parts: list[Split], size: int) -> _Scores:
    tests = {part.name: part.test for part in parts}
    mine = [one for one in found if one.arm == arm]
    seeds = []
    for seed in sorted({one.seed for one in mine}):
        counts = np.full((size, 3), -1, np.int64)
        for one in mine:
            if one.seed == seed:
                counts[tests[one.split]] = one.test
        seeds.append(counts)
    return _Scores(seeds)


def _on(
    context: AuditContext, scores: dict[str, _Scores], real: ImageSet, tested: Rows, train: int, prefix: str, words: str
) -> list[Figure]:
    """Every arm's figures on one test set."""
    lesion = np.asarray(real.masks.any(axis=(1, 2)))
    rows, normals = tested[lesion[tested]], tested[~lesion[tested]]
    if not len(rows):
        return []
    floor = _seed_floor(scores[REAL], rows, real.groups[rows], context.rng(SECTION, prefix, "floor"))
    figures: list[Figure] = []
    lesions = len(context.synthetic.with_lesions())
    least = FALSE_POSITIVE_AREA * RECIPES[context.effort].side ** 2
    main = prefix == f"{SECTION}."

    def of_arm(name: str, mine: _Scores) -> None:
        rng = context.rng(SECTION, prefix, name)
        used = min(round(ARMS[name].synthetic * train), lesions)
        note = "To be compared with the arm 'real': between halves of a set there is no such figure."
        plain = Figure("", "", Interval(0.0), None, used, len(rows), better="higher", note=note)

        def add(key: str, label: str, statistic: Statistic, members: Rows, after: str = "", **changes: Any) -> None:
            figure = replace(
                plain,
                key=f"{prefix}{name}.{key}",
                label=f"{label}, {words}{ARMS[name].label}{after}",
                value=bootstrap(statistic, rng, real.groups[members]),
                real=len(members),
            )
            figures.append(replace(figure, **changes))

        add("dice", "Dice", _mean_of(mine.dice[rows]), rows, headline=main and name == REAL)
        add("f1", "Pooled F1 of lesion images", lambda k: mine.f1(rows[k]), rows)
        for stratum, members in _strata(real, rows).items():
            add(f"{stratum.replace(' ', '_')}.dice", "Dice", _mean_of(mine.dice[members]), members, f", {stratum}")
        for reference in (REAL, CLASSIC):
            if reference in scores and name not in (REAL, reference):
                difference = (mine.dice - scores[reference].dice)[rows]
                add(
                    f"gain_over_{reference}",
                    f"Dice gained over '{ARMS[reference].label}'",
                    _mean_of(difference),
                    rows,
                    floor=floor,
                    p=grouped_wilcoxon(difference, real.groups[rows]),
                    headline=main and reference == REAL and name in (ADDED, ALONE, CLASSIC),
                    note="The floor is what another seed alone changes. P by paired Wilcoxon over groups.",
                )
        if len(normals):
            found = np.mean([counts[normals, 1] >= least for counts in mine.seeds], axis=0)
            key, label = "normals.false_positives", "Normals with a false lesion"
            add(key, label, lambda k: 100.0 * float(found[k].mean()), normals, unit="%", better="lower")

    for name, mine in scores.items():
        of_arm(name, mine)
    return figures


def _mean_of(values: Floats) -> Statistic:
    return lambda rows: float(values[rows].mean())


def _strata(real: ImageSet, rows: Rows) -> dict[str, Rows]:
    """Test lesions per class, and by thirds of lesion area."""
    area = np.asarray(real.masks[rows].sum(axis=(1, 2)), np.float64)
    third = np.searchsorted(np.quantile(area, [1 / 3, 2 / 3]), area)
    by_class = {str(name): rows[real.classes[rows] == name] for name in np.unique(real.classes[rows])}
    by_size = {name: rows[third == k] for k, name in enumerate(("small lesions", "medium lesions", "large lesions"))}
    return {name: members for name, members in {**by_class, **by_size}.items() if len(members)}


def _seed_floor(mine: _Scores, rows: Rows, groups: Rows, rng: np.random.Generator) -> Interval | None:
    """What another seed changes: zero, plus and minus the largest end of any seed pair's interval."""
    ends = []
    for first, second in combinations(mine.seeds, 2):
        difference = (dice(second) - dice(first))[rows]
        span = bootstrap(_mean_of(difference), rng, groups)
        ends += [abs(span.low or 0.0), abs(span.high or 0.0)]
    return Interval(0.0, -max(ends), max(ends)) if ends else None


def _lost(figure: Figure, least: float) -> float:
    """Dice below which an arm has lost more than ``least``, and more than another seed alone makes it lose."""
    return -least if figure.floor is None or figure.floor.low is None else min(-least, figure.floor.low)


def _harmful(figure: Figure) -> str | None:
    if figure.value.value >= _lost(figure, HARM):
        return None
    return f"Added to real training images, the set makes the network worse: Dice {figure.value.value:+.3f}."


def _failing(figure: Figure) -> str | None:
    if figure.value.high is None or figure.value.high >= _lost(figure, FAILURE):
        return None
    lower = -figure.value.value
    return f"A network trained on the set alone fails on real images: its Dice is {lower:.3f} lower."


def _below_floor(figure: Figure) -> str | None:
    if figure.floor is None or figure.floor.low is None or figure.value.value >= figure.floor.low:
        return None
    return (
        f"A network trained on real images agrees less with this set's masks (Dice {figure.value.value:.2f}) than with "
        f"those of real images that it has not seen either ({figure.floor.value:.2f}): masks and images do not fit."
    )


OFFSET = 1.5
"""Median displacement in pixels of the working frame, beyond the real set's, that counts: about one pixel of the quick
network's input."""


def _displaced(figure: Figure) -> str | None:
    if figure.floor is None or abs(figure.value.value - figure.floor.value) < OFFSET:
        return None
    return (
        f"{figure.label}: {figure.value.value:+.1f} px, {figure.floor.value:+.1f} px in real images. "
        "Masks are shifted, or the lesions lie elsewhere than their masks say: faint, or lost in their own shadow."
    )


_RULES: dict[str, Callable[[Figure], str | None]] = {
    f"{SECTION}.{ADDED}.gain_over_{REAL}": _harmful,
    f"{SECTION}.{ALONE}.gain_over_{REAL}": _failing,
    f"{SECTION}.masks.dice": _below_floor,
    f"{SECTION}.masks.offset_x": _displaced,
    f"{SECTION}.masks.offset_y": _displaced,
}

NEAR = 0.3
"""Least Dice at which prediction and mask mean the same lesion, so that their displacement means something."""

PERMUTATIONS = 999

_Statistic = Callable[[Floats, Rows], float]
"""Maps values and their class numbers to one number."""


def probe_figures(context: AuditContext, found: list[Outcome], parts: list[Split]) -> list[Figure]:
    """Dice and displacement on the synthetic images, against the same on real images that the network has not seen.

    Only classes that both sides have count, each with the same weight. P-values exchange whole groups between both
    sides and are not yet adjusted.
    """
    synthetic, real = context.synthetic.with_lesions(), context.real
    mine = [one for one in found if one.arm == REAL]
    on_synthetic = np.mean([dice(one.synthetic) for one in mine], axis=0)
    moved_synthetic = _mean_offsets([one.synthetic_offsets for one in mine], [one.synthetic for one in mine])
    on_real, moved_real = _on_real(mine, parts, len(real))
    lesion = real.masks.any(axis=(1, 2))
    labels = _labels(real.classes, synthetic.classes)
    sides = []
    for label, groups, scores, moved, usable in (
        (labels[0], real.groups, on_real, moved_real, lesion & ~np.isnan(on_real)),
        (labels[1], synthetic.groups, on_synthetic, moved_synthetic, np.ones(len(synthetic), np.bool_)),
    ):
        rows = usable & (label >= 0)
        sides.append((label[rows], groups[rows], scores[rows], moved[rows]))
    if not all(len(side[0]) for side in sides):
        return []
    (label_r, groups_r, dice_r, moved_r), (label_s, groups_s, dice_s, moved_s) = sides
    note = "The network trained on real images segments synthetic ones; the floor is the same on held-out real images."
    figures = []
    for name, text, first, second, statistic, unit in (
        ("dice", "Agreement of a real-trained network with the masks", dice_r, dice_s, _balanced_mean, ""),
        ("offset_y", "Downward offset of that network from the masks", moved_r[:, 0], moved_s[:, 0], _median, "px"),
        ("offset_x", "Rightward offset of that network from the masks", moved_r[:, 1], moved_s[:, 1], _median, "px"),
    ):
        known_r, known_s = ~np.isnan(first), ~np.isnan(second)
        if known_r.sum() < 2 or known_s.sum() < 2:
            continue
        values = np.concatenate([first[known_r], second[known_s]])
        label = np.concatenate([label_r[known_r], label_s[known_s]])
        count = int(known_r.sum())
        first_groups, second_groups = groups_r[known_r], groups_s[known_s]

        def of_rows(k: Rows, v: Floats = values, c: Rows = label, f: _Statistic = statistic) -> float:
            return f(v[k], c[k])

        def difference(a: Rows, b: Rows, of: Statistic = of_rows) -> float:
            return abs(of(a) - of(b))

        def of_synthetic(k: Rows, of: Statistic = of_rows, first: int = count) -> float:
            return of(k + first)

        rng = context.rng(SECTION, "masks", name)
        floor = bootstrap(of_rows, rng, first_groups)
        value = bootstrap(of_synthetic, rng, second_groups)
        figures.append(
            Figure(
                key=f"{SECTION}.masks.{name}",
                label=text,
                value=value,
                floor=floor,
                synthetic=int(known_s.sum()),
                real=count,
                better="higher" if name == "dice" else "near",
                unit=unit,
                p=permutation_p(difference, first_groups, second_groups, rng, PERMUTATIONS),
                headline=name == "dice",
                note=note,
            )
        )
    return figures


def _on_real(mine: list[Outcome], parts: list[Split], size: int) -> tuple[Floats, Floats]:
    """Dice and offsets of ``size`` real images, over the seeds of the split that tested each; NaN where none did."""
    scores, moved = np.full(size, np.nan), np.full((size, 2), np.nan)
    for part in parts:
        own = [one for one in mine if one.split == part.name]
        scores[part.test] = np.mean([dice(one.test) for one in own], axis=0)
        moved[part.test] = _mean_offsets([one.offsets for one in own], [one.test for one in own])
    return scores, moved


def _mean_offsets(offsets: list[Floats], counts: list[Counts]) -> Floats:
    """Offsets averaged over the networks that found the lesion; NaN where none did."""
    kept = [np.where((dice(c) >= NEAR)[:, None], o, np.nan) for o, c in zip(offsets, counts, strict=True)]
    stack = np.stack(kept)
    known = (~np.isnan(stack)).sum(axis=0)
    return np.asarray(np.where(known > 0, np.nansum(stack, axis=0) / np.maximum(known, 1), np.nan))


def _labels(real: NDArray[np.str_], synthetic: NDArray[np.str_]) -> tuple[Rows, Rows]:
    """Class numbers of both sides, -1 for classes of one side only; one number for all where they share none."""
    common = sorted(set(real.tolist()) & set(synthetic.tolist()))
    if not common:
        return np.zeros(len(real), np.int64), np.zeros(len(synthetic), np.int64)
    numbers = {name: k for k, name in enumerate(common)}
    first, second = (np.array([numbers.get(str(name), -1) for name in side], np.int64) for side in (real, synthetic))
    return first, second


def _balanced_mean(values: Floats, labels: Rows) -> float:
    return float(np.mean([values[labels == label].mean() for label in np.unique(labels)]))


def _median(values: Floats, labels: Rows) -> float:
    return float(np.median(values))


def run(context: AuditContext) -> SectionResult:
    """Train the arms of ``arms.ARMS`` with equal optimiser steps and test all of them on the same real images.

    Besides, the network trained on real images alone segments the synthetic ones: masks that do not belong to their
    images show there at once (`probe`). Every training is kept under the section's folder, so a killed run
    goes on where it stood.

    Args:
        context: The audit. With ``train``, those images train and all of ``real`` tests; else group folds of ``real``.
    """
    result = SectionResult(SECTION)
    context = context.without_overlays()
    synthetic = len(context.synthetic.with_lesions())
    lesions = int(context.real.masks.any(axis=(1, 2)).sum())
    if not synthetic or lesions < 2:
        result.note(f"Not run: it takes synthetic and real lesions, and there are {synthetic} and {lesions}.")
        return result
    parts, notes = splits(context, synthetic)
    if not parts or not all(len(part.train) for part in parts):
        result.note(" ".join(notes))
        return result
    smallest = min(len(part.train) for part in parts)
    arms, left_out = arms_for(context, smallest, synthetic)
    found = outcomes(context, parts, arms)
    figures = arm_figures(context, found, parts, smallest) + probe_figures(context, found, parts)
    weak = untaught(context, found, parts)
    flagged(figures, result, trusted=not weak)
    if weak:
        result.note(
            f"{weak} of the trainings on real images did not learn to find lesions (Dice below {LEARNT}), for want of "
            "images or steps, so nothing is flagged."
        )
    for text in (*notes, *left_out, CLEAN):
        result.note(text)
    extent = EXTENTS[context.effort]
    result.details["experiment"] = {
        "training_images": {part.name: len(part.train) for part in parts},
        "seeds": extent.seeds,
        "arms": {arm.name: arm.label for arm in arms},
    }
    return result
