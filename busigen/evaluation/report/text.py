"""Numbers and verdicts of the audit as a reader meets them in the report."""

from __future__ import annotations

import math
from collections.abc import Iterable

from busigen.evaluation.results import Figure, Interval

NOTHING = "–"
"""Stands where there is no number."""

SHOULD_BE = {"lower": "not above floor", "higher": "not below floor", "near": "inside floor"}
"""Where a figure should lie, per ``Figure.better``."""

WORTH = {"lower": "lower is better", "higher": "higher is better", "near": "near is better"}
"""What a figure without a floor should do, per ``Figure.better``."""

_SIGNIFICANT = 3
_TINY = 1e-3
_TIED = "\N{NO-BREAK SPACE}"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def known(value: float | None) -> bool:
    """The value is a number: not None, not NaN, not infinite."""
    return value is not None and math.isfinite(value)


def decimals(values: Iterable[float | None]) -> int:
    """Digits after the point that give the greatest of some values three significant ones."""
    greatest = max((abs(value) for value in values if value is not None and math.isfinite(value)), default=0.0)
    if greatest == 0:
        return 0
    return max(0, _SIGNIFICANT - 1 - math.floor(math.log10(greatest)))


def number(value: float | None, places: int | None = None) -> str:
    """A number for people: three significant digits, or ``places`` after the point.

    Whole numbers stay whole, thousands are set apart, and what is too small for decimals is written with a power of
    ten. None, NaN and infinities give a dash.
    """
    if value is None or not math.isfinite(value):
        return NOTHING
    if value == 0 and places is None:
        return "0"
    if places is None and float(value).is_integer():
        return _signed(f"{value:,.0f}")
    if 0 < abs(value) < _TINY and places is None:
        return interval(Interval(value))
    return _signed(f"{value:,.{decimals([value]) if places is None else places}f}")


def interval(part: Interval | None, unit: str = "") -> str:
    """``5.20 % [4.16, 6.34]``: all three to the same digit, chosen for the greatest; a dash where there is none."""
    if part is None or not known(part.value):
        return NOTHING
    numbers = [value for value in (part.value, part.low, part.high) if value is not None and math.isfinite(value)]
    if 0 < max(map(abs, numbers)) < _TINY:
        return _powers(part, numbers, unit)
    whole = all(float(value).is_integer() for value in numbers)
    places = None if whole else max(decimals(numbers), min(decimals([part.value]), 4))
    return number(part.value, places) + (f"{_TIED}{unit}" if unit else "") + _bounds(part, places)


def counts(figure: Figure) -> str:
    """``500 / 419``: synthetic and real images behind a figure."""
    return f"{figure.synthetic:,}{_TIED}/{_TIED}{figure.real:,}"


def sentence(figure: Figure) -> str:
    """``0.620 [0.583, 0.661], floor 0.510 [0.450, 0.560], n = 500 / 419``."""
    floor = f"floor {interval(figure.floor, figure.unit)}" if figure.floor is not None else "no floor"
    return f"{interval(figure.value, figure.unit)}, {floor}, n{_TIED}={_TIED}{counts(figure)}"


def probability(p: float | None) -> str:
    """A p-value: below 0.001 only that, otherwise two significant digits."""
    if p is None or not math.isfinite(p):
        return NOTHING
    return f"<{_TIED}0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def duration(seconds: float | None) -> str:
    """``0.4 s``, ``37 s``, ``3 min 05 s`` or ``1 h 02 min``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def excess(figure: Figure) -> float:
    """How far a value lies on the wrong side of its floor's interval, in widths of that interval; 0 within.

    It ranks figures of different units for the report's summary; it decides no flag.
    """
    ends, value = _floor_ends(figure), figure.value.value
    if figure.floor is None or ends is None:
        return 0.0
    low, high = ends
    above, below = value - high, low - value
    beyond = {"lower": above, "higher": below, "near": max(above, below)}[figure.better]
    # A floor such as 0 [0, 0] has no width to measure in; a tenth of the greater number then stands in.
    width = max(high - low, 0.1 * max(abs(value), abs(figure.floor.value)))
    return max(0.0, beyond) / width if width > 0 else 0.0


def capital(text: str) -> str:
    """The text with its first letter as at the start of a sentence."""
    return text[:1].upper() + text[1:]


def place(figure: Figure) -> str:
    """Where the value lies, in words, for those who do not see the chart."""
    ends, value = _floor_ends(figure), figure.value.value
    if ends is None:
        return "no floor to compare with"
    low, high = ends
    where = "above the floor" if value > high else "below the floor" if value < low else "inside the floor"
    return f"{where}, flagged" if figure.flagged else where


def _floor_ends(figure: Figure) -> tuple[float, float] | None:
    """Where the floor's interval begins and ends; None where there is nothing to compare."""
    floor = figure.floor
    if floor is None or not known(figure.value.value) or not known(floor.value):
        return None
    return floor.value if floor.low is None else floor.low, floor.value if floor.high is None else floor.high


def _bounds(part: Interval, places: int | None, scale: float = 1.0) -> str:
    if part.low is None or part.high is None or not (math.isfinite(part.low) and math.isfinite(part.high)):
        return ""
    return f" [{number(part.low * scale, places)},{_TIED}{number(part.high * scale, places)}]"


def _powers(part: Interval, numbers: list[float], unit: str) -> str:
    """``3.10 [2.10, 4.20] × 10⁻⁵``: one power of ten for all three."""
    exponent = math.floor(math.log10(max(map(abs, numbers))))
    scale = 10.0**-exponent
    text = number(part.value * scale, 2) + _bounds(part, 2, scale)
    power = f"{_TIED}×{_TIED}10{str(exponent).translate(_SUPERSCRIPT)}"
    return text + power + (f"{_TIED}{unit}" if unit else "")


def _signed(text: str) -> str:
    return text.replace("-", "\N{MINUS SIGN}")


SMALL = 100
"""Images of a set below which the report warns that only large differences can show."""

UNANSWERED = "Not every section ran. Unanswered: {sections}"

SMALL_SET = "A headline figure rests on {fewest} images of one side: with so few, only large differences can show."

TINY_SET = (
    "A headline figure rests on {fewest} images of one side. Below {least}, comparisons are never flagged, and silence "
    "says nothing."
)

NO_TRAIN = "No training images were named, so nothing here compares the set with what its generator was trained on."

QUICK = "This was a quick run: smaller networks, fewer seeds. A full run can find what this one does not."

CANNOT_SAY = (
    "Silent means: no difference passed both the test and the floor, or there were too few images to judge one. It "
    "does not mean that there is none.",
    "Floors come from halves of the real set. Where the synthetic set is smaller than such a half, chance alone lifts "
    "its distances above the floor; the p-value knows the sizes, the floor does not.",
    "Every figure is relative to this real set. Other scanners, hospitals and patients may differ from it by more than "
    "the synthetic set does.",
    "No reader looked at the images: whether a lesion is plausible to a radiologist is not measured.",
)

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
