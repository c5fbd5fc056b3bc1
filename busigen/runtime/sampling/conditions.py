"""Conditions on lesions: parsing, each sample's values, measuring a mask. Shares are of the image without its bars."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask, attributes
from busigen.errors import UsageError
from busigen.registry import ATTRIBUTES, BIRADS, BIRADS_IMAGES, LESION_CLASSES, MAX_LESIONS, NORMAL, TALLER_THAN_WIDE
from busigen.runtime.sampling.noise import uniforms

BOUNDS = {"across": (0.1, 0.9), "depth": (0.08, 0.75), "size": (0.003, 0.4), "height_width": (0.25, 1.7)}
"""Least and greatest value that can be asked for: beyond lie at most 1 in 100 of BUSI's and BUS-BRA's 1,644 lesions by
any of them, too few to learn from."""

_FEW_IMAGES = 20  # training images of a category below which a user is warned that the bundle hardly knows it

_MEANINGS = {
    "across": "the share of the image's width left of the lesion's centre",
    "depth": "the share of the image's height above the lesion's centre",
    "size": "the lesion's area as a share of the image's",
    "height_width": "the lesion's height over its width",
}


@dataclass(frozen=True)
class SampleConditions:
    """The conditions of a run: a range per attribute (equal ends for a single value), weights of BI-RADS categories.

    Without weights, no category is asked for.
    """

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    birads: Mapping[str, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.ranges) or bool(self.birads)

    def typed(self) -> dict[str, str | None]:
        """Each option's value as one would type it; ``None`` where nothing was asked."""
        texts = {name: None if name not in self.ranges else range_text(self.ranges[name]) for name in ATTRIBUTES}
        return {**texts, "birads": mix_text(self.birads)}

    def values(self, seed: int, index: int, attempt: int = 0, part: int = 0) -> dict[str, float]:
        """One lesion's values, uniform in their ranges; the same for all attempts, or the gates would choose them.

        Only a grid, which keeps a background with all of its samples, gives its ``attempt``, and only a further lesion
        of a sample its ``part``.
        """
        shares = dict(zip(ATTRIBUTES, uniforms(seed, index, attempt, "asked", len(ATTRIBUTES), part), strict=True))
        return {name: low + shares[name] * (high - low) for name, (low, high) in self.ranges.items()}

    def category(self, number: int) -> str | None:
        """The BI-RADS category that is asked of a class's lesion of this number, from 0; dealt as classes are."""
        return class_at(number, self.birads) if self.birads else None

    def vector(self, values: Mapping[str, float], category: str | None, valid: Mask) -> NDArray[np.float32]:
        """Stage 1's input, (ASKED_LENGTH,) float32: attributes as `data.geometry` has them, flags, BI-RADS."""
        rows, columns = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
        found = dict.fromkeys(ATTRIBUTES, 0.0)
        if "across" in values:
            found["across"] = (columns[0] + values["across"] * columns.size) / valid.shape[1]
        if "depth" in values:
            found["depth"] = (rows[0] + values["depth"] * rows.size) / valid.shape[0]
        if "size" in values:
            found["size"] = 0.5 * np.log(values["size"] * valid.sum())
        if "height_width" in values:
            found["height_width"] = np.log(values["height_width"])
        numbers = [found[name] for name in ATTRIBUTES]
        flags = [*(name in values for name in ATTRIBUTES), *(known == category for known in BIRADS)]
        return np.array([*numbers, *flags], dtype=np.float32)


def measured(mask: Mask, valid: Mask) -> dict[str, float]:
    """The attributes of a mask in the ``valid`` part of an image, ``(256, 256)`` bool, in the units of ``BOUNDS``."""
    rows, columns = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    across, depth, _, ratio = attributes(mask)
    return {
        "across": float((across * valid.shape[1] - columns[0]) / columns.size),
        "depth": float((depth * valid.shape[0] - rows[0]) / rows.size),
        "size": float(mask.sum() / valid.sum()),
        "height_width": float(np.exp(ratio)),
    }


def parse_conditions(
    *,
    size: str | None = None,
    depth: str | None = None,
    across: str | None = None,
    height_width: str | None = None,
    taller_than_wide: bool = False,
    birads: str | None = None,
) -> SampleConditions:
    """The conditions that the options state, each a number or ``low:high``; a UsageError if one is unfit.

    ``birads`` is a category, or several with their weights: ``2:0.1,3:0.4,4:0.5``.
    """
    if taller_than_wide and height_width is not None:
        fix = f"Give one of them; --taller-than-wide is short for --height-width {TALLER_THAN_WIDE}."
        raise UsageError(f"--height-width {height_width} and --taller-than-wide are both given.", fix=fix)
    texts = {
        "across": across,
        "depth": depth,
        "size": size,
        "height_width": TALLER_THAN_WIDE if taller_than_wide else height_width,
    }
    ranges = {name: _range(name, text) for name, text in texts.items() if text is not None}
    return SampleConditions(ranges, {} if birads is None else _categories(birads))


def hardly_known(classes: Iterable[str], categories: Iterable[str]) -> Iterator[str]:
    """A warning for each class and requested BI-RADS category of which the shipped bundle has seen few images."""
    for label, category in product(classes, categories):
        if (seen := BIRADS_IMAGES[label][category]) < _FEW_IMAGES:
            yield (
                f"BI-RADS {category} with {label}: the shipped bundle learned it from {seen} images, so it "
                f"hardly knows what such lesions look like"
            )


def range_text(ends: tuple[float, float]) -> str:
    """A range as one would type it: a number where both ends are one."""
    return ":".join(map(_shortest, sorted(set(ends))))


def mix_text(weights: Mapping[str, float]) -> str | None:
    """Names with their weights as one would type them; a single name alone, and None for nothing."""
    mix = ",".join(f"{name}:{_shortest(weight)}" for name, weight in sorted(weights.items()))
    return mix if len(weights) > 1 else next(iter(weights), None)


def _shortest(value: float) -> str:
    """The shortest text that reads back as the same number: what is recorded has to draw the same samples again."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _range(name: str, text: str) -> tuple[float, float]:
    least, greatest = BOUNDS[name]
    fix = f"Give {_MEANINGS[name]}, from {least:g} to {greatest:g}"
    return range_within(f"--{name.replace('_', '-')}", text, BOUNDS[name], fix)


def range_within(option: str, text: str, bounds: tuple[float, float], fix: str) -> tuple[float, float]:
    """The ends of a number or ``low:high`` that an option gives; a UsageError if it is neither, or out of bounds.

    ``fix`` says what the option is and what its bounds are, without an end.
    """
    least, greatest = bounds
    fix = f"{fix}, as one number or a range such as {least:g}:{greatest:g}."
    parts = text.split(":")
    try:
        numbers = [float(part) for part in parts]
    except ValueError:
        numbers = []
    if not 1 <= len(numbers) <= 2:
        raise UsageError(f"{option} is {text!r}, which is neither a number nor a range.", fix=fix)
    low, high = numbers[0], numbers[-1]
    if least <= high < low <= greatest:
        raise UsageError(f"{option} is {text!r}.", fix=f"{fix} The smaller number comes first: {parts[1]}:{parts[0]}.")
    # The order of these comparisons refuses "nan", too.
    if not least <= low <= high <= greatest:
        raise UsageError(f"{option} is {text!r}.", fix=fix)
    return low, high


_MIX = f"Choose one of: {', '.join(BIRADS)}; or several with their shares, such as 2:0.1,3:0.4,4:0.3,5:0.2."
_NUMBERS = tuple(str(number + 1) for number in range(MAX_LESIONS))
_COUNTS = f"Choose one of: {', '.join(_NUMBERS)}; or several with their shares, such as 1:0.9,2:0.1."


def _categories(text: str) -> dict[str, float]:
    """Weights of BI-RADS categories by name; a UsageError for others."""
    weights = _mix(
        "--birads", text, BIRADS, "no category that can be asked for: they are whole, without a, b or c", _MIX
    )
    return _summed("--birads", text, weights, "2:1,4:3")


def parse_lesions(text: str | None) -> dict[str, float]:
    """Weights of numbers of lesions, none where each sample is to have one; a UsageError for what is no such mix."""
    if text is None:
        return {}
    weights = _mix("--lesions", text, _NUMBERS, f"no number of lesions from 1 to {MAX_LESIONS}", _COUNTS)
    weights = _summed("--lesions", text, weights, "1:9,2:1")
    return {} if weights.keys() == {"1"} else weights


def _mix(option: str, text: str, names: Collection[str], unknown: str, fix: str) -> dict[str, float]:
    """Weights by name of a text such as ``2:0.1,3:0.9``; a UsageError for other names, which it calls ``unknown``."""
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition(":"))
        if "=" in part:
            raise UsageError(f"{option} is {text!r}, with = where a colon stands before a share.", fix=fix)
        if name not in names:
            raise UsageError(f"{option} is {text!r}, and {name!r} is {unknown}.", fix=fix)
        if name in weights:
            raise UsageError(f"{option} is {text!r}, and names {name} twice.", fix=fix)
        weights[name] = _weight(option, name, value, fix)
    return weights


_EXAMPLE = f"Allowed: {', '.join(LESION_CLASSES)}; for example --classes benign=0.7,malignant=0.3."
_ROUNDED = 1e-3  # difference from 1 that the sum of shares may have: a third cannot be typed exactly


def parse_classes(text: str) -> dict[str, float]:
    """Class weights by name, from text as recorded, or a UsageError; a name alone weighs 1, case is ignored."""
    weights: dict[str, float] = {}
    for part in (piece.strip() for piece in text.split(",")):
        given, _, value = part.partition("=")
        name = given.strip().lower()
        if name not in LESION_CLASSES:
            fix = (
                "Ask for images without a lesion with --normals, such as --normals 0.2." if name == NORMAL else _EXAMPLE
            )
            raise UsageError(f"--classes names {given!r}, which is no lesion class.", fix=fix)
        if name in weights:
            raise UsageError(f"--classes names {name!r} twice.", fix=_EXAMPLE)
        weights[name] = _weight("--classes", name, value, _EXAMPLE)
    return weights


def parse_shares(text: str) -> dict[str, float]:
    """Class weights by name, from what a user typed: shares that sum to 1, or whole numbers; or a UsageError."""
    return _summed("--classes", text, parse_classes(text), "benign=2,malignant=1")


def refuse_normals(share: float) -> float:
    """The option's value; a UsageError where it is no share that leaves some samples with a lesion."""
    if not 0.0 <= share < 1.0:
        fix = "Give a share from 0 to below 1, such as 0.2: every fifth sample has no lesion."
        raise UsageError(f"--normals is {share:g}.", fix=fix)
    return share


def _weight(option: str, name: str, text: str, example: str) -> float:
    """The weight that an option gives a name, 1 where it says none, or a UsageError."""
    try:
        weight = float(text or "1")
    except ValueError:
        weight = -1.0
    if not 0.0 < weight < float("inf"):
        raise UsageError(f"{option} gives {name!r} the weight {text!r}.", fix=f"Weights are above 0. {example}")
    return weight


def _summed(option: str, text: str, weights: dict[str, float], example: str) -> dict[str, float]:
    """The weights, if they sum to 1 or are whole numbers; else a UsageError."""
    total = sum(weights.values())
    if not all(weight.is_integer() for weight in weights.values()) and abs(total - 1) > _ROUNDED:
        fix = f"Give shares that sum to 1, or whole numbers as weights, such as {example}."
        raise UsageError(f"{option} is {text!r}, whose shares sum to {total:g}.", fix=fix)
    return weights


def class_at(index: int, weights: Mapping[str, float]) -> str:
    """The class of a sample: among the first n, each class has its share of n to within one per class."""
    return dealt(index, weights)[0]


def dealt(index: int, weights: Mapping[str, float | Fraction]) -> tuple[str, int]:
    """The name that a sample is dealt, as for `class_at`, and how many samples before it were dealt that name."""
    # Each takes its share of what those before it left, spread evenly (Bresenham's line), in fractions: no rounding.
    names = sorted(weights)
    rest = sum((Fraction(str(weights[name])) for name in names), start=Fraction(0))
    for name in names[:-1]:
        weight = Fraction(str(weights[name]))
        share = weight / rest
        before, after = int(index * share), int((index + 1) * share)
        if after > before:
            return name, before
        index -= before
        rest -= weight
    return names[-1], index
