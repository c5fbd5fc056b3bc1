"""How brightness and contrast go across an image, and the least change that makes phantoms' go as real images'.

Scanner, gain and contact make images bright and dark in ways that no map of tissue has. Both fields, mean and
logarithm of the local deviation at 64 x 48 pixels, are described by a few cosines along depth and width. Between two
sets, the linear map that takes one mean and covariance to the other and moves images least is known in closed form
(the optimal transport of normal distributions: Dowson and Landau 1982, Peyre and Cuturi 2019, remark 2.31).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

COLUMNS, ROWS = 64, 48  # Of the grid on which contrast is measured.
BLOCK = 8  # Side in cells of that grid of the blocks in which a deviation is taken.
COSINES = (5, 4)  # Of each field, along depth and across.
LENGTH = 2 * COSINES[0] * COSINES[1]  # Numbers of a description.
CONTRAST_FLOOR = 2.0  # Grey levels added to a deviation before its logarithm.
LARGEST_CHANGE = 1.2  # Of a logarithm of contrast.
LARGEST_NUMBER = 1e4  # Greatest magnitude of a number in a bundle's map.

Floats = NDArray[Any]


def described(grey: Floats) -> Floats:
    """An image ``(H, W)`` of grey levels as ``(LENGTH,)``: cosines of brightness, then of logarithmic contrast."""
    down, along = _bases(*grey.shape)
    fine = _averaging(grey.shape[0], ROWS) @ grey @ _averaging(grey.shape[1], COLUMNS).T
    mean = down @ grey @ along.T / grey.size
    rest = fine - _averaging(grey.shape[0], ROWS) @ (down.T @ mean @ along) @ _averaging(grey.shape[1], COLUMNS).T
    tiles = rest.reshape(ROWS // BLOCK, BLOCK, COLUMNS // BLOCK, BLOCK)
    contrast = np.log(tiles.std(axis=(1, 3)) + CONTRAST_FLOOR)
    down, along = _bases(*contrast.shape)
    return np.concatenate([mean.ravel(), (down @ contrast @ along.T / contrast.size).ravel()])


def changed(grey: Floats, before: Floats, after: Floats) -> Floats:
    """An image ``(H, W)`` of one description (see `described`) as it looks with another one."""
    down, along = _bases(*grey.shape)
    fields = np.stack([before, after]).reshape(2, 2, *COSINES)
    mean, wanted = (down.T @ field @ along for field in fields[:, 0])
    gain = np.clip(down.T @ (fields[1, 1] - fields[0, 1]) @ along, -LARGEST_CHANGE, LARGEST_CHANGE)
    return np.asarray(wanted + (grey - mean) * np.exp(gain))


def _bases(rows: int, columns: int) -> tuple[Floats, Floats]:
    """Cosines along both axes, ``(K, rows)`` and ``(K, columns)``; with division by the size, an orthonormal basis."""
    found = []
    for count, size in zip(COSINES, (rows, columns), strict=True):
        number = np.arange(count)[:, None]
        basis = np.cos(np.pi * number * (np.arange(size) + 0.5) / size)
        found.append(np.where(number > 0, np.sqrt(2.0), 1.0) * basis)
    return found[0], found[1]


def _averaging(size: int, cells: int) -> Floats:
    """What averages ``size`` pixels into ``cells``, ``(cells, size)``."""
    edges = np.linspace(0.0, size, cells + 1)
    low, high = edges[:-1, None], edges[1:, None]
    overlap = np.minimum(high, np.arange(1, size + 1)) - np.maximum(low, np.arange(size))
    return np.asarray(np.clip(overlap, 0.0, None) * (cells / size))


@dataclass(frozen=True)
class BrightnessMap:
    """The map from phantoms' descriptions to real images'.

    Attributes:
        origin: mean description of phantoms, ``(LENGTH,)``.
        target: that of real images.
        matrix: ``(LENGTH, LENGTH)``, what a description's difference from ``origin`` becomes.
    """

    origin: Floats
    target: Floats
    matrix: Floats

    def __call__(self, grey: Floats) -> Floats:
        """An image ``(H, W)`` of grey levels after the map."""
        before = described(grey)
        return changed(grey, before, self.target + self.matrix @ (before - self.origin))

    @classmethod
    def fit(cls, phantoms: Floats, real: Floats, least: float = 1e-3) -> Self:
        """The map between two sets of descriptions, ``(N, LENGTH)`` and ``(M, LENGTH)``.

        Directions in which phantoms have less than ``least`` of the variance of their strongest one are left alone.
        """
        scale = real.std(axis=0)
        own, theirs = (np.cov(part / scale, rowvar=False) for part in (phantoms, real))
        ridge = least * np.trace(own) / LENGTH * np.eye(LENGTH)
        root = linalg.sqrtm(own + ridge).real
        inverse = linalg.inv(root)
        matrix = inverse @ linalg.sqrtm(root @ (theirs + ridge) @ root).real @ inverse
        return cls(phantoms.mean(axis=0), real.mean(axis=0), matrix * scale[:, None] / scale[None])

    def to_json(self) -> dict[str, Any]:
        """As it stands in a bundle."""
        parts = {"origin": self.origin, "target": self.target, "matrix": self.matrix}
        return {name: [float(f"{v:.5g}") for v in part.ravel()] for name, part in parts.items()}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read what `to_json` gave; a ValueError for all else, and for numbers beyond ``LARGEST_NUMBER``."""
        sizes = {"origin": LENGTH, "target": LENGTH, "matrix": LENGTH**2}
        if not isinstance(found, dict) or found.keys() != sizes.keys():
            raise ValueError(f"not a mapping of {', '.join(sizes)}")
        origin, target, matrix = (numbers_of(found[name], size, LARGEST_NUMBER) for name, size in sizes.items())
        return cls(origin, target, matrix.reshape(LENGTH, LENGTH))


def numbers_of(found: Any, size: int, largest: float) -> Floats:
    """A list of ``size`` numbers of at most that magnitude as an array; a ValueError for anything else."""
    if not isinstance(found, list) or len(found) != size:
        raise ValueError(f"not a list of {size} numbers")
    if not all(type(value) in (int, float) and abs(value) <= largest for value in found):
        raise ValueError(f"a number is none, or beyond {largest:g}")
    return np.array(found, np.float64)
