"""The real-or-synthetic test's plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure as Canvas

from busigen.evaluation.results import Interval

Row = tuple[str, Interval, tuple[float, float], Interval | None]
"""Label, AUC, null band, floor."""


def plot(file: Path, rows: Sequence[Row]) -> None:
    """Draw one line per classifier and view as SVG: AUC with interval, null band as a bar, floor as a thin line."""
    canvas = Canvas(figsize=(6.4, 0.9 + 0.45 * len(rows)), layout="constrained")
    axes = canvas.subplots()
    for y, (_, value, null, floor) in enumerate(rows):
        axes.barh(y, null[1] - null[0], left=null[0], height=0.5, color="0.85")
        if floor is not None and floor.low is not None and floor.high is not None:
            axes.plot([floor.low, floor.high], [y + 0.32] * 2, color="0.45", linewidth=1)
        if value.low is not None and value.high is not None:
            axes.plot([value.low, value.high], [y, y], color="C0", linewidth=2)
        axes.plot(value.value, y, "o", color="C0")
    axes.axvline(0.5, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xlim=(0.3, 1.01), ylim=(len(rows) - 0.4, -0.6), yticks=range(len(rows)), xlabel="AUC")
    axes.set_yticklabels([row[0] for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    canvas.savefig(file, format="svg", metadata={"Date": None})
