"""From a lesion mask to what may be repainted: edit region, ring, window, feather.

Training, runtime and ``verify`` all call these, so that an edit region means the same everywhere. All of them are pure
functions of their arguments; masks are ``(256, 256)`` bool arrays on the letterboxed grid, distances are pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.registry import BUCKET_CONTEXT, BUCKETS, LATENT_FACTOR, RESOLUTION

Mask = NDArray[np.bool_]

MARGIN_SHARE, MARGIN_RANGE = 0.15, (6.0, 16.0)
"""Margin around the lesion as a share of its equivalent diameter, and its bounds in pixels."""

SHADOW_SHARE, SHADOW_RANGE = 0.6, (12, 64)
"""Room below the lesion for shadow or enhancement as a share of its height, and its bounds in pixels."""

RING_WIDTH = 2 * LATENT_FACTOR
"""Width in pixels of the band inside the edit region's rim that stage 3 repaints: two latent cells."""

FEATHER_WIDTH = 6.0
"""Pixels over which the paste's brightness fades in, counted inwards from the edit region's rim."""

GRAIN_WIDTH = 1.5
"""Pixels over which the paste's speckle fades in, in the middle of the feather. Two speckle patterns that lie over one
another half and half have half the variance of either: a wide fade would leave a smooth line around the lesion."""

GRAIN_SCALE = 3.0
"""Deviation in pixels of the Gaussian that parts brightness from speckle."""


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
    """The bounding box of a mask that is not empty, with ``pad`` pixels around it as far as the image goes.

    A lesion is a tenth of its image: what is computed in its box alone costs the processor a fraction.
    """
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
    """The pixels that may change when a lesion is painted.

    The lesion, a margin around it, and room straight below it for posterior shadowing or enhancement, cut to the
    ``valid`` (not letterbox) pixels. Training varies the two scales; in use both are 1, so that anyone can recompute
    the region from the mask alone.

    Args:
        mask: lesion, ``(256, 256)`` bool.
        valid: pixels that hold image rather than letterbox bars, same shape.
        margin_scale: factor on the margin.
        shadow_scale: factor on the room below.

    Returns:
        ``(256, 256)`` bool; empty where the mask is.
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


def feather(edit: Mask) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Opacity of the pasted brightness and of the pasted speckle, ``(256, 256)`` float32 each.

    Exactly 0 outside the edit region, rising to 1 inside it.
    """
    return _opacities(_depth(edit))


def _opacities(depth: NDArray[np.float64]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    middle = (FEATHER_WIDTH - GRAIN_WIDTH) / 2.0
    brightness, grains = depth / FEATHER_WIDTH, (depth - middle) / GRAIN_WIDTH
    return np.clip(brightness, 0.0, 1.0).astype(np.float32), np.clip(grains, 0.0, 1.0).astype(np.float32)


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
    """The smallest bucket around the edit region, centred on it as far as the image's edges allow.

    Args:
        edit: ``(256, 256)`` bool.
        buckets: window sides in pixels to choose from, smallest first; experiments give others than the registry's.

    Raises:
        ValueError: the region is empty.
    """
    rows, columns = np.flatnonzero(edit.any(axis=1)), np.flatnonzero(edit.any(axis=0))
    if rows.size == 0:
        raise ValueError("an empty edit region has no window")
    extent = max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 + 2 * BUCKET_CONTEXT
    side = next((bucket for bucket in buckets if extent <= bucket), buckets[-1])
    corners = []
    for line in (rows, columns):
        middle = (int(line[0]) + int(line[-1]) + 1) // 2
        corners.append(int(np.clip(middle - side // 2, 0, RESOLUTION - side)))
    return Window(top=corners[0], left=corners[1], side=side)


def patches_outside(edit: Mask, patch: int) -> Mask:
    """Context patches that see nothing of the edit region, ``(tokens,)`` bool in row-major order."""
    tiles = edit.reshape(edit.shape[0] // patch, patch, edit.shape[1] // patch, patch)
    result: Mask = ~tiles.any(axis=(1, 3)).ravel()
    return result


def paste(image: NDArray[np.uint8], painted: NDArray[np.float32], edit: Mask, window: Window) -> NDArray[np.uint8]:
    """Put a painted window into the image; pixels outside the edit region keep their bytes.

    Brightness fades in over the whole feather and speckle within a grain of it (two bands of Burt and Adelson 1983, A
    multiresolution spline with application to image mosaics).

    Args:
        image: ``(256, 256)`` uint8.
        painted: the window's new pixels, ``(side, side)`` float32 in [-1, 1].
        edit: edit region, ``(256, 256)`` bool.
        window: where ``painted`` belongs.
    """
    result = image.copy()
    old = image[window.slices].astype(np.float32)
    new = np.clip((painted + 1.0) * 127.5, 0.0, 255.0)
    change = new - old
    brightness = ndimage.gaussian_filter(change, GRAIN_SCALE, mode="nearest")
    opacity, opacity_of_grains = _opacities(_depth(edit)[window.slices])
    mixed = old + opacity * brightness + opacity_of_grains * (change - brightness)
    mixed = np.clip(np.rint(mixed), 0.0, 255.0)
    result[window.slices] = np.where(opacity > 0, mixed, old).astype(np.uint8)
    return result


def lowest(values: NDArray[np.uint8], before: int, after: int, *, axis: int) -> NDArray[np.uint8]:
    """Least value from ``before`` pixels before to ``after`` pixels after each one along an axis, edges repeated."""
    return _windows(np.minimum, values, before, after, axis)


def highest(values: NDArray[np.uint8], before: int, after: int, *, axis: int) -> NDArray[np.uint8]:
    """Greatest value from ``before`` pixels before to ``after`` pixels after each one along an axis, edges repeated."""
    return _windows(np.maximum, values, before, after, axis)


def grow(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Grow a mask by a square of ``2 * by + 1`` pixels."""
    return highest(highest(mask.view(np.uint8), by, by, axis=0), by, by, axis=1).view(np.bool_)


def shrink(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """Shrink a mask by a square of ``2 * by + 1`` pixels; what lies beyond the image counts as its border does."""
    return lowest(lowest(mask.view(np.uint8), by, by, axis=0), by, by, axis=1).view(np.bool_)


def _windows(
    better: Callable[..., NDArray[np.uint8]], values: NDArray[np.uint8], before: int, after: int, axis: int
) -> NDArray[np.uint8]:
    """Reduce every window, from windows of half its length. scipy.ndimage works in doubles, many times slower."""
    margins = [(0, 0), (0, 0)]
    margins[axis] = (before, after)
    windows, length, wanted = np.pad(values, margins, mode="edge"), 1, before + after + 1
    while length < wanted:
        step = min(length, wanted - length)
        ahead, behind = (slice(step, None), slice(None, -step))
        index = (
            ((ahead, slice(None)), (behind, slice(None)))
            if axis == 0
            else ((slice(None), ahead), (slice(None), behind))
        )
        windows = better(windows[index[0]], windows[index[1]])
        length += step
    return windows
