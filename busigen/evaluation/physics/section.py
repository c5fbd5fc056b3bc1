"""Ultrasound physics: do speckle, depth, shadows and outlines follow those of real images?"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.evaluation.comparing import two_sample
from busigen.evaluation.comparing.statistics import ALPHA, FEWEST_TO_FLAG, adjusted
from busigen.evaluation.comparing.two_sample import Comparison, Distances
from busigen.evaluation.context import AuditContext
from busigen.evaluation.physics import radiomics
from busigen.evaluation.physics.feature_table import NAMES
from busigen.evaluation.physics.findings import Evidence, describe, theme
from busigen.evaluation.physics.plots import plot
from busigen.evaluation.results import Figure, Interval, SectionResult
from busigen.registry import LESION_CLASSES

SECTION = "physics"

MIN_VALUES = 5
"""With fewer values on either side there is no figure at all."""

HEADLINES = 4

_STATISTICS = {"ks": ("Kolmogorov-Smirnov", ""), "wasserstein": ("Wasserstein", "SD")}


def run(context: AuditContext) -> SectionResult:
    """Compare every feature of `feature_table.NAMES` between both sets, per class and with the classes together.

    A figure is flagged where its p-value, adjusted for all of the section's tests, is below ``ALPHA`` and its value
    lies above the floor's upper end.

    Args:
        context: The audit.

    Returns:
        Per feature and scope a Kolmogorov-Smirnov and a Wasserstein distance (in standard deviations of the real
        set), one figure for exchanged classes, findings in plain words, and at most six plots.

    Raises:
        OutputError: The report's folder cannot be written.
    """
    result = SectionResult(SECTION)
    if not len(context.real) or not len(context.synthetic):
        result.note("One of the sets holds no images: there is nothing to compare.")
        return result
    tables = {name: radiomics.for_set(context, getattr(context, name)) for name in ("real", "synthetic")}
    comparison = two_sample.compare(_sample(tables["real"]), _sample(tables["synthetic"]), context.rng(SECTION))
    adjusted_p = _adjusted(comparison)
    figures = _figures(comparison, adjusted_p)
    _notes(context, comparison, result)
    evidence = _evidence(comparison, figures, tables)
    result.figures = _with_headlines(figures, evidence)
    swap = _swap_figure(comparison, adjusted_p)
    if swap is not None:
        result.figures.append(swap)
    describe(evidence, result)
    result.pictures = plot(context, tables, evidence)
    result.details = {"medians": _medians(comparison, tables), "reweighted": comparison.reweighted}
    return result


def _sample(table: pl.DataFrame) -> two_sample.Sample:
    values = table.select(list(NAMES)).to_numpy().astype(np.float64)
    return two_sample.Sample(values, table["class"].to_numpy().astype(np.str_), table["group"].to_numpy())


def _adjusted(comparison: Comparison) -> dict[str, NDArray[np.float64]]:
    """All of the section's p-values, adjusted together, by name of the statistic."""
    enough = np.minimum(comparison.synthetic, comparison.real) >= FEWEST_TO_FLAG
    parts = {name: np.where(enough, getattr(comparison, name).p, np.nan) for name in _STATISTICS}
    parts["swap"] = comparison.swap.p if enough.any(axis=1).all() else np.full((1, 1), np.nan)
    joint = adjusted(np.concatenate([part.ravel() for part in parts.values()]))
    cuts = np.cumsum([part.size for part in parts.values()])[:-1]
    return {name: part.reshape(parts[name].shape) for name, part in zip(parts, np.split(joint, cuts), strict=True)}


def _figures(comparison: Comparison, p: dict[str, NDArray[np.float64]]) -> dict[tuple[str, str, str], Figure]:
    """Figures by feature, scope and statistic."""
    figures = {}
    for column, feature in enumerate(NAMES.values()):
        for row, scope in enumerate(comparison.scopes):
            counts = int(comparison.synthetic[row, column]), int(comparison.real[row, column])
            for name, (label, unit) in _STATISTICS.items():
                distances: Distances = getattr(comparison, name)
                if min(counts) < MIN_VALUES or np.isnan(distances.value[row, column]):
                    continue
                measure = feature.name.partition("_")[2]
                figures[feature.name, scope, name] = _figure(
                    f"{SECTION}.{feature.name.partition('_')[0]}.{scope}.{measure}.{name}",
                    f"{feature.label}, {scope} ({label})",
                    (distances, row, column),
                    counts,
                    float(p[name][row, column]),
                    unit,
                    feature.meaning,
                )
    return figures


def _figure(
    key: str,
    label: str,
    place: tuple[Distances, int, int],
    counts: tuple[int, int],
    p: float,
    unit: str,
    note: str,
) -> Figure:
    distances, row, column = place

    def number(name: str) -> float:
        return float(getattr(distances, name)[row, column])

    floor = None
    if np.isnan(number("floor")):
        note = f"{note}; no floor: too few groups of real images have a value to be halved"
    else:
        floor = Interval(number("floor"), number("floor_low"), number("floor_high"))
    if np.isnan(number("low")):
        note = f"{note}; no interval: most resamples hold no value"
    value = number("value")
    beyond = floor is not None and floor.high is not None and value > floor.high
    return Figure(
        key=key,
        label=label,
        value=Interval(value, *(None if np.isnan(number(end)) else number(end) for end in ("low", "high"))),
        floor=floor,
        synthetic=counts[0],
        real=counts[1],
        unit=unit,
        p=None if np.isnan(p) else p,
        flagged=beyond and p < ALPHA,
        note=note,
    )


def _swap_figure(comparison: Comparison, p: dict[str, NDArray[np.float64]]) -> Figure | None:
    if np.isnan(comparison.swap.value[0, 0]):
        return None
    counts = int(comparison.synthetic[-1].max()), int(comparison.real[-1].max())
    note = "0: classes differ as real ones do; 0.5: not at all; 1: each lies where the other real one does (mean ranks)"
    place, adjusted_p = (comparison.swap, 0, 0), float(p["swap"][0, 0])
    return _figure(f"{SECTION}.classes.swap", "classes confused", place, counts, adjusted_p, "", note)


def _evidence(
    comparison: Comparison, figures: dict[tuple[str, str, str], Figure], tables: dict[str, pl.DataFrame]
) -> list[Evidence]:
    """What the figures of each feature and scope say together, the worst first."""
    found = []
    for row, scope in enumerate(comparison.scopes):
        rows = {
            name: table if scope == two_sample.ALL else table.filter(pl.col("class") == scope)
            for name, table in tables.items()
        }
        for column, name in enumerate(NAMES):
            pair = [figures[key] for kind in _STATISTICS if (key := (name, scope, kind)) in figures]
            if not pair:
                continue
            real, synthetic = (rows[side][name].fill_nan(None).drop_nulls() for side in ("real", "synthetic"))
            found.append(
                Evidence(
                    feature=NAMES[name],
                    scope=scope,
                    figures=tuple(pair),
                    shift=float(comparison.shift[row, column]),
                    medians=(float(np.median(synthetic)), float(np.median(real))),
                    ranges=(_range(synthetic), _range(real)),
                )
            )
    return sorted(found, key=lambda item: (item.flagged, item.excess), reverse=True)


def _range(values: pl.Series) -> float:
    low, high = np.percentile(values.to_numpy(), [25.0, 75.0])
    return float(high - low)


def _with_headlines(figures: dict[tuple[str, str, str], Figure], evidence: list[Evidence]) -> list[Figure]:
    """All figures; the worst of each of the worst themes is a headline, so that one defect does not fill them all.

    Where fewer themes are flagged than there are headlines, figures over all classes fill the gap: they vary least.
    """
    widest = [item for item in evidence if item.flagged or item.scope not in LESION_CLASSES]
    chosen: dict[str, str] = {}
    for item in widest or evidence:
        if len(chosen) < HEADLINES:
            chosen.setdefault(theme(item.feature), item.worst.key)
    shown = set(chosen.values())
    return [replace(figure, headline=figure.key in shown) for figure in figures.values()]


def _notes(context: AuditContext, comparison: Comparison, result: SectionResult) -> None:
    counts = np.minimum(comparison.synthetic, comparison.real).max(axis=1)
    few = [scope for scope, count in zip(comparison.scopes, counts, strict=True) if count < FEWEST_TO_FLAG]
    if few:
        result.note(f"Fewer than {FEWEST_TO_FLAG} images on one side in {', '.join(few)}: shown, but never flagged.")
    mine, theirs = (set(side.table["class"].to_list()) for side in (context.synthetic, context.real))
    for label in sorted(mine ^ theirs):
        owner = "synthetic" if label in mine else "real"
        result.note(f"Only the {owner} set has images of class {label}: {_left_out(context, mine & theirs)}.")
    if comparison.reweighted:
        result.note("The sets mix their classes differently; 'all' weighs each class by its share of the real set.")
    if context.backgrounds == "real":
        result.note(
            "The images are painted into real ones: background, depth and whole-image figures are partly those of real "
            "images. Lesion, ring, outline and posterior figures judge the generator."
        )


def _left_out(context: AuditContext, shared: set[str]) -> str:
    return "they are left out" if shared else "the sets share no class, so classes are ignored"


def _medians(comparison: Comparison, tables: dict[str, pl.DataFrame]) -> dict[str, dict[str, dict[str, float | None]]]:
    def medians(table: pl.DataFrame, scope: str) -> dict[str, float | None]:
        rows = table if scope == two_sample.ALL else table.filter(pl.col("class") == scope)
        return rows.select(pl.col(list(NAMES)).fill_nan(None).median()).row(0, named=True) if len(rows) else {}

    return {name: {scope: medians(table, scope) for scope in comparison.scopes} for name, table in tables.items()}
