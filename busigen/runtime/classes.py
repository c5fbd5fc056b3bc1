"""The class mix: parsing ``benign=0.5,malignant=0.5`` and dealing classes to indices in exact proportion."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

from busigen.errors import UsageError
from busigen.registry import LESION_CLASSES

_EXAMPLE = f"Allowed: {', '.join(LESION_CLASSES)}; for example --classes benign=0.7,malignant=0.3."


_ROUNDED = 1e-3
"""By how much shares may miss 1, because a third has no end of digits."""


def parse_classes(text: str) -> dict[str, float]:
    """Read weights, as a dataset may record them; a name alone weighs 1, and case is ignored.

    Raises:
        UsageError: unknown or repeated class, or a weight that is not a positive finite number.
    """
    weights: dict[str, float] = {}
    for part in (piece.strip() for piece in text.split(",")):
        given, _, value = part.partition("=")
        name = given.strip().lower()
        if name not in LESION_CLASSES:
            raise UsageError(f"--classes names {given!r}, which is no lesion class.", fix=_EXAMPLE)
        if name in weights:
            raise UsageError(f"--classes names {name!r} twice.", fix=_EXAMPLE)
        try:
            weight = float(value or "1")
        except ValueError:
            weight = -1.0
        if not 0.0 < weight < float("inf"):
            raise UsageError(f"--classes gives {name!r} the weight {value!r}.", fix=f"Weights are above 0. {_EXAMPLE}")
        weights[name] = weight
    return weights


def parse_shares(text: str) -> dict[str, float]:
    """Read shares that sum to 1, or whole numbers as weights, as a run may be asked for them.

    Raises:
        UsageError: as for :func:`parse_classes`; or shares do not sum to 1, so that one is not what was meant.
    """
    weights = parse_classes(text)
    total = sum(weights.values())
    if not all(weight.is_integer() for weight in weights.values()) and abs(total - 1) > _ROUNDED:
        raise UsageError(
            f"--classes is {text!r}, whose shares sum to {total:g}.",
            fix="Give shares that sum to 1, or whole numbers as weights, such as benign=2,malignant=1.",
        )
    return weights


def class_at(index: int, weights: Mapping[str, float]) -> str:
    """The class of a sample: among the first n, each class has its share of n to within one per class.

    A pure function of index and weights. Each class in turn takes its share of what the classes before it left, spread
    evenly (Bresenham's line), computed in fractions of the weights' decimals so that no platform rounds differently.
    """
    names = sorted(weights)
    rest = sum((Fraction(str(weights[name])) for name in names), start=Fraction(0))
    for name in names[:-1]:
        weight = Fraction(str(weights[name]))
        share = weight / rest
        before, after = int(index * share), int((index + 1) * share)
        if after > before:
            return name
        index -= before
        rest -= weight
    return names[-1]
