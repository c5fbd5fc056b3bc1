"""Which phantoms there are: the fitted distribution of their parameters, and a phantom from normals."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from busigen.phantoms.imaging import b_mode, shown
from busigen.phantoms.tissue import FIELDS, OTHERS, PARAMETERS, Canvas, Tissue, values_of
from busigen.registry import RESOLUTION, SCANNERS

LIMIT = 3.0  # Deviations at which the parameters' normals are clipped.
LARGEST = 20.0  # Greatest magnitude of a number in a bundle's ``mean`` and ``factor``.
SUMS = "sums"  # What a bundle names `busigen.runtime.sampling.noise.sums` by; without it, noise is normal.

Floats = NDArray[Any]


@dataclass(frozen=True)
class Phantom:
    """One phantom: ``image``, and ``labels`` by `busigen.phantoms.tissue.TISSUES`, uint8 ``(H, W)``.

    ``density`` is gland's share of gland and fat, ``chest_wall`` the depth of the muscle as a share of the height.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    density: float
    chest_wall: float


@dataclass(frozen=True)
class Phantoms:
    """How phantoms are distributed: the normals behind ``PARAMETERS``.

    Attributes:
        mean: ``(P,)``.
        factor: ``(P, P)``, how independent normals make what is added to the mean.
        scanners: the same of single scanners, by name.
        noise: ``SUMS``, or empty for normal noise.
    """

    mean: Floats
    factor: Floats
    scanners: Mapping[str, Phantoms] = field(default_factory=dict)
    noise: str = SUMS

    @classmethod
    def unfitted(cls) -> Self:
        """Every parameter about the middle of what it may be."""
        return cls(np.zeros(len(PARAMETERS)), np.eye(len(PARAMETERS)))

    def of(self, scanner: str | None) -> Phantoms:
        """Those of a scanner, or of any if it has none of its own."""
        return self if scanner is None else self.scanners.get(scanner, self)

    def parameters(self, normals: Floats) -> dict[str, float]:
        """Parameters from ``(P,)`` standard normals."""
        return values_of(self.mean + self.factor @ np.clip(normals, -LIMIT, LIMIT))

    def drawn(self, parameters: Mapping[str, float], noise: NDArray[np.float32], height: int, width: int) -> Phantom:
        """The phantom of these parameters; ``noise`` are all that is random beside (`numbers_for`)."""
        canvas = Canvas(parameters, noise, height, width)
        tissue = Tissue(canvas)
        density, chest_wall = tissue.density, tissue.chest_wall
        return Phantom(shown(b_mode(canvas, tissue.decibels())), tissue.labels, density, chest_wall)

    def to_json(self) -> dict[str, Any]:
        """As it stands in a bundle."""
        scanners = {name: one._numbers_json() for name, one in self.scanners.items()}
        return {
            "parameters": list(PARAMETERS),
            **self._numbers_json(),
            **({"scanners": scanners} if scanners else {}),
            **({"noise": self.noise} if self.noise else {}),
        }

    def _numbers_json(self) -> dict[str, Any]:
        return {"mean": np.round(self.mean, 4).tolist(), "factor": np.round(self.factor, 4).tolist()}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read what `to_json` gave, further keys aside; a ValueError for all else."""
        if not isinstance(found, dict) or found.get("parameters") != list(PARAMETERS):
            raise ValueError("it does not name the phantoms' parameters")
        noise, scanners = found.get("noise", ""), found.get("scanners", {})
        if noise not in ("", SUMS) or not isinstance(scanners, dict) or len(scanners) > SCANNERS:
            raise ValueError(f"'noise' or 'scanners' is none that this busigen knows: {reprlib.repr(noise)}")
        return cls(*_normals(found), {name: cls(*_normals(one), noise=noise) for name, one in scanners.items()}, noise)


def numbers_for(height: int, width: int) -> int:
    """How many random numbers a phantom of that size takes."""
    return FIELDS * height * (width + 2) + OTHERS


def filled(image: NDArray[Any], place: tuple[int, int, int, int]) -> NDArray[Any]:
    """An image at its place (top, left, height, width) in the working frame, mirrored beyond its borders.

    So training shows images to the prior (`busigen.training.examples.Frame.filling`).
    """
    top, left, height, width = place
    bars = ((top, RESOLUTION - top - height), (left, RESOLUTION - left - width))
    return np.pad(image, bars, mode="reflect")


def _normals(found: Any) -> tuple[Floats, Floats]:
    """Mean and factor of what stands in a bundle; a ValueError for all else."""
    count, rows = len(PARAMETERS), found.get("factor") if isinstance(found, dict) else None
    if not isinstance(rows, list) or len(rows) != count:
        raise ValueError(f"'factor' has not {count} rows")
    return _numbers(found.get("mean"), count), np.stack([_numbers(row, count) for row in rows])


def _numbers(found: Any, size: int) -> Floats:
    """A list of ``size`` numbers of at most ``LARGEST`` as an array; a ValueError for anything else."""
    if not isinstance(found, list) or len(found) != size:
        raise ValueError(f"not a list of {size} numbers")
    if not all(type(value) in (int, float) and abs(value) <= LARGEST for value in found):
        raise ValueError(f"a number is none, or beyond {LARGEST:g}")
    return np.array(found, np.float64)
