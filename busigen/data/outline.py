"""An outline as numbers: where it lies, how large and how slender it is, and its form in a frame of its own.

The *canonical frame* is centred on the lesion's centroid, and its axes are scaled so that the lesion has area one and a
bounding box as high as it is wide. What is left in it is form alone, which is what a shape model should spend its
numbers on (Cootes et al. 1995 align shapes for the same reason; Leventon et al. 2000 take principal components of
signed distances).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import ConvexHull

from busigen.data.geometry import Mask, around
from busigen.registry import FIELD_EDGE, FIELD_LIMIT, RESOLUTION

_OVERSAMPLING = 2
"""Samples per grid step and axis from which a signed distance is measured."""

_ALL, _AHEAD, _BACK = slice(None), slice(1, None), slice(None, -1)
_NEIGHBOURS = (
    ((_AHEAD, _ALL), (_BACK, _ALL)),
    ((_ALL, _AHEAD), (_ALL, _BACK)),
    ((_AHEAD, _AHEAD), (_BACK, _BACK)),
    ((_AHEAD, _BACK), (_BACK, _AHEAD)),
)
"""Pairs of views of a mask whose pixels are neighbours down, across, and along the two diagonals."""

_SMOOTHING = 0.6
"""Deviation in pixels of the filter that takes the pixels' staircase out of an outline before it is resampled."""


def attributes(mask: Mask) -> NDArray[np.float64]:
    """The four attributes of a lesion, in the order of ``registry.ATTRIBUTES``.

    Args:
        mask: ``(H, W)`` bool, not empty, ``H`` = ``W`` = ``RESOLUTION``.

    Returns:
        ``(4,)``: centroid across and down as shares of the side, log of the root of the area in pixels, log of the
        bounding box's height over its width.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    by_row, by_column = mask.sum(axis=1), mask.sum(axis=0)
    area = float(by_row.sum())
    down = float((by_row * (np.arange(mask.shape[0]) + 0.5)).sum()) / area
    across = float((by_column * (np.arange(mask.shape[1]) + 0.5)).sum()) / area
    height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
    found = (across / mask.shape[1], down / mask.shape[0], 0.5 * np.log(area), np.log(height / width))
    return np.array(found, dtype=np.float64)


def grid_positions(grid: int) -> NDArray[np.float64]:
    """Where a canonical grid of ``grid`` cells a side has its samples, ``(grid,)`` in canonical units."""
    return np.asarray(FIELD_EDGE * ((np.arange(grid) + 0.5) * (2.0 / grid) - 1.0), dtype=np.float64)


def canonical_field(mask: Mask, grid: int) -> NDArray[np.float32]:
    """The lesion's signed distance in its canonical frame.

    Args:
        mask: ``(256, 256)`` bool, one lesion, not empty.
        grid: samples a side.

    Returns:
        ``(grid, grid)`` float32, canonical units (the root of the lesion's area), positive inside, clipped at
        ``FIELD_LIMIT``.
    """
    across, down, size, ratio = attributes(mask)
    fine = grid * _OVERSAMPLING
    at = grid_positions(fine)
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), _SMOOTHING)
    rows = _weights(down * RESOLUTION + np.exp(size + 0.5 * ratio) * at, mask.shape[0])
    columns = _weights(across * RESOLUTION + np.exp(size - 0.5 * ratio) * at, mask.shape[1])
    inside = rows @ smooth @ columns.T >= 0.5
    # Half a sample, because both transforms count from sample centres and the outline runs between them.
    distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    distance = (distance - 0.5 * np.sign(distance)) * (2.0 * FIELD_EDGE / fine)
    coarse = distance.reshape(grid, _OVERSAMPLING, grid, _OVERSAMPLING).mean(axis=(1, 3))
    field: NDArray[np.float32] = np.clip(coarse, -FIELD_LIMIT, FIELD_LIMIT).astype(np.float32)
    return field


def _weights(positions: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """Linear interpolation as a matrix ``(positions, count)``; pixel ``k`` has its centre at ``k + 0.5``."""
    distance = np.abs(positions[:, None] - (np.arange(count) + 0.5)[None])
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def circularity(mask: Mask) -> float:
    """``4 pi A / P^2`` of a lesion that is not empty: 1 for a disc, less for an outline that is long for its area.

    The perimeter is Cauchy's and Crofton's: how often lines in four directions cross the outline. That does not grow
    with the staircase of pixels.
    """
    part = np.pad(mask[around(mask, 0)], 1)
    straight = sum(int((part[first] != part[second]).sum()) for first, second in _NEIGHBOURS[:2])
    diagonal = sum(int((part[first] != part[second]).sum()) for first, second in _NEIGHBOURS[2:])
    perimeter = np.pi / 8.0 * (straight + diagonal / np.sqrt(2.0))
    return float(4.0 * np.pi * part.sum() / perimeter**2)


def solidity(mask: Mask) -> float:
    """Share of a lesion's convex hull that the lesion fills, of one that is not empty: 1 where it has no bay."""
    part = np.pad(mask[around(mask, 0)], 1)
    rows, columns = np.nonzero(part & ~ndimage.binary_erosion(part))
    corners = [(rows + y, columns + x) for y in (0, 1) for x in (0, 1)]
    points = np.concatenate([np.stack(corner, axis=1) for corner in corners])
    return float(part.sum() / ConvexHull(points).volume)
