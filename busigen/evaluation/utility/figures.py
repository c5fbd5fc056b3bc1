"""Figures of the utility experiment: Dice and F1 of every arm, gains over the baselines, and what is a defect."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np
from numpy.typing import NDArray
from scipy.stats import wilcoxon

from busigen.evaluation.comparing.statistics import ALPHA, FEWEST_TO_FLAG, RESAMPLES, adjusted, resample, rows_by_group
from busigen.evaluation.context import AuditContext, Effort, ImageSet
from busigen.evaluation.results import Figure, Interval, SectionResult
from busigen.evaluation.utility.arms import ADDED, ALONE, ARMS, CLASSIC, REAL, Outcome, Split
from busigen.evaluation.utility.segmentation import RECIPES, Counts, dice, pooled_f1

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
Rows = NDArray[np.int64]


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
    """All figures of all arms, p-values not yet adjusted.

    Args:
        context: The audit.
        found: Every training's scores.
        parts: The splits they belong to.
        train: Real training images per split.
    """
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

    Args:
        figures: Those of the arms and of the probe.
        result: Where they go.
        trusted: False where the networks did not learn: then nothing is flagged.
    """
    p_values = adjusted(np.array([np.nan if figure.p is None else figure.p for figure in figures]))
    for figure, p in zip(figures, p_values, strict=True):
        rule = next((rule for ending, rule in _RULES.items() if figure.key.endswith(ending)), None)
        enough = min(figure.synthetic, figure.real) >= FEWEST_TO_FLAG
        text = rule(figure) if trusted and rule is not None and enough and p < ALPHA else None
        result.figures.append(replace(figure, p=None if np.isnan(p) else float(p), flagged=text is not None))
        if text is not None:
            result.flag(text, figure.key)


def interval(statistic: Callable[[Rows], float], groups: Rows, rng: np.random.Generator) -> Interval:
    """A statistic of row numbers with its 95 % cluster-bootstrap interval."""
    parts = rows_by_group(groups)
    draws = [statistic(resample(parts, rng)) for _ in range(RESAMPLES)]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return Interval(statistic(np.arange(len(groups))), float(low), float(high))


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
    figures = []
    lesions = len(context.synthetic.with_lesions())
    for name, mine in scores.items():
        rng, label = context.rng(SECTION, prefix, name), ARMS[name].label
        used = min(round(ARMS[name].synthetic * train), lesions)
        note = "To be compared with the arm 'real': between halves of a set there is no such figure."
        plain = Figure("", "", Interval(0.0), None, used, len(rows), better="higher", note=note)
        whole = plain if prefix != f"{SECTION}." else replace(plain, headline=name == REAL)
        value = interval(lambda k, d=mine.dice[rows]: float(d[k].mean()), real.groups[rows], rng)  # type: ignore[misc]
        figures.append(replace(whole, key=f"{prefix}{name}.dice", label=f"Dice, {words}{label}", value=value))
        value = interval(lambda k, m=mine: m.f1(rows[k]), real.groups[rows], rng)  # type: ignore[misc]
        pooled = f"Pooled F1 of lesion images, {words}{label}"
        figures.append(replace(plain, key=f"{prefix}{name}.f1", label=pooled, value=value))
        for stratum, members in _strata(real, rows).items():
            value = interval(
                lambda k, d=mine.dice[members]: float(d[k].mean()),  # type: ignore[misc]
                real.groups[members],
                rng,
            )
            key, text = f"{prefix}{name}.{stratum.replace(' ', '_')}.dice", f"Dice, {words}{label}, {stratum}"
            figures.append(replace(plain, key=key, label=text, value=value, real=len(members)))
        for reference in (REAL, CLASSIC):
            if reference in scores and name not in (REAL, reference):
                difference = (mine.dice - scores[reference].dice)[rows]
                figures.append(
                    replace(
                        plain,
                        key=f"{prefix}{name}.gain_over_{reference}",
                        label=f"Dice gained over '{ARMS[reference].label}', {words}{label}",
                        value=interval(lambda k, d=difference: float(d[k].mean()), real.groups[rows], rng),  # type: ignore[misc]
                        floor=floor,
                        p=grouped_wilcoxon(difference, real.groups[rows]),
                        headline=reference == REAL and name in (ADDED, ALONE, CLASSIC) and prefix == f"{SECTION}.",
                        note="The floor is what another seed alone changes. P by paired Wilcoxon over groups.",
                    )
                )
        if len(normals):
            figures.append(_false_positives(plain, context.effort, prefix, name, words, mine, real, normals, rng))
    return figures


def _false_positives(
    plain: Figure,
    effort: Effort,
    prefix: str,
    name: str,
    words: str,
    mine: _Scores,
    real: ImageSet,
    normals: Rows,
    rng: np.random.Generator,
) -> Figure:
    least = FALSE_POSITIVE_AREA * RECIPES[effort].side ** 2
    found = np.mean([counts[normals, 1] >= least for counts in mine.seeds], axis=0)
    return replace(
        plain,
        key=f"{prefix}{name}.normals.false_positives",
        label=f"Normals with a false lesion, {words}{ARMS[name].label}",
        value=interval(lambda k: 100.0 * float(found[k].mean()), real.groups[normals], rng),
        real=len(normals),
        unit="%",
        better="lower",
    )


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
        span = interval(lambda k, d=difference: float(d[k].mean()), groups, rng)  # type: ignore[misc]
        ends += [abs(span.low or 0.0), abs(span.high or 0.0)]
    return Interval(0.0, -max(ends), max(ends)) if ends else None


def _harmful(figure: Figure) -> str | None:
    limit = -HARM if figure.floor is None or figure.floor.low is None else min(-HARM, figure.floor.low)
    if figure.value.value >= limit:
        return None
    return f"Added to real training images, the set makes the network worse: Dice {figure.value.value:+.3f}."


def _failing(figure: Figure) -> str | None:
    limit = -FAILURE if figure.floor is None or figure.floor.low is None else min(-FAILURE, figure.floor.low)
    if figure.value.high is None or figure.value.high >= limit:
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
