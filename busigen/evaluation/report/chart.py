"""The report's chart: every figure's dot and interval against its floor, on axes that figures of one scale share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from busigen.evaluation.report.words import excess, known, number
from busigen.evaluation.results import Figure, Interval

ROWS = 14
"""Figures that a section's chart shows at most; the table below it has them all."""

_MARGIN = 4.0
"""Percent of the axis left free at either end, so that no mark is cut."""

_SAME_SCALE = 8.0
"""Figures share an axis while the greatest is at most this many times the smallest: below, intervals turn to dots."""


_Place = Callable[[float | None], float | None]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis. ``at`` in percent of its length."""

    at: float
    label: str


@dataclass(frozen=True)
class Row:
    """One figure's marks, in percent of the axis; None where the figure has no such number.

    Attributes:
        figure: What is drawn.
        value: The dot.
        low: Lower end of its interval.
        high: Upper end.
        floor: The floor's tick.
        floor_low: Left edge of its band.
        floor_width: The band's width.
    """

    figure: Figure
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    floor_low: float | None
    floor_width: float | None


@dataclass(frozen=True)
class Panel:
    """Figures of one unit and scale, on one axis."""

    unit: str
    ticks: tuple[Tick, ...]
    rows: tuple[Row, ...]


def chosen(figures: Sequence[Figure], rows: int = ROWS) -> list[Figure]:
    """The figures a chart shows, in their own order.

    Headlines are taken before flagged ones, those before the rest, and of equals those furthest beyond their floors.
    """
    drawable = [figure for figure in figures if known(figure.value.value)]
    ranked = sorted(drawable, key=lambda figure: (not figure.headline, not figure.flagged, -excess(figure)))
    kept = {figure.key for figure in ranked[:rows]}
    return [figure for figure in drawable if figure.key in kept]


def panels(figures: Sequence[Figure]) -> list[Panel]:
    """Axes for some figures: figures of one unit share an axis while they are of about the same size."""
    groups: list[list[Figure]] = []
    for figure in figures:
        fitting = (group for group in groups if group[0].unit == figure.unit and _alike([*group, figure]))
        group = next(fitting, None)
        if group is None:
            groups.append([figure])
        else:
            group.append(figure)
    return [_panel(group) for group in groups]


def _panel(group: Sequence[Figure]) -> Panel:
    from matplotlib.ticker import MaxNLocator

    values = [value for figure in group for value in _numbers(figure)]
    low, high = min(values), max(values)
    if low > 0 and low < 0.4 * high:
        low = 0.0
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    places = [float(tick) for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    step = places[1] - places[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += not math.isclose(step * 10**digits, round(step * 10**digits), abs_tol=1e-6)

    def at(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(_MARGIN + (100 - 2 * _MARGIN) * (value - low) / (high - low), 2)

    ticks = [(at(place), number(place, digits) if place else "0") for place in places]
    return Panel(
        unit=group[0].unit,
        ticks=tuple(Tick(place, label) for place, label in ticks if place is not None and 0 < place < 100),
        rows=tuple(_row(figure, at) for figure in group),
    )


def _row(figure: Figure, at: _Place) -> Row:
    floor = figure.floor or Interval(math.nan)
    left, right = at(floor.low), at(floor.high)
    return Row(
        figure=figure,
        value=at(figure.value.value),
        low=at(figure.value.low),
        high=at(figure.value.high),
        floor=at(floor.value),
        floor_low=left,
        floor_width=None if left is None or right is None else round(right - left, 2),
    )


def _numbers(figure: Figure) -> list[float]:
    parts = [figure.value, *([] if figure.floor is None else [figure.floor])]
    return [
        value
        for part in parts
        for value in (part.value, part.low, part.high)
        if value is not None and math.isfinite(value)
    ]


def _alike(group: Sequence[Figure]) -> bool:
    sizes = [size for size in (max(map(abs, _numbers(figure))) for figure in group) if size > 0]
    return not sizes or max(sizes) <= _SAME_SCALE * min(sizes)
