"""A lesion's mask: what may be repainted around it (edit region, ring, window, feather), and its outline as numbers.

Training, runtime and ``verify`` all call these, so that an edit region means the same everywhere. All are pure
functions; masks are ``(256, 256)`` bool arrays on the letterboxed grid, distances are pixels.

An outline is described by place, size and slenderness, and its form in a *canonical frame*, centred on the lesion's
centroid and scaled so that the lesion has area one and a bounding box as high as it is wide (as Cootes et al. 1995).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.registry import BUCKET_CONTEXT, BUCKETS, FIELD_EDGE, FIELD_LIMIT, LATENT_FACTOR, RESOLUTION

Mask = NDArray[np.bool_]
_Value = TypeVar("_Value", np.bool_, np.uint8)

MARGIN_SHARE, MARGIN_RANGE = 0.15, (6.0, 16.0)  # Margin around the lesion by its equivalent diameter; its bounds.
SHADOW_SHARE, SHADOW_RANGE = 0.6, (12, 64)  # Room below it for shadow or enhancement, by its height; its bounds.
RING_WIDTH = 2 * LATENT_FACTOR  # Of the band inside the edit region's rim that stage 3 repaints: two latent cells.
FEATHER_WIDTH, GRAIN_WIDTH = 6.0, 1.5  # Over which pasted brightness fades in, from the rim, and amid them its speckle.
GRAIN_SCALE = 3.0  # Deviation in pixels of the Gaussian that parts brightness from speckle.
_FIELD_OVERSAMPLING = 2  # Samples per grid step and axis from which a signed distance is measured.
_STAIRCASE_SMOOTHING = 0.6  # Deviation of the filter that takes the pixels' staircase out of an outline.


@dataclass(frozen=True)
class Window:
    """A square crop of the working image: top-left corner and side in pixels; the side is one of ``BUCKETS``."""

    top: int
    left: int
    side: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Row and column slices of the window."""
        return slice(self.top, self.top + self.side), slice(self.left, self.left + self.side)


def around(mask: Mask, pad: int) -> tuple[slice, slice]:
    """The bounding box of a mask that is not empty, with ``pad`` pixels around it as far as the image goes."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, left = max(0, int(rows[0]) - pad), max(0, int(columns[0]) - pad)
    return slice(top, int(rows[-1]) + pad + 1), slice(left, int(columns[-1]) + pad + 1)


def largest_component(mask: Mask) -> Mask:
    """Keep the largest 8-connected component and fill its holes; an empty mask stays empty."""
    result = np.zeros_like(mask)
    if not mask.any():
        return result
    everything = around(mask, 0)
    labels, _ = ndimage.label(mask[everything], structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())
    sizes[0] = 0
    result[everything] = labels == sizes.argmax()
    # With a pixel around it, so that what is open to the outside does not look like a hole.
    part = around(result, 1)
    result[part] = ndimage.binary_fill_holes(result[part])
    return result


def edit_region(mask: Mask, valid: Mask, *, margin_scale: float = 1.0, shadow_scale: float = 1.0) -> Mask:
    """The pixels that may change when a lesion is painted, ``(256, 256)`` bool; none for an empty mask.

    The lesion, a margin around it, and room straight below it for posterior shadowing or enhancement, cut to the
    ``valid`` pixels, which are no letterbox bars. Training varies the two scales; in use both are 1, so that anyone can
    recompute the region.
    """
    if not mask.any():
        return np.zeros_like(mask)
    diameter = 2.0 * np.sqrt(mask.sum() / np.pi)
    margin = float(np.clip(MARGIN_SHARE * diameter, *MARGIN_RANGE)) * margin_scale
    rows = np.flatnonzero(mask.any(axis=1))
    height = rows[-1] - rows[0] + 1
    shadow = round(float(np.clip(SHADOW_SHARE * height, *SHADOW_RANGE)) * shadow_scale)
    row = np.arange(mask.shape[0])[:, None]
    bottom = np.where(mask.any(axis=0), mask.shape[0] - 1 - mask[::-1].argmax(axis=0), -shadow - 1)
    below = (row > bottom) & (row <= bottom + shadow)
    seed = mask | below
    box = around(seed, int(np.ceil(margin)) + 1)
    result = np.zeros_like(mask)
    result[box] = ndimage.distance_transform_edt(~seed[box]) <= margin
    return result & valid


def ring_region(edit: Mask) -> Mask:
    """The band of ``RING_WIDTH`` pixels inside the edit region's rim, which stage 3 repaints."""
    return edit & (_depth(edit) <= RING_WIDTH)


def feather(
    edit: Mask, window: Window | None = None, grain_fade: float = 0.0
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Opacity of the pasted brightness and speckle, float32 from 0 outside the region to 1 inside, in a window or all.

    Two patterns half and half have half the variance of either: speckle fades within a grain, or, over ``grain_fade``
    pixels from the rim, with the roots of weights that add up to 1 (`paste`).
    """
    depth = _depth(edit) if window is None else _depth(edit)[window.slices]
    brightness = np.clip(depth / FEATHER_WIDTH, 0.0, 1.0)
    if grain_fade:
        share = np.clip(depth / grain_fade, 0.0, 1.0)
        # Next to a squared sine, but of operations that round alike on every processor.
        grains = np.sqrt(share * share * (3.0 - 2.0 * share))
    else:
        grains = np.clip((depth - (FEATHER_WIDTH - GRAIN_WIDTH) / 2.0) / GRAIN_WIDTH, 0.0, 1.0)
    return brightness.astype(np.float32), grains.astype(np.float32)


def _depth(edit: Mask) -> NDArray[np.float64]:
    """Pixels from each pixel of the region to the nearest one outside it; the image's own border does not count."""
    if edit.all():
        return np.full(edit.shape, np.inf)
    depth = np.zeros(edit.shape)
    if edit.any():
        box = around(edit, 1)
        depth[box] = ndimage.distance_transform_edt(edit[box])
    return depth


def window_for(edit: Mask, buckets: Sequence[int] = BUCKETS) -> Window:
    """The smallest of some sides, smallest first, around the edit region, centred as far as the image's edges allow.

    An empty region raises ValueError.
    """
    rows, columns = np.flatnonzero(edit.any(axis=1)), np.flatnonzero(edit.any(axis=0))
    if rows.size == 0:
        raise ValueError("an empty edit region has no window")
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 + 2 * BUCKET_CONTEXT
    side = next((bucket for bucket in buckets if extent <= bucket), buckets[-1])
    middles = ((int(line[0]) + int(line[-1]) + 1) // 2 for line in (rows, columns))
    top, left = (int(np.clip(middle - side // 2, 0, RESOLUTION - side)) for middle in middles)
    return Window(top, left, side)


def patches_outside(edit: Mask, patch: int) -> Mask:
    """Context patches that see nothing of the edit region, ``(tokens,)`` bool in row-major order."""
    tiles = edit.reshape(edit.shape[0] // patch, patch, edit.shape[1] // patch, patch)
    return np.asarray(~tiles.any(axis=(1, 3)).ravel())


def paste(
    image: NDArray[np.uint8], painted: NDArray[np.float32], edit: Mask, window: Window, grain_fade: float = 0.0
) -> NDArray[np.uint8]:
    """Put a painted window into the image; pixels outside the edit region keep their bytes.

    ``painted`` are the window's new pixels, ``(side, side)`` in [-1, 1]. Brightness and speckle fade in by `feather`
    (two bands of Burt and Adelson 1983, A multiresolution spline with application to image mosaics). With a
    ``grain_fade`` the squares of the new and the old speckle's weights add up to 1, so that its variance is kept.
    """
    result = image.copy()
    old = image[window.slices].astype(np.float32)
    new = np.clip((painted + 1.0) * 127.5, 0.0, 255.0)
    change = new - old
    brightness = ndimage.gaussian_filter(change, GRAIN_SCALE, mode="nearest")
    opacity, grains = feather(edit, window, grain_fade)
    mixed = old + opacity * brightness + grains * (change - brightness)
    if grain_fade:
        mixed += overlap(grains) * (old - ndimage.gaussian_filter(old, GRAIN_SCALE, mode="nearest"))
    mixed = np.clip(np.rint(mixed), 0.0, 255.0)
    result[window.slices] = np.where(opacity > 0, mixed, old).astype(np.uint8)
    return result


def overlap(grains: Any) -> Any:
    """Sum of the weights of new speckle, ``grains``, and of old, less 1; their squares add up to 1. Of any shape."""
    return (1.0 - grains * grains) ** 0.5 + grains - 1.0


def lowest(values: NDArray[np.uint8], before: int, after: int, *, axis: int) -> NDArray[np.uint8]:
    """Least value from ``before`` pixels before to ``after`` pixels after each one along an axis, edges repeated."""
    return _windows(np.minimum, values, before, after, axis)


def highest(values: NDArray[np.uint8], before: int, after: int, *, axis: int) -> NDArray[np.uint8]:
    """Greatest value in the windows of `lowest`."""
    return _windows(np.maximum, values, before, after, axis)


def grow(values: NDArray[_Value], by: int) -> NDArray[_Value]:
    """A mask grown by a square of ``2 * by + 1`` pixels, or the greatest level in it; edges repeated."""
    return highest(highest(values.view(np.uint8), by, by, axis=0), by, by, axis=1).view(values.dtype)


def shrink(values: NDArray[_Value], by: int) -> NDArray[_Value]:
    """A mask shrunk by a square of ``2 * by + 1`` pixels, or the least level in it; edges repeated."""
    return lowest(lowest(values.view(np.uint8), by, by, axis=0), by, by, axis=1).view(values.dtype)


def _windows(better: np.ufunc, values: NDArray[np.uint8], before: int, after: int, axis: int) -> NDArray[np.uint8]:
    """Reduce every window, from windows of half its length. scipy.ndimage works in doubles, many times slower."""
    margins = [(0, 0), (0, 0)]
    margins[axis] = (before, after)
    windows, length, wanted = np.pad(values, margins, mode="edge"), 1, before + after + 1
    while length < wanted:
        step = min(length, wanted - length)
        if axis == 0:
            windows = better(windows[step:], windows[:-step])
        else:
            windows = better(windows[:, step:], windows[:, :-step])
        length += step
    return windows


def attributes(mask: Mask) -> NDArray[np.float64]:
    """The four attributes of a lesion that is not empty, ``float64 (4,)``, in the order of ``registry.ATTRIBUTES``.

    Centroid across and down as shares of the side, log of the root of the area in pixels, log of the bounding box's
    height over its width.
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
    """The signed distance of one lesion, not empty, in its canonical frame, ``(grid, grid)`` float32.

    Canonical units (the root of the lesion's area), positive inside, clipped at ``FIELD_LIMIT``.
    """
    across, down, size, ratio = attributes(mask)
    fine = grid * _FIELD_OVERSAMPLING
    at = grid_positions(fine)
    smooth = ndimage.gaussian_filter(mask.astype(np.float32), _STAIRCASE_SMOOTHING)
    rows = _interpolation(down * RESOLUTION + np.exp(size + 0.5 * ratio) * at, mask.shape[0])
    columns = _interpolation(across * RESOLUTION + np.exp(size - 0.5 * ratio) * at, mask.shape[1])
    inside = rows @ smooth @ columns.T >= 0.5
    # Half a sample, because both transforms count from sample centres and the outline runs between them.
    distance = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    distance = (distance - 0.5 * np.sign(distance)) * (2.0 * FIELD_EDGE / fine)
    coarse = distance.reshape(grid, _FIELD_OVERSAMPLING, grid, _FIELD_OVERSAMPLING).mean(axis=(1, 3))
    return np.asarray(np.clip(coarse, -FIELD_LIMIT, FIELD_LIMIT), dtype=np.float32)


def _interpolation(positions: NDArray[np.float64], count: int) -> NDArray[np.float32]:
    """Linear interpolation as a matrix ``(positions, count)``; pixel ``k`` has its centre at ``k + 0.5``."""
    distance = np.abs(positions[:, None] - (np.arange(count) + 0.5)[None])
    return np.maximum(0.0, 1.0 - distance).astype(np.float32)


def circularity(mask: Mask) -> float:
    """``4 pi A / P^2`` of a lesion that is not empty: 1 for a disc, less for an outline that is long for its area.

    The perimeter is Cauchy's and Crofton's (how often lines in four directions cross the outline), which does not grow
    with the staircase of pixels.
    """
    part = np.pad(mask[around(mask, 0)], 1)
    straight = np.count_nonzero(part[1:] != part[:-1]) + np.count_nonzero(part[:, 1:] != part[:, :-1])
    diagonal = np.count_nonzero(part[1:, 1:] != part[:-1, :-1]) + np.count_nonzero(part[1:, :-1] != part[:-1, 1:])
    perimeter = np.pi / 8.0 * (straight + diagonal / np.sqrt(2.0))
    return float(4.0 * np.pi * part.sum() / perimeter**2)


def solidity(mask: Mask) -> float:
    """Share of a lesion's convex hull that the lesion fills, of one that is not empty: 1 where it has no bay."""
    from scipy.spatial import ConvexHull

    part = np.pad(mask[around(mask, 0)], 1)
    rows, columns = np.nonzero(part & ~ndimage.binary_erosion(part))
    corners = [(rows + y, columns + x) for y in (0, 1) for x in (0, 1)]
    points = np.concatenate([np.stack(corner, axis=1) for corner in corners])
    return float(part.sum() / ConvexHull(points).volume)
