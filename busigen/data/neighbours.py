"""Least and greatest grey level of small windows, for images of bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


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
