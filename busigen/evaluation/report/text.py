"""Numbers and verdicts of the audit as a reader meets them in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeGuard

from busigen.evaluation.context import Figure, Interval

NOTHING = "–"  # Stands where there is no number
SHOULD_BE = {"lower": "not above floor", "higher": "not below floor", "near": "inside floor"}
"""Where a figure should lie, per ``Figure.better``."""

WORTH = {"lower": "lower is better", "higher": "higher is better", "near": "near is better"}
"""What a figure without a floor should do, per ``Figure.better``."""

PRIVACY = {
    "real": "The synthetic images were painted into real ones. Every pixel outside the painted region is still the "
    "patient's own, by construction: such a set is not private towards these patients, and not anonymous, whatever the "
    "privacy section's figures say, and may be passed on only as those real images may. The figures on lesion crops "
    "say whether it also shows lesions of the training set.",
    "synthetic": "The synthetic images have synthetic backgrounds, so no pixel was copied from a patient's image on "
    "purpose. What a network remembers of its training images may still show, and the privacy section's figures look "
    "for that. They can find copies; they cannot prove that there are none, and are no guarantee in the sense of "
    "differential privacy.",
    "unknown": "It is not known what the synthetic images were painted into. If it was real images, every pixel "
    "outside the painted region is still the patient's own, and the set is neither private nor anonymous, whatever the "
    "privacy section's figures say.",
}
"""What is private and what is not, per ``AuditContext.backgrounds``: for the privacy section and for every report."""

_SIGNIFICANT, _TINY = 3, 1e-3
_TIED = "\N{NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def known(value: float | None) -> TypeGuard[float]:
    """The value is a number: not None, not NaN, not infinite."""
    return value is not None and math.isfinite(value)


def _decimals(values: Iterable[float]) -> int:
    """Digits after the point that give the greatest of some values three significant ones."""
    greatest = max(map(abs, values))
    return max(0, _SIGNIFICANT - 1 - math.floor(math.log10(greatest))) if greatest else 0


def number(value: float | None, places: int | None = None) -> str:
    """A number for people: three significant digits, or ``places`` after the point; a dash where it is none.

    Whole numbers stay whole, thousands are set apart, and the tiny are written with a power of ten.
    """
    if not known(value):
        return NOTHING
    if places is None:
        if value == 0:
            return "0"
        if abs(value) < _TINY:
            return interval(Interval(value))
        places = 0 if float(value).is_integer() else _decimals([value])
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def interval(part: Interval | None, unit: str = "") -> str:
    """``5.20 % [4.16, 6.34]``: all three to the same digit, chosen for the greatest; a dash where there is none.

    The tiny are ``3.10 [2.10, 4.20] × 10⁻⁵``, with one power of ten for all three.
    """
    if part is None or not known(part.value):
        return NOTHING
    numbers = [value for value in (part.value, part.low, part.high) if known(value)]
    greatest = max(map(abs, numbers))
    scale, power = 1.0, ""
    places = None
    if 0 < greatest < _TINY:
        exponent = math.floor(math.log10(greatest))
        scale, places = 10.0**-exponent, 2
        power = f"{_TIED}×{_TIED}10{str(exponent).translate(_SUPERSCRIPT)}"
    elif not all(float(value).is_integer() for value in numbers):
        places = max(_decimals(numbers), min(_decimals([part.value]), 4))
    unit = f"{_TIED}{unit}" if unit else ""
    ends = ""
    if known(part.low) and known(part.high):
        ends = f" [{number(part.low * scale, places)},{_TIED}{number(part.high * scale, places)}]"
    value = number(part.value * scale, places)
    return f"{value}{ends}{power}{unit}" if power else f"{value}{unit}{ends}"


def counts(figure: Figure) -> str:
    """``500 / 419``: synthetic and real images behind a figure."""
    return f"{figure.synthetic:,}{_TIED}/{_TIED}{figure.real:,}"


def sentence(figure: Figure) -> str:
    """``0.620 [0.583, 0.661], floor 0.510 [0.450, 0.560], n = 500 / 419``."""
    floor = f"floor {interval(figure.floor, figure.unit)}" if figure.floor is not None else "no floor"
    return f"{interval(figure.value, figure.unit)}, {floor}, n{_TIED}={_TIED}{counts(figure)}"


def probability(p: float | None) -> str:
    """A p-value: below 0.001 only that, otherwise two significant digits."""
    if not known(p):
        return NOTHING
    return f"<{_TIED}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``37 s``, ``3 min 05 s`` or ``1 h 02 min``."""
    if not known(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def excess(figure: Figure) -> float:
    """How far a value lies on the wrong side of its floor's interval, in widths of it: ranks, never flags."""
    ends, value = _floor_ends(figure), figure.value.value
    if figure.floor is None or ends is None:
        return 0.0
    low, high = ends
    above, below = value - high, low - value
    beyond = {"lower": above, "higher": below, "near": max(above, below)}[figure.better]
    # A floor such as 0 [0, 0] has no width to measure in; a tenth of the greater number then stands in.
    width = max(high - low, 0.1 * max(abs(value), abs(figure.floor.value)))
    return max(0.0, beyond) / width if width > 0 else 0.0


def place(figure: Figure) -> str:
    """Where the value lies, in words, for those who do not see the chart."""
    ends, value = _floor_ends(figure), figure.value.value
    if ends is None:
        return "no floor to compare with"
    where = "above the floor" if value > ends[1] else "below the floor" if value < ends[0] else "inside the floor"
    return f"{where}, flagged" if figure.flagged else where


def _floor_ends(figure: Figure) -> tuple[float, float] | None:
    """Where the floor's interval begins and ends; None where there is nothing to compare."""
    floor = figure.floor
    if floor is None or not known(figure.value.value) or not known(floor.value):
        return None
    return floor.value if floor.low is None else floor.low, floor.value if floor.high is None else floor.high


def capital(text: str) -> str:
    """The text with its first letter as at the start of a sentence."""
    return text[:1].upper() + text[1:]
