"""Ultrasound physics: features of both sets compared, per class; the worst distributions and two curves as plots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.evaluation import grids
from busigen.evaluation.context import AuditContext, Figure, ImageSet, Interval, Picture, SectionResult
from busigen.evaluation.physics import speckle
from busigen.evaluation.physics.features import DEPTH_BANDS, NAMES, Feature, for_set
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG, adjusted, halves
from busigen.evaluation.statistics.two_sample import ALL, Comparison, Distances, Sample, compare
from busigen.files import atomic_path
from busigen.records import read_json
from busigen.registry import LESION_CLASSES
from busigen.runtime.storage.files import output_errors

SECTION = "physics"

MIN_VALUES = 5  # With fewer values on either side there is no figure at all
HEADLINES = 4

DISTRIBUTIONS = 4  # Features whose distributions are drawn; with the two curves that makes six plots
SPECTRA = 200  # Images per set whose spectra are averaged: more would not move the curves visibly
CLEAR_SHIFT = 0.1  # Distance of Mann-Whitney's probability from a half beyond which one set's values are called greater
SWAPPED = 0.5  # Classes beyond the middle between their own place and the other's are called exchanged
MOST_SENTENCES = 12  # Features that get a sentence of their own; the rest are counted

Floats = NDArray[np.float64]
Tables = dict[str, pl.DataFrame]  # ``real`` and ``synthetic``, from `features.features`.

_SWAP = "0: classes differ as real ones do; 0.5: not at all; 1: each lies where the other real one does (mean ranks)"
_STATISTICS = {"ks": ("Kolmogorov-Smirnov", ""), "wasserstein": ("Wasserstein", "SD")}
_HALVINGS = 40
_BINS = 24
_REAL, _SYNTHETIC, _BAND = "#3f3f46", "#c2410c", "#d4d4d8"
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "legend.frameon": False,
    "svg.fonttype": "none",
    # Without a salt of its own, every run names the paths of a drawing differently.
    "svg.hashsalt": "busigen",
}


def run(context: AuditContext) -> SectionResult:
    """Compare every feature of `features.NAMES` between both sets, per class and with the classes together.

    A figure (Kolmogorov-Smirnov, or Wasserstein in the real set's standard deviations) is flagged where its p-value,
    adjusted for all of the section's tests, is below ``ALPHA`` and its value lies above the floor's upper end.
    """
    result = SectionResult(SECTION)
    if not len(context.real) or not len(context.synthetic):
        result.note("One of the sets holds no images: there is nothing to compare.")
        return result
    tables = {name: for_set(context, getattr(context, name)) for name in ("real", "synthetic")}
    real, synthetic = (
        Sample(
            table.select(list(NAMES)).to_numpy().astype(np.float64),
            table["class"].to_numpy().astype(np.str_),
            table["group"].to_numpy(),
        )
        for table in tables.values()
    )
    comparison = compare(real, synthetic, context.rng(SECTION))
    adjusted_p = _adjusted(comparison)
    figures = _figures(comparison, adjusted_p)
    _add_notes(context, comparison, result)
    evidence = _evidence(comparison, figures, tables)
    result.figures = _with_headlines(list(figures.values()), evidence)
    if not np.isnan(comparison.swap.value[0, 0]):
        counts = int(comparison.synthetic[-1].max()), int(comparison.real[-1].max())
        place, p = (comparison.swap, 0, 0), float(adjusted_p["swap"][0, 0])
        result.figures.append(_figure(f"{SECTION}.classes.swap", "classes confused", place, counts, p, "", _SWAP))
    describe(evidence, result)
    grids.compare(context, tables["synthetic"], tables["real"], result)
    result.pictures = _plot(context, tables, evidence)
    middles = pl.col(list(NAMES)).fill_nan(None).median()
    medians: dict[str, dict[str, Any]] = {side: {} for side in tables}
    for side, table in tables.items():
        for scope in comparison.scopes:
            rows = _in_scope(table, scope)
            medians[side][scope] = rows.select(middles).row(0, named=True) if len(rows) else {}
    result.details = {"medians": medians, "reweighted": comparison.reweighted}
    return result


def _in_scope(table: pl.DataFrame, scope: str) -> pl.DataFrame:
    return table if scope == ALL else table.filter(pl.col("class") == scope)


def _values(tables: Tables, scope: str, name: str) -> dict[str, Floats]:
    """A feature's values in one scope that are known, by side."""
    parts = {side: _in_scope(table, scope)[name] for side, table in tables.items()}
    return {side: part.fill_nan(None).drop_nulls().to_numpy() for side, part in parts.items()}


def _adjusted(comparison: Comparison) -> dict[str, Floats]:
    """All of the section's p-values, adjusted together, by name of the statistic."""
    enough = np.minimum(comparison.synthetic, comparison.real) >= FEWEST_TO_FLAG
    parts = {name: np.where(enough, getattr(comparison, name).p, np.nan) for name in _STATISTICS}
    parts["swap"] = comparison.swap.p if enough.any(axis=1).all() else np.full((1, 1), np.nan)
    joint = adjusted(np.concatenate([part.ravel() for part in parts.values()]))
    cuts = np.cumsum([part.size for part in parts.values()])[:-1]
    return {name: part.reshape(parts[name].shape) for name, part in zip(parts, np.split(joint, cuts), strict=True)}


def _figures(comparison: Comparison, p: dict[str, Floats]) -> dict[tuple[str, str, str], Figure]:
    """Figures by feature, scope and statistic."""
    figures = {}
    for column, feature in enumerate(NAMES.values()):
        region, _, measure = feature.name.partition("_")
        for row, scope in enumerate(comparison.scopes):
            counts = int(comparison.synthetic[row, column]), int(comparison.real[row, column])
            for name, (label, unit) in _STATISTICS.items():
                distances: Distances = getattr(comparison, name)
                if min(counts) < MIN_VALUES or np.isnan(distances.value[row, column]):
                    continue
                key, label = f"{SECTION}.{region}.{scope}.{measure}.{name}", f"{feature.label}, {scope} ({label})"
                place, one_p = (distances, row, column), float(p[name][row, column])
                figures[feature.name, scope, name] = _figure(key, label, place, counts, one_p, unit, feature.meaning)
    return figures


def _figure(
    key: str, label: str, place: tuple[Distances, int, int], counts: tuple[int, int], p: float, unit: str, note: str
) -> Figure:
    distances, row, column = place

    def number(name: str) -> float | None:
        value = float(getattr(distances, name)[row, column])
        return None if np.isnan(value) else value

    value, middle = float(distances.value[row, column]), number("floor")
    floor = None if middle is None else Interval(middle, number("floor_low"), number("floor_high"))
    if floor is None:
        note = f"{note}; no floor: too few groups of real images have a value to be halved"
    if number("low") is None:
        note = f"{note}; no interval: most resamples hold no value"
    flagged = floor is not None and floor.high is not None and value > floor.high and p < ALPHA
    ends, p_value = (number("low"), number("high")), None if np.isnan(p) else p
    return Figure(key, label, Interval(value, *ends), floor, *counts, unit=unit, p=p_value, flagged=flagged, note=note)


def _evidence(comparison: Comparison, figures: dict[tuple[str, str, str], Figure], tables: Tables) -> list[Evidence]:
    """What the figures of each feature and scope say together, the worst first."""
    found = []
    for row, scope in enumerate(comparison.scopes):
        for column, name in enumerate(NAMES):
            pair = [figures[key] for kind in _STATISTICS if (key := (name, scope, kind)) in figures]
            if not pair:
                continue
            values = _values(tables, scope, name)
            sides = [values[side] for side in ("synthetic", "real")]
            medians = [float(np.median(side)) for side in sides]
            ranges = [float(high - low) for low, high in (np.percentile(side, [25.0, 75.0]) for side in sides)]
            shift = float(comparison.shift[row, column])
            found.append(Evidence(NAMES[name], scope, tuple(pair), shift, medians, ranges))
    return sorted(found, key=lambda item: (item.flagged, item.excess), reverse=True)


def _with_headlines(figures: list[Figure], evidence: list[Evidence]) -> list[Figure]:
    """All figures; the worst of each of the worst regions is a headline, so that one defect does not fill them all.

    Where fewer regions are flagged than there are headlines, figures over all classes fill the gap: they vary least.
    """
    widest = [item for item in evidence if item.flagged or item.scope not in LESION_CLASSES]
    chosen: dict[str, str] = {}
    for item in widest or evidence:
        region = item.feature.name.partition("_")[0]
        if len(chosen) < HEADLINES:
            chosen.setdefault("image" if region == "background" else region, item.worst.key)
    return [replace(figure, headline=figure.key in chosen.values()) for figure in figures]


def _add_notes(context: AuditContext, comparison: Comparison, result: SectionResult) -> None:
    counts = np.minimum(comparison.synthetic, comparison.real).max(axis=1)
    few = [scope for scope, count in zip(comparison.scopes, counts, strict=True) if count < FEWEST_TO_FLAG]
    if few:
        result.note(f"Fewer than {FEWEST_TO_FLAG} images on one side in {', '.join(few)}: shown, but never flagged.")
    mine, theirs = (set(side.table["class"].to_list()) for side in (context.synthetic, context.real))
    for label in sorted(mine ^ theirs):
        owner = "synthetic" if label in mine else "real"
        then = "they are left out" if mine & theirs else "the sets share no class, so classes are ignored"
        result.note(f"Only the {owner} set has images of class {label}: {then}.")
    if comparison.reweighted:
        result.note("The sets mix their classes differently; 'all' weighs each class by its share of the real set.")
    if context.backgrounds == "real":
        result.note(
            "The images are painted into real ones: background, depth and whole-image figures are partly those of real "
            "images. Lesion, ring, outline and posterior figures judge the generator."
        )


def _plot(context: AuditContext, tables: Tables, evidence: list[Evidence]) -> list[Picture]:
    """Draw the two curves and the worst features' distributions into the section's folder."""
    names = [f"depth_{band}" for band in range(1, DEPTH_BANDS + 1)]
    curves = [
        _curves(
            context,
            "depth-profile",
            (np.arange(DEPTH_BANDS) + 0.5) / DEPTH_BANDS,
            {side: table.select(names).to_numpy() for side, table in tables.items()},
            ("depth (0 skin, 1 lower edge)", "brightness / image mean"),
            "Mean brightness of bands of equal depth over that of the image, lesions left out. Grey: where the means "
            "of halves of the real set lie.",
        ),
        _curves(
            context,
            "power-spectrum",
            speckle.FREQUENCIES,
            {side: _spectra(context, getattr(context, side)) for side in tables},
            ("cycles per pixel", "power (dB)"),
            "Radially averaged power spectrum, each image scaled to unit power. A curve that falls below the real one "
            "towards the right is a set of smoothed images; one that flattens is noise. Grey: halves of the real set.",
            logarithmic=True,
        ),
    ]
    worst: dict[str, Evidence] = {}
    for item in evidence:
        worst.setdefault(item.feature.name, item)
    return [picture for picture in curves if picture is not None] + [
        _distribution(context, tables, item, f"distribution-{place}")
        for place, item in enumerate(list(worst.values())[:DISTRIBUTIONS], start=1)
    ]


def _spectra(context: AuditContext, images: ImageSet) -> Floats:
    """Spectra in dB of images drawn evenly from the set, ``(N, bins)``; NaN rows for the others."""
    found = np.full((len(images), len(speckle.FREQUENCIES)), np.nan)
    rows = np.unique(np.linspace(0, len(images) - 1, min(SPECTRA, len(images))).astype(np.int64))
    for row in context.track(f"spectra of {images.name}", rows, len(rows)):
        tissue = images.valid[row] & ~images.overlays[row]
        power = speckle.radial_spectrum(images.images[row].astype(np.float32), tissue)
        if (power > 0).all():
            found[row] = 10 * np.log10(power / power.sum())
    return found


def _curves(
    context: AuditContext,
    name: str,
    axis: Floats,
    curves: dict[str, Floats],
    labels: tuple[str, str],
    caption: str,
    *,
    logarithmic: bool = False,
) -> Picture | None:
    """Both sets' means with a band of halves of the real set; None where a point is known of no image."""
    if any(np.isnan(values).all(axis=0).any() for values in curves.values()):
        return None
    rng = context.rng("physics", "plots", name)
    groups = context.real.groups
    with _axes(context, name, *labels) as axes:
        means = []
        for _ in range(_HALVINGS if len(np.unique(groups)) >= 2 else 0):
            half = curves["real"][halves(groups, rng)[0]]
            if not np.isnan(half).all(axis=0).any():
                means.append(np.nanmean(half, axis=0))
        if means:
            low, high = np.percentile(means, [2.5, 97.5], axis=0)
            axes.fill_between(axis, low, high, color=_BAND, linewidth=0, label="halves of real")
        for side, style in (("real", {"color": _REAL}), ("synthetic", {"color": _SYNTHETIC, "linestyle": "--"})):
            axes.plot(axis, np.nanmean(curves[side], axis=0), linewidth=1.6, label=side, **style)
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
        axes.legend()
    return Picture(f"{name}.svg", caption)


def _distribution(context: AuditContext, tables: Tables, item: Evidence, name: str) -> Picture:
    feature = item.feature
    values = _values(tables, item.scope, feature.name)
    low, high = np.percentile(np.concatenate(list(values.values())), [0.5, 99.5])
    bins = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    unit = f" ({feature.unit})" if feature.unit else ""
    # One side filled: they stay apart where a printer has no colours.
    styles: dict[str, Any] = {
        "real": {"histtype": "stepfilled", "facecolor": _BAND, "edgecolor": _REAL, "linewidth": 0.8},
        "synthetic": {"histtype": "step", "color": _SYNTHETIC, "linewidth": 1.8},
    }
    with _axes(context, name, f"{feature.label}{unit}, {item.scope}", "share of images (%)") as axes:
        for side, style in styles.items():
            count = len(values[side])
            weights = np.full(count, 100.0 / count)
            axes.hist(values[side], bins, weights=weights, label=f"{side} (n = {count})", **style)
        axes.legend()
    figure = item.figures[0]
    floor = "" if figure.floor is None else f" (floor up to {figure.floor.high:.2f})"
    caption = f"{feature.label}, {item.scope}: {feature.meaning}. Kolmogorov-Smirnov {figure.value.value:.2f}{floor}."
    return Picture(f"{name}.svg", caption)


@contextmanager
def _axes(context: AuditContext, name: str, across: str, up: str) -> Iterator[Any]:
    """Axes to draw on; the plot is written when the block ends."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        canvas: Any = FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        yield axes
        with output_errors(context.out), atomic_path(context.folder("physics") / f"{name}.svg") as temporary:
            canvas.print_svg(str(temporary), metadata={"Date": None})


@dataclass(frozen=True)
class Evidence:
    """What one feature shows in one scope, a class or ``all``: medians and interquartile ranges, synthetic then real.

    ``shift``: Probability that a synthetic value exceeds a real one, minus 0.5.
    """

    feature: Feature
    scope: str
    figures: tuple[Figure, ...]
    shift: float
    medians: Sequence[float]
    ranges: Sequence[float]

    @property
    def flagged(self) -> bool:
        """One of its figures is."""
        return any(figure.flagged for figure in self.figures)

    @property
    def excess(self) -> float:
        """The greatest ratio of a value to its floor's upper end; 0 without floors."""
        return max((_excess(figure) for figure in self.figures), default=0.0)

    @property
    def worst(self) -> Figure:
        """The figure with that ratio; flagged ones come first."""
        return max(self.figures, key=lambda figure: (figure.flagged, _excess(figure)))


def _excess(figure: Figure) -> float:
    high = figure.floor and figure.floor.high
    return figure.value.value / high if high else 0.0


@dataclass(frozen=True)
class Pattern:
    """A defect that raises some features and lowers others, of which at least ``needed`` must have moved so.

    ``still``: Features of which none is flagged, or another defect explains it: noise hides margins as well.
    ``mirrored``: One whose median must also have changed sign, by at least half of its size; empty for none.
    """

    text: str
    raised: Sequence[str]
    lowered: Sequence[str]
    needed: int
    still: Sequence[str] = ()
    mirrored: str = ""


PATTERNS = tuple(Pattern(**row) for row in read_json(Path(__file__).with_name("patterns.json")))
"""In the order of the report."""


def describe(evidence: list[Evidence], result: SectionResult) -> None:
    """Add the flags to a result that holds its figures: what features say together, then one by one."""
    for figure in result.figures:
        if figure.flagged and figure.key.endswith("classes.swap"):
            swap = figure.value.value
            result.flag(
                "Classes look exchanged: benign images resemble real malignant ones, and the other way round."
                if swap >= SWAPPED
                else f"Benign and malignant images differ only {100 * (1 - 2 * swap):.0f} % as far as real ones do.",
                figure.key,
            )
    flagged: dict[str, list[Evidence]] = {}
    for item in evidence:
        if item.flagged:
            flagged.setdefault(item.feature.name, []).append(item)
    for pattern in PATTERNS:
        keys = []
        for names, sign in ((pattern.raised, 1.0), (pattern.lowered, -1.0)):
            for name in names:
                moved = [item for item in flagged.get(name, []) if item.shift * sign > CLEAR_SHIFT]
                keys += [item.worst.key for item in moved[:1]]
        medians = [item.medians for item in flagged.get(pattern.mirrored, [])]
        mirrored = not pattern.mirrored or any(synthetic * real < -(real**2) / 2 for synthetic, real in medians)
        if len(keys) >= pattern.needed and flagged.keys().isdisjoint(pattern.still) and mirrored:
            result.flag(pattern.text, *keys)
    items = list(flagged.values())
    for same in items[:MOST_SENTENCES]:
        result.flag(_sentence(same), *(item.worst.key for item in same))
    if rest := items[MOST_SENTENCES:]:
        labels = ", ".join(same[0].feature.label for same in rest)
        result.flag(f"{len(rest)} more features differ: {labels}.", *(same[0].worst.key for same in rest))


def _sentence(same: list[Evidence]) -> str:
    worst = same[0]
    feature = worst.feature
    scopes = ", ".join(item.scope for item in same)
    if abs(worst.shift) > CLEAR_SHIFT:
        claim = f"The images {feature.more if worst.shift > 0 else feature.less}"
    else:
        narrower = worst.ranges[0] < worst.ranges[1]
        claim = f"The images' {feature.label} varies {'less' if narrower else 'otherwise'} than real"
    unit = f" {feature.unit}" if feature.unit else ""
    figure = worst.worst
    floor = "" if figure.floor is None else f", floor up to {figure.floor.high:.2f}"
    mine, theirs = (f"{median:.3g}{unit}" for median in worst.medians)
    measured = f"{feature.label[0].upper()}{feature.label[1:]}: median {mine} against {theirs}"
    return f"{claim} ({scopes}). {measured} ({worst.scope}; distance {figure.value.value:.2f}{floor})."
