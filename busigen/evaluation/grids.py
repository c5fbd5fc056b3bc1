"""Grids: that the images of one background are equal outside their edit regions, and what else differs between them.

Figures are paired: one attribute is varied, and the background, the noise and all other attributes are held.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.geometry import edit_region
from busigen.evaluation.context import AuditContext, Figure, ImageSet, Interval, SectionResult
from busigen.evaluation.physics.features import NAMES
from busigen.evaluation.reading.listing import GROUP, LEVEL
from busigen.evaluation.statistics.grouped import ALPHA, adjusted, bootstrap
from busigen.runtime.sampling.grid import MAX_CELLS, levels_of
from busigen.text import printable

MEASURED = {"size": "shape_area", "depth": "shape_depth", "across": "shape_lateral", "height_width": "shape_taller"}
"""The feature that measures an attribute in the attribute's own unit."""

MIN_GROUPS = 5  # With fewer groups there is no figure; fewer than ten can hardly prove that a feature differs
FLIPS = 4999  # Draws of signs behind a p-value
_BLOCK = 500
SHOWN = 8  # Features named for each step between levels; the rest are counted

Floats = NDArray[np.float64]
Cell = tuple[tuple[str, str], ...]  # Attributes and their levels


@dataclass(frozen=True)
class Step:
    """An attribute, two of its levels, and ``float64 (groups, D)``: later minus earlier level, all else equal."""

    attribute: str
    first: str
    second: str
    differences: Floats

    @property
    def name(self) -> str:
        """Such as ``size 0.03 to 0.06``."""
        return f"{self.attribute.replace('_', ' / ')} {self.first} to {self.second}"


def groups_of(images: ImageSet) -> list[str | None]:
    """The background of a grid that each image shows; None for what is of no grid."""
    return images.table[GROUP].to_list() if GROUP in images.table.columns else [None] * len(images)


def prove(context: AuditContext, result: SectionResult) -> None:
    """Compare the images of every background of a grid with its first one, bit for bit outside both edit regions."""
    images = context.synthetic
    groups: dict[str, list[int]] = {}
    for row, group in enumerate(groups_of(images)):
        if group is not None:
            groups.setdefault(group, []).append(row)
    groups = {group: rows for group, rows in groups.items() if len(rows) > 1}
    if not groups:
        return
    problems = []
    for rows in context.track("comparing a grid's backgrounds", groups.values(), len(groups)):
        # As if there were no bars: these are black in any case.
        regions = {row: edit_region(images.masks[row], np.ones_like(images.masks[row])) for row in rows}
        first, *others = rows
        for row in others:
            changed = (images.images[row] != images.images[first]) & ~regions[row] & ~regions[first]
            if changed.any():
                problems.append(f"{images.table['id'][row]} differs in {int(changed.sum())} pixels")
                break
    key, share = "integrity.grid.changed", Interval(100 * len(problems) / len(groups))
    label, compared = "Backgrounds of the grid that change", sum(map(len, groups.values()))
    note = f"{compared} images, compared outside of their edit regions; all are looked at, hence no interval"
    result.figures.append(Figure(key, label, share, None, len(groups), 0, unit="%", flagged=bool(problems), note=note))
    if problems:
        result.flag(f"{len(problems)} of {len(groups)} groups of the grid change outside: {problems[0]}.", key)
    else:
        result.note(f"All {len(groups)} groups of the grid are equal outside their edit regions, bit for bit.", key)


def compare(context: AuditContext, synthetic: pl.DataFrame, real: pl.DataFrame, result: SectionResult) -> None:
    """Add the paired figures of a grid; nothing where the set is none. Tables are those of `features.for_set`.

    A figure is the mean over groups, its interval that of drawing groups anew, its p-value (adjusted for all features
    and steps) that of turning the groups' signs. Image features are in standard deviations of the real set.
    """
    groups = groups_of(context.synthetic)
    if not any(groups):
        return
    values = synthetic.select(list(NAMES)).to_numpy().astype(np.float64)
    found = steps(values, groups, context.synthetic.table[LEVEL].to_list())
    few = [step.name for step in found if len(step.differences) < MIN_GROUPS]
    if few:
        result.note(f"Too few groups of the grid to compare (at least {MIN_GROUPS} are needed): {', '.join(few)}.")
    found = [step for step in found if len(step.differences) >= MIN_GROUPS]
    if not found:
        return
    unit = np.nanstd(real.select(list(NAMES)).to_numpy().astype(np.float64), axis=0)
    rng = context.rng("physics", "grid")
    p = adjusted(np.array([signs_p(step.differences, rng) for step in found]).ravel()).reshape(len(found), -1)
    for step, p_values in zip(found, p, strict=True):
        _asked(step, context, result)
        _features(step, p_values, unit, context, result)


def steps(values: Floats, groups: list[str | None], said: list[str | None]) -> list[Step]:
    """Differences between neighbouring levels of each attribute, ``values`` ``(N, D)``, averaged within a group."""
    rows: dict[str, dict[Cell, int]] = {}
    for row, (group, text) in enumerate(zip(groups, said, strict=True)):
        if group is not None and (cell := tuple(levels_of(text or "").items())):
            rows.setdefault(group, {})[cell] = row
    levels: dict[str, dict[str, None]] = {}
    for own in rows.values():
        for name, level in (pair for cell in own for pair in cell):
            levels.setdefault(name, {})[level] = None
    result = []
    for name, known in levels.items():
        if len(known) > MAX_CELLS:
            continue
        for first, second in pairwise(known):
            differences = [_difference(values, own, name, first, second) for own in rows.values()]
            if found := [one for one in differences if one is not None]:
                result.append(Step(name, printable(first), printable(second), np.array(found)))
    return result


def _difference(values: Floats, own: dict[Cell, int], name: str, first: str, second: str) -> Floats | None:
    """Of one group, averaged over the cells that differ in nothing else; None without any."""
    found = []
    for cell, row in own.items():
        other = tuple((key, second if key == name else level) for key, level in cell)
        if (name, first) in cell and other in own:
            found.append(values[own[other]] - values[row])
    return np.mean(found, axis=0) if found else None


def signs_p(differences: Floats, rng: np.random.Generator) -> Floats:
    """P-values ``(D,)`` of "no difference on average", by turning the signs of whole rows ``(N, D)``; NaN: too few."""
    known = ~np.isnan(differences)
    count = known.sum(axis=0)
    filled = np.where(known, differences, 0.0)
    total = np.zeros((FLIPS, filled.shape[1]))
    for start in range(0, len(filled), _BLOCK):
        block = filled[start : start + _BLOCK]
        total += rng.choice([-1.0, 1.0], size=(FLIPS, len(block))) @ block
    observed = np.abs(filled.sum(axis=0))
    beyond = (np.abs(total) >= observed - 1e-12 * np.maximum(observed, 1.0)).sum(axis=0)
    return np.where(count >= MIN_GROUPS, (beyond + 1.0) / (FLIPS + 1.0), np.nan)


def _asked(step: Step, context: AuditContext, result: SectionResult) -> None:
    """The difference that was asked for, and what was measured on the masks."""
    if step.attribute not in MEASURED:
        return
    try:
        asked = float(step.second) - float(step.first)
    except ValueError:
        asked = 0.0
    if not asked or not np.isfinite(asked):
        return  # A dataset may come from anywhere, and say anything.
    column = list(NAMES).index(MEASURED[step.attribute])
    note = f"asked for: {asked:.4g}; measured on the masks, the same background and all else held"
    figure = _figure(step, column, context, f"{step.name}: measured difference", note)
    if figure is None:
        return
    ends = [end for end in (figure.value.low, figure.value.high) if end is not None]
    flagged = max((end / asked for end in ends), default=1.0) < 0.5
    result.figures.append(replace(figure, headline=True, flagged=flagged))
    if flagged:
        text = f"{step.name}: asked for a difference of {asked:.4g}, and masks differ by {figure.value.value:.4g}."
        result.flag(text, figure.key)


def _features(step: Step, p_values: Floats, unit: Floats, context: AuditContext, result: SectionResult) -> None:
    """The image features that differ most between two levels, and how many do."""
    told = [
        k
        for k, name in enumerate(NAMES)
        if p_values[k] < ALPHA and unit[k] > 0 and name != MEASURED.get(step.attribute)
    ]
    sizes = {k: abs(float(np.nanmean(step.differences[:, k]))) / unit[k] for k in told}
    for k in sorted(told, key=lambda k: -sizes[k])[:SHOWN]:
        label = f"{step.name}: {list(NAMES.values())[k].label}"
        note = "paired difference, the same background and all else held; a description, never flagged"
        figure = _figure(step, k, context, label, note, float(unit[k]))
        if figure is not None:
            result.figures.append(replace(figure, unit="SD", p=float(p_values[k])))
    result.note(
        f"Grid, {step.name}: {len(told)} of {len(NAMES)} image features differ (adjusted p < {ALPHA}), "
        f"over {len(step.differences)} groups of one background each; fewer than ten can hardly prove any."
    )


def _figure(step: Step, column: int, context: AuditContext, label: str, note: str, unit: float = 1.0) -> Figure | None:
    """A feature's mean difference in units of ``unit``; None where too few groups have it."""
    values = step.differences[:, column] / unit
    values = values[~np.isnan(values)]
    if len(values) < MIN_GROUPS:
        return None
    rng = context.rng("physics", "grid", step.name, str(column))
    value = bootstrap(lambda rows: float(values[rows].mean()), rng, np.arange(len(values)))
    feature = list(NAMES)[column]
    key = f"physics.grid.{step.attribute}.{step.first}-{step.second}.{feature}"
    return Figure(key, label, value, None, len(values), 0, "near", note=f"{note}; counted are groups")
