"""The physics section's plots: worst distributions, depth profile, power spectrum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.evaluation.comparing import two_sample
from busigen.evaluation.comparing.statistics import halves
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.physics import speckle
from busigen.evaluation.physics.feature_table import DEPTH_BANDS
from busigen.evaluation.physics.findings import Evidence
from busigen.evaluation.results import Picture
from busigen.runtime.atomic import atomic_path, output_errors

DISTRIBUTIONS = 4
"""Features whose distributions are drawn; with the two curves that makes six plots."""

SPECTRA = 200
"""Images per set whose spectra are averaged: more would not move the curves visibly."""

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


def plot(context: AuditContext, tables: dict[str, pl.DataFrame], evidence: list[Evidence]) -> list[Picture]:
    """Draw everything into the section's folder.

    Args:
        context: The audit.
        tables: ``real`` and ``synthetic``, from `radiomics.features`.
        evidence: The worst first.

    Returns:
        The pictures, at most six.

    Raises:
        OutputError: The folder cannot be written.
    """
    pictures = [_depth(context, tables), _spectrum(context)]
    worst: dict[str, Evidence] = {}
    for item in evidence:
        worst.setdefault(item.feature.name, item)
    for place, item in enumerate(list(worst.values())[:DISTRIBUTIONS], start=1):
        pictures.append(_distribution(context, tables, item, f"distribution-{place}"))
    return [picture for picture in pictures if picture is not None]


def _depth(context: AuditContext, tables: dict[str, pl.DataFrame]) -> Picture | None:
    names = [f"depth_{band}" for band in range(1, DEPTH_BANDS + 1)]
    curves = {side: table.select(names).to_numpy() for side, table in tables.items()}
    axis = (np.arange(DEPTH_BANDS) + 0.5) / DEPTH_BANDS
    caption = (
        "Mean brightness of bands of equal depth over that of the image, lesions left out. Grey: where the means of "
        "halves of the real set lie."
    )
    labels = ("depth (0 skin, 1 lower edge)", "brightness / image mean")
    return _curves(context, "depth-profile", axis, curves, labels, caption)


def _spectrum(context: AuditContext) -> Picture | None:
    curves = {side: _spectra(context, getattr(context, side)) for side in ("real", "synthetic")}
    caption = (
        "Radially averaged power spectrum, each image scaled to unit power. A curve that falls below the real one "
        "towards the right is a set of smoothed images; one that flattens is noise. Grey: halves of the real set."
    )
    return _curves(
        context,
        "power-spectrum",
        speckle.FREQUENCIES,
        curves,
        ("cycles per pixel", "power (dB)"),
        caption,
        logarithmic=True,
    )


def _spectra(context: AuditContext, images: ImageSet) -> NDArray[np.float64]:
    """Spectra in dB of images drawn evenly from the set, ``(N, bins)``; NaN rows for the others."""
    found = np.full((len(images), len(speckle.FREQUENCIES)), np.nan)
    rows = np.unique(np.linspace(0, len(images) - 1, min(SPECTRA, len(images))).astype(np.int64))
    for row in context.track(f"spectra of {images.name}", rows, len(rows)):
        power = speckle.radial_spectrum(
            images.images[row].astype(np.float32), images.valid[row] & ~images.overlays[row]
        )
        if (power > 0).all():
            found[row] = 10 * np.log10(power / power.sum())
    return found


def _curves(
    context: AuditContext,
    name: str,
    axis: NDArray[np.float64],
    curves: dict[str, NDArray[np.float64]],
    labels: tuple[str, str],
    caption: str,
    *,
    logarithmic: bool = False,
) -> Picture | None:
    if any(np.isnan(values).all(axis=0).any() for values in curves.values()):
        return None
    rng = context.rng("physics", "plots", name)
    groups = context.real.groups
    with _axes(context, name, *labels) as axes:
        if len(np.unique(groups)) >= 2:
            means = []
            for _ in range(_HALVINGS):
                half = curves["real"][halves(groups, rng)[0]]
                if not np.isnan(half).all(axis=0).any():
                    means.append(np.nanmean(half, axis=0))
            if means:
                low, high = np.percentile(means, [2.5, 97.5], axis=0)
                axes.fill_between(axis, low, high, color=_BAND, linewidth=0, label="halves of real")
        axes.plot(axis, np.nanmean(curves["real"], axis=0), color=_REAL, linewidth=1.6, label="real")
        axes.plot(
            axis,
            np.nanmean(curves["synthetic"], axis=0),
            color=_SYNTHETIC,
            linewidth=1.6,
            linestyle="--",
            label="synthetic",
        )
        if logarithmic:
            axes.set_xscale("log")
            axes.set_xticks([0.01, 0.03, 0.1, 0.3], ["0.01", "0.03", "0.1", "0.3"])
        axes.legend()
    return Picture(f"{name}.svg", caption)


def _distribution(context: AuditContext, tables: dict[str, pl.DataFrame], item: Evidence, name: str) -> Picture:
    feature = item.feature
    values = {}
    for side, table in tables.items():
        rows = table if item.scope == two_sample.ALL else table.filter(pl.col("class") == item.scope)
        values[side] = rows[feature.name].fill_nan(None).drop_nulls().to_numpy()
    low, high = np.percentile(np.concatenate(list(values.values())), [0.5, 99.5])
    bins = np.linspace(low, high if high > low else low + 1.0, _BINS + 1)
    unit = f" ({feature.unit})" if feature.unit else ""
    with _axes(context, name, f"{feature.label}{unit}, {item.scope}", "share of images (%)") as axes:
        # One side filled: they stay apart where a printer has no colours.
        styles: dict[str, Any] = {
            "real": {"histtype": "stepfilled", "facecolor": _BAND, "edgecolor": _REAL, "linewidth": 0.8},
            "synthetic": {"histtype": "step", "color": _SYNTHETIC, "linewidth": 1.8},
        }
        for side, style in styles.items():
            part = values[side]
            axes.hist(
                part, bins, weights=np.full(len(part), 100.0 / len(part)), label=f"{side} (n = {len(part)})", **style
            )
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
        folder = context.out
        with output_errors(folder), atomic_path(context.folder("physics") / f"{name}.svg") as temporary:
            canvas.print_svg(str(temporary), metadata={"Date": None})
