"""The phantom that a synthetic background begins with: a sample's own, and what is asked of its tissue."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.errors import UsageError
from busigen.phantoms.distribution import SUMS, Phantom, Phantoms, numbers_for
from busigen.phantoms.tissue import OUTSIDE, PARAMETERS, Canvas, Tissue
from busigen.runtime.sampling.conditions import range_text, range_within
from busigen.runtime.sampling.inputs.healthy_images import Healthy
from busigen.runtime.sampling.noise import normal, sums

DENSITIES = {"A": (0.0, 0.25), "B": (0.25, 0.5), "C": (0.5, 0.75), "D": (0.75, 1.0)}
"""Gland's share of gland and fat in each of BI-RADS's four kinds of tissue (quartiles: its fourth edition, 2003)."""

TISSUE_MEASURES = ("density", "chest_wall")  # A phantom's measures, which are columns of the manifest.
WALLS = (0.3, 0.95)  # Least and greatest depth of the chest wall that can be asked for.
TRIES = 400  # Sets of parameters among which one that fits is looked for; after that, the nearest is taken.
_WALL = f"Give the depth of the muscle's fascia as a share of the image's height, from {WALLS[0]:g} to {WALLS[1]:g}"


@dataclass(frozen=True)
class AskedTissue:
    """What is asked of synthetic backgrounds.

    Attributes:
        density: a name in ``DENSITIES``, or None.
        chest_wall: least and greatest depth, or None.
        maps: whether the map of tissues is kept.
    """

    density: str | None = None
    chest_wall: tuple[float, float] | None = None
    maps: bool = False
    _ranges: Mapping[str, tuple[float, float]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Gather the ranges by the names of `busigen.phantoms.distribution.Phantom`'s measures."""
        ranges = {} if self.density is None else {"density": DENSITIES[self.density]}
        object.__setattr__(
            self, "_ranges", ranges | ({} if self.chest_wall is None else {"chest_wall": self.chest_wall})
        )

    def __bool__(self) -> bool:
        return self.maps or bool(self._ranges)

    def typed(self) -> dict[str, Any]:
        """What was asked, each option's value as one would type it; nothing of what was not."""
        wall = {} if self.chest_wall is None else {"chest_wall": range_text(self.chest_wall)}
        density = {} if self.density is None else {"density": self.density}
        return density | wall | ({"tissue_maps": True} if self.maps else {})

    def chosen(
        self, phantoms: Phantoms, normals: NDArray[np.float32], noise: NDArray[np.float32], frame: tuple[int, int]
    ) -> dict[str, float]:
        """Of the parameters that normals ``(N, P)`` stand for the first that fit, or those that miss it least."""
        best, least = phantoms.parameters(normals[0]), np.inf
        for row in normals:
            parameters = phantoms.parameters(row)
            tissue = Tissue(Canvas(parameters, noise, *frame))
            found = {name: float(getattr(tissue, name)) for name in self._ranges}
            missed = max(max(low - found[name], found[name] - high, 0.0) for name, (low, high) in self._ranges.items())
            if missed < least:
                best, least = parameters, missed
            if least == 0.0:
                break
        return best

    @property
    def tries(self) -> int:
        """How many sets of parameters are looked at."""
        return TRIES if self._ranges else 1


def parse_tissue(density: str | None, chest_wall: str | None, tissue_maps: bool) -> AskedTissue:
    """What the options ask of tissue; a UsageError if one is unfit."""
    if density is not None and density.upper() not in DENSITIES:
        kinds = ", ".join(f"{name} ({low:.0%} to {high:.0%} gland)" for name, (low, high) in DENSITIES.items())
        raise UsageError(f"--density is {density!r}.", fix=f"Choose one of: {kinds}.")
    wall = None if chest_wall is None else range_within("--chest-wall", chest_wall, WALLS, _WALL)
    return AskedTissue(None if density is None else density.upper(), wall, tissue_maps)


def phantom_at(
    phantoms: Phantoms,
    seed: int,
    index: int,
    attempt: int,
    frame: tuple[int, int],
    asked: AskedTissue | None = None,
) -> Phantom:
    """The phantom of a draw, in a frame of that height and width."""
    asked, (height, width) = asked or AskedTissue(), frame
    size = numbers_for(height, width)
    noise = (sums if phantoms.noise == SUMS else normal)(seed, index, attempt, "phantom noise", (size,))
    normals = normal(seed, index, attempt, "phantom", (asked.tries * len(PARAMETERS),)).reshape(asked.tries, -1)
    if asked.tries == 1:
        return phantoms.drawn(phantoms.parameters(normals[0]), noise, height, width)
    return phantoms.drawn(asked.chosen(phantoms, normals, noise, frame), noise, height, width)


def with_tissue(healthy: Healthy, phantom: Phantom, maps: bool) -> Healthy:
    """A background with the measures of its phantom, and with its ``maps``, of which nothing lies on the bars."""
    row = {**healthy.row, **{name: float(getattr(phantom, name)) for name in TISSUE_MEASURES}}
    if not maps:
        return replace(healthy, row=row)
    labels = np.full_like(healthy.pixels, OUTSIDE)
    labels[healthy.valid] = phantom.labels.ravel()
    return replace(healthy, row=row, tissue=labels)
