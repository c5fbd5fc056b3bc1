"""Do masks and images fit? The network trained on real images alone segments the synthetic ones."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from busigen.evaluation.comparing.statistics import permutation_p
from busigen.evaluation.context import AuditContext
from busigen.evaluation.results import Figure
from busigen.evaluation.utility.arms import REAL, Outcome, Split
from busigen.evaluation.utility.figures import SECTION, Floats, Rows, interval
from busigen.evaluation.utility.segmentation import Counts, dice

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

        def difference(a: Rows, b: Rows, v: Floats = values, c: Rows = label, f: _Statistic = statistic) -> float:
            return abs(f(v[a], c[a]) - f(v[b], c[b]))

        rng = context.rng(SECTION, "masks", name)
        floor = interval(lambda k, v=values, c=label, f=statistic: f(v[k], c[k]), first_groups, rng)  # type: ignore[misc]
        value = interval(
            lambda k, v=values[count:], c=label[count:], f=statistic: f(v[k], c[k]),  # type: ignore[misc]
            second_groups,
            rng,
        )
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
