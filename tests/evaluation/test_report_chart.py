from __future__ import annotations

from typing import Any

import pytest

from busigen.evaluation.context import Figure, Interval
from busigen.evaluation.report import text as words
from busigen.evaluation.report.page import chosen, panels


def figure(key: str, value: float = 0.62, **others: Any) -> Figure:
    return Figure(key, key, Interval(value, value - 0.04, value + 0.04), Interval(0.51, 0.45, 0.56), 500, 419, **others)


def test_a_chart_shows_flagged_figures_before_others_and_the_worst_of_those() -> None:
    figures = [figure(f"physics.{k}", 0.6 + k / 100, flagged=k < 5) for k in range(40)]
    figures[20] = figure("physics.20", 0.5, headline=True)
    assert [part.key for part in chosen(figures, 4)] == ["physics.2", "physics.3", "physics.4", "physics.20"]
    assert [part.key for part in chosen(figures, 7)][-2:] == ["physics.20", "physics.39"]


def test_marks_lie_where_the_axis_says() -> None:
    (panel,) = panels([figure("a", 0.9), figure("b", 0.5)])
    ticks = {float(label): at for at, label in panel.ticks}
    (first, low), (last, high) = min(ticks.items()), max(ticks.items())
    for row in panel.rows:
        assert row.value is not None and row.low is not None and row.high is not None
        expected = low + (row.figure.value.value - first) / (last - first) * (high - low)
        # Places are rounded to a hundredth of a percent.
        assert row.value == pytest.approx(expected, abs=0.02)
        assert 0 <= row.low < row.value < row.high <= 100


def test_figures_of_other_units_and_sizes_get_axes_of_their_own() -> None:
    figures = [figure("a"), figure("b", unit="px"), figure("c", 0.7), figure("d", 900.0)]
    assert [[row.figure.key for row in panel.rows] for panel in panels(figures)] == [["a", "c"], ["b"], ["d"]]


@pytest.mark.parametrize(
    ("interval", "unit", "text"),
    [
        (Interval(0.62, 0.58, 0.66), "", "0.620 [0.580, 0.660]"),
        (Interval(12.345, 11.0, 14.2), "%", "12.3 % [11.0, 14.2]"),
        (Interval(3.0), "", "3"),
        (Interval(0.0, 0.0, 0.0), "%", "0 % [0, 0]"),
        (Interval(-1.234, -2.0, -0.5), "dB", "−1.23 dB [−2.00, −0.50]"),
        (Interval(1234.5, 1100.2, 1300.9), "", "1,234 [1,100, 1,301]"),
        (Interval(3.1e-5, 2.1e-5, 4.2e-5), "", "3.10 [2.10, 4.20] × 10⁻⁵"),
        (Interval(0.5, None, 0.6), "", "0.500"),
        (Interval(float("nan"), 0.1, 0.2), "px", "–"),
        (None, "px", "–"),
    ],
)
def test_numbers_are_written_for_people(interval: Interval | None, unit: str, text: str) -> None:
    assert words.interval(interval, unit).replace("\N{NO-BREAK SPACE}", " ") == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.42, "0.4 s"), (59.7, "1 min 00 s"), (3725, "1 h 02 min"), (None, "–")]
)
def test_durations(seconds: float | None, text: str) -> None:
    assert words.duration(seconds) == text
