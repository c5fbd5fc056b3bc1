"""Fitting an image into the square working frame without changing its proportions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busigen.registry import RESOLUTION

BAR_LEVEL, BAR_WIDTH = 6, 3  # Greatest grey level in a bar, and its least width: less may be an image's own dark rim.
HALF = np.float32(0.5 - 1e-5)  # Coverage from which a working pixel is lesion; exactly half counts despite rounding.


@dataclass(frozen=True)
class Letterbox:
    """Where a native image lies in the working frame: a native ``x`` (pixel edges at integers) at ``left + x * scale``.

    ``left`` and ``top`` are columns and rows of bar before the image, ``width`` and ``height`` those that it takes.
    """

    scale: float
    left: int
    top: int
    width: int
    height: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """The frame's rows and columns that the image takes."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)

    @property
    def valid(self) -> NDArray[np.bool_]:
        """``bool (256, 256)``: True on the image, False on the bars."""
        inside = np.zeros((RESOLUTION, RESOLUTION), dtype=np.bool_)
        inside[self.slices] = True
        return inside


def fit(width: int, height: int) -> Letterbox:
    """The centred letterbox of a ``width`` x ``height`` image; ValueError where a length is not positive."""
    if min(width, height) < 1:
        raise ValueError(f"width and height must be positive, not {width}, {height}")
    scale = RESOLUTION / max(width, height)
    inner_width, inner_height = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (RESOLUTION - inner_width) // 2, (RESOLUTION - inner_height) // 2
    return Letterbox(scale, left, top, inner_width, inner_height)


def letterbox(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.uint8], Letterbox]:
    """Scale an image, ``uint8 (H, W)``, into the frame, ``uint8 (256, 256)``, centred, with black bars.

    The filter is Pillow's Hamming: bright lines get no dark ring that a network would learn, as Lanczos gives them; it
    keeps more speckle contrast than the bilinear triangle, and does not beat against the pixel grid as box does. Other
    shapes and types raise ValueError.
    """
    if pixels.ndim != 2 or pixels.dtype != np.uint8:
        raise ValueError(f"pixels must be uint8 (H, W), not {pixels.dtype} {pixels.shape}")
    height, width = pixels.shape
    box = fit(width, height)
    frame = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    frame[box.slices] = np.asarray(Image.fromarray(pixels).resize((box.width, box.height), Image.Resampling.HAMMING))
    return frame, box


def without_bars(pixels: NDArray[np.uint8]) -> tuple[slice, slice]:
    """Rows and columns of a picture, ``uint8 (H, W)``, that are image: not the bars that a square one brought along."""
    whole = [slice(0, side) for side in pixels.shape]
    for axis in (0, 1) if pixels.shape[0] == pixels.shape[1] else ():
        bright = np.flatnonzero(pixels.max(axis=1 - axis) > BAR_LEVEL)
        before, after = (int(bright[0]), len(pixels) - 1 - int(bright[-1])) if bright.size else (0, 0)
        # A letterbox is centred, a dark rim need not be.
        if min(before, after) >= BAR_WIDTH and abs(before - after) <= 1:
            whole[axis] = slice(before, len(pixels) - after)
            break
    return whole[0], whole[1]


def letterbox_coverage(mask: NDArray[np.bool_], box: Letterbox) -> NDArray[np.float32]:
    """The share of every working pixel that a native mask ``bool (H, W)`` covers, ``float32 (256, 256)``."""
    frame = np.zeros((RESOLUTION, RESOLUTION), dtype=np.float32)
    frame[box.slices] = coverage(mask, width=box.width, height=box.height)
    return frame


def coverage(mask: NDArray[np.bool_], *, width: int, height: int) -> NDArray[np.float64]:
    """The share of every pixel, ``float64 (height, width)``, that a native mask ``bool (H, W)`` covers at that size."""
    if mask.ndim != 2:
        raise ValueError(f"mask must be (H, W), not {mask.shape}")
    # Masks leave most columns empty, and summing those takes most of the time.
    used = mask.any(axis=0)
    by_row = np.zeros((height, mask.shape[1]), dtype=np.float64)
    by_row[:, used] = _average_rows(mask[:, used], height)
    return _average_rows(by_row.T, width).T


def letterbox_mask(mask: NDArray[np.bool_], box: Letterbox) -> NDArray[np.bool_]:
    """The native mask of `letterbox_coverage` in the frame: a working pixel is lesion where at least half of it is."""
    return np.asarray(letterbox_coverage(mask, box) >= HALF)


def _average_rows(values: NDArray[np.generic], working: int) -> NDArray[np.float64]:
    """Average ``(native, M)`` values over ``working`` equal bands of rows, counting rows on an edge by their share.

    Pillow's box filter takes or leaves whole native pixels, which moves outlines by up to half of one; this does not.
    """
    native = values.shape[0]
    edges = np.linspace(0.0, native, working + 1)
    below = np.minimum(edges.astype(np.int64), native - 1)
    total = np.zeros((native + 1, values.shape[1]), dtype=np.float64)
    np.cumsum(values, axis=0, out=total[1:])
    at_edges = total[below] + (edges - below)[:, None] * values[below]
    return np.asarray(np.diff(at_edges, axis=0) * (working / native))
