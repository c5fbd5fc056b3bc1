"""What a user asks of the lesions: parsing, the values of each sample, and what of them came out.

Shares are of the *valid* image, without letterbox bars: what a person sees as the image.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask
from busigen.data.outline import attributes
from busigen.errors import UsageError
from busigen.registry import ASKED_LENGTH, ATTRIBUTES, BIRADS, BIRADS_IMAGES, TALLER_THAN_WIDE
from busigen.runtime.noise import uniforms

BOUNDS = {"across": (0.1, 0.9), "depth": (0.08, 0.75), "size": (0.003, 0.4), "height_width": (0.25, 1.7)}
"""Least and greatest value that can be asked for: beyond lie at most 1 in 100 of BUSI's and BUS-BRA's 1,644 lesions by
any of them, too few to learn from."""

FEW_IMAGES = 20
"""Fewer images than this of a category are next to nothing to learn it from."""

MEANINGS = {
    "across": "the share of the image's width left of the lesion's centre",
    "depth": "the share of the image's height above the lesion's centre",
    "size": "the lesion's area as a share of the image's",
    "height_width": "the lesion's height over its width",
}

Values = Mapping[str, float]


@dataclass(frozen=True)
class Asked:
    """What was asked for: a range per attribute (equal ends for a single value) and a BI-RADS category or ``None``."""

    ranges: Mapping[str, tuple[float, float]] = field(default_factory=lambda: MappingProxyType({}))
    birads: str | None = None

    def __bool__(self) -> bool:
        return bool(self.ranges) or self.birads is not None

    def typed(self) -> dict[str, str | None]:
        """Each option's value as one would type it; ``None`` where nothing was asked."""
        texts = {
            name: None if name not in self.ranges else ":".join(map(_shortest, sorted(set(self.ranges[name]))))
            for name in ATTRIBUTES
        }
        return {**texts, "birads": self.birads}

    def values(self, seed: int, index: int) -> dict[str, float]:
        """One sample's values, uniform in their ranges. The same for every attempt, or the gates would choose them."""
        shares = dict(zip(ATTRIBUTES, uniforms(seed, index, 0, "asked", len(ATTRIBUTES)), strict=True))
        return {name: low + shares[name] * (high - low) for name, (low, high) in self.ranges.items()}

    def vector(self, values: Values, valid: Mask) -> NDArray[np.float32]:
        """Stage 1's input: attributes as :mod:`busigen.data.outline` counts them, their flags, BI-RADS one-hot.

        Args:
            values: this sample's.
            valid: ``(256, 256)`` bool, the pixels that are image.

        Returns:
            ``(ASKED_LENGTH,)`` float32.
        """
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
        result = np.zeros(ASKED_LENGTH, dtype=np.float32)
        result[: len(ATTRIBUTES)] = [found[name] for name in ATTRIBUTES]
        result[len(ATTRIBUTES) : 2 * len(ATTRIBUTES)] = [name in values for name in ATTRIBUTES]
        result[2 * len(ATTRIBUTES) :] = [known == self.birads for known in BIRADS]
        return result


def measured(mask: Mask, valid: Mask) -> dict[str, float]:
    """What a lesion's mask has of each attribute, in the units of ``BOUNDS``.

    Args:
        mask: ``(256, 256)`` bool, not empty.
        valid: ``(256, 256)`` bool, the pixels that are image.
    """
    rows, columns = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    across, depth, _, ratio = attributes(mask)
    return {
        "across": float((across * valid.shape[1] - columns[0]) / columns.size),
        "depth": float((depth * valid.shape[0] - rows[0]) / rows.size),
        "size": float(mask.sum() / valid.sum()),
        "height_width": float(np.exp(ratio)),
    }


def parse_asked(
    *,
    size: str | None = None,
    depth: str | None = None,
    across: str | None = None,
    height_width: str | None = None,
    taller_than_wide: bool = False,
    birads: str | None = None,
) -> Asked:
    """Read the options as they were typed: a number, or ``low:high``.

    Raises:
        UsageError: a value is no number or range, or lies outside ``BOUNDS``; an unknown BI-RADS category; both
            ``--height-width`` and ``--taller-than-wide``.
    """
    if taller_than_wide and height_width is not None:
        raise UsageError(
            f"--height-width {height_width} and --taller-than-wide are both given.",
            fix=f"Give one of them; --taller-than-wide is short for --height-width {TALLER_THAN_WIDE}.",
        )
    texts = {
        "across": across,
        "depth": depth,
        "size": size,
        "height_width": TALLER_THAN_WIDE if taller_than_wide else height_width,
    }
    if birads is not None and birads not in BIRADS:
        raise UsageError(f"--birads is {birads!r}.", fix=f"Choose one of: {', '.join(BIRADS)}.")
    ranges = {name: _range(name, text) for name, text in texts.items() if text is not None}
    return Asked(MappingProxyType(ranges), birads)


def hardly_known(classes: Iterable[str], asked: Asked) -> Iterator[str]:
    """A line for each class of which the shipped bundle has seen next to nothing in the BI-RADS category asked for."""
    for label in classes:
        seen = BIRADS_IMAGES[label].get(asked.birads or "", FEW_IMAGES)
        if seen < FEW_IMAGES:
            yield (
                f"--birads {asked.birads} with {label}: the shipped bundle learned it from {seen} images, so it "
                f"hardly knows what such lesions look like"
            )


def _shortest(value: float) -> str:
    """The number as one would type it, and never another one: what is recorded has to draw the same samples again."""
    return f"{value:g}" if float(f"{value:g}") == value else repr(value)


def _range(name: str, text: str) -> tuple[float, float]:
    option, (least, greatest) = f"--{name.replace('_', '-')}", BOUNDS[name]
    fix = f"Give {MEANINGS[name]}, from {least:g} to {greatest:g}, as one number or a range such as "
    fix += f"{least:g}:{greatest:g}."
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
    # Written so that "nan" fails, too.
    if not least <= low <= high <= greatest:
        raise UsageError(f"{option} is {text!r}.", fix=fix)
    return low, high
