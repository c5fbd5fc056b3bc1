"""Painting over suspected overlays with speckle like that around them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import grow
from busigen.data.letterbox import without_bars
from busigen.data.overlays import find_overlays, suspect_mask

TILE = 32  # Side in pixels of the pieces that are filled one by one, each with texture from one place.
RING = 3  # Pixels around a piece that decide which place looks most like it.
SMOOTHING = 3.0  # Deviation in pixels of the blur that parts grey levels (interpolated) from texture (copied).
SAMPLE = 80  # Pixels of a piece, and of its ring, that are compared; more cost time and decide nothing.
GAIN = (0.4, 1.25)  # Least and greatest factor by which copied texture is adapted to the contrast around the gap.

_OFFSETS = tuple(
    (down, right)
    for down in (0, -5, 5, -12, 12)
    for right in (0, -8, 8, -16, 16, -26, 26, -40, 40, -64, 64)
    if max(abs(down), abs(right)) >= 7
)
"""Where texture may come from. Speckle changes with depth, so places at the same depth are tried at more distances."""

_MARGIN = max(max(abs(down), abs(right)) for down, right in _OFFSETS)
_FAR = 1e9


class Cleaned(NamedTuple):
    """Whether there is a line of text, and two calipers; ``(H, W)``: overlays, what may be one, the image without."""

    text: bool
    calipers: bool
    painted: NDArray[np.bool_]
    suspects: NDArray[np.bool_]
    clean: NDArray[np.uint8]


def cleaned(pixels: NDArray[np.uint8], coloured: NDArray[np.bool_] | None = None) -> Cleaned:
    """Look for overlays in native grey levels ``uint8 (H, W)`` and paint over them; ``coloured`` pixels are some."""
    # At a letterbox bar, tissue ends in an upright crisp line, as a stroke of a pen does.
    inside = without_bars(pixels)
    part, clean = pixels[inside], pixels.copy()
    found = find_overlays(part)
    painted = np.zeros(pixels.shape, dtype=np.bool_) if coloured is None else coloured.copy()
    suspects = painted.copy()
    painted[inside] |= found.mask
    suspects[inside] |= suspect_mask(part, None if coloured is None else coloured[inside], found.mask)
    clean[inside] = without_overlays(part, suspects[inside])
    return Cleaned(found.text, found.calipers, painted, suspects, clean)


def without_overlays(pixels: NDArray[np.uint8], suspect: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Replace suspected pixels by what may have been under them.

    Grey levels are interpolated from the pixels around (a pull-push pyramid: Gortler et al., The Lumigraph, SIGGRAPH
    1996, 3.4); texture, what a blur takes away, is copied from the nearby place whose surroundings agree best with the
    gap's (exemplar-based inpainting, Criminisi et al. 2004). ``pixels`` are ``uint8 (H, W)``, ``suspect`` ``bool (H,
    W)``; if everything is suspected, nothing changes. Other shapes or types raise ValueError.
    """
    if pixels.ndim != 2 or pixels.dtype != np.uint8 or suspect.shape != pixels.shape or suspect.dtype != np.bool_:
        found = f"{pixels.dtype} {pixels.shape} and {suspect.dtype} {suspect.shape}"
        raise ValueError(f"pixels must be uint8 (H, W) and suspect bool (H, W), not {found}")
    if not suspect.any() or suspect.all():
        return pixels.copy()
    filled = _interpolated(pixels.astype(np.float32), ~suspect)
    smooth = ndimage.gaussian_filter(filled, SMOOTHING, truncate=3.0, mode="nearest")
    ring = grow(suspect, RING) & ~suspect
    places = _Places(filled, filled - smooth, suspect)
    result = pixels.copy()
    for top in range(0, suspect.shape[0], TILE):
        band = suspect[top : top + TILE]
        for left in np.unique(np.flatnonzero(band.any(axis=0)) // TILE) * TILE:
            box = slice(top, top + TILE), slice(int(left), int(left) + TILE)
            inside, around = places.within(suspect, box, 0), places.within(ring, box, RING)
            painted = smooth[box][suspect[box]] + places.texture_for(inside, around)
            result[box][suspect[box]] = np.clip(np.rint(painted), 0, 255).astype(np.uint8)
    return result


def _interpolated(levels: NDArray[np.float32], known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Fill unknown pixels from averages of 2 x 2, 4 x 4, ... blocks, the finest that hold a known pixel."""
    if known.all():
        return levels
    height, width = levels.shape
    margins = ((0, height % 2), (0, width % 2))
    total = _summed(np.pad(known.astype(np.float32), margins))
    sums = _summed(np.pad(np.where(known, levels, np.float32(0)), margins))
    coarse = _interpolated(np.asarray(sums / np.maximum(total, 1), dtype=np.float32), total > 0)
    return np.where(known, levels, _doubled(coarse)[:height, :width]).astype(np.float32, copy=False)


def _summed(fine: NDArray[np.float32]) -> NDArray[np.float32]:
    """Sums of blocks of 2 x 2."""
    rows = fine[0::2] + fine[1::2]
    return np.asarray(rows[:, 0::2] + rows[:, 1::2])


def _doubled(coarse: NDArray[np.float32]) -> NDArray[np.float32]:
    """Twice the size, linear between the blocks' middles."""
    for axis in (0, 1):
        margins = [(0, 0), (0, 0)]
        margins[axis] = (1, 1)
        padded = np.moveaxis(np.pad(coarse, margins, mode="edge"), axis, 0)
        fine = np.empty((2 * (padded.shape[0] - 2), padded.shape[1]), dtype=np.float32)
        fine[0::2] = 0.75 * padded[1:-1] + 0.25 * padded[:-2]
        fine[1::2] = 0.75 * padded[1:-1] + 0.25 * padded[2:]
        coarse = np.moveaxis(fine, 0, axis)
    return coarse


class _Places:
    """Levels and texture, ``float32 (H, W)``, as flat arrays with a margin, in which an offset is a number.

    No texture may be taken from the margin, nor where ``suspect`` is True.
    """

    def __init__(self, levels: NDArray[np.float32], texture: NDArray[np.float32], suspect: NDArray[np.bool_]) -> None:
        self.levels, self.texture = np.pad(levels, _MARGIN).ravel(), np.pad(texture, _MARGIN).ravel()
        self.bad = np.pad(suspect, _MARGIN, constant_values=True).ravel()
        self.width = levels.shape[1] + 2 * _MARGIN
        self.offsets = np.array([down * self.width + right for down, right in _OFFSETS])[:, None]

    def within(self, mask: NDArray[np.bool_], box: tuple[slice, slice], more: int) -> NDArray[np.int64]:
        """The numbers of a mask's pixels within ``more`` pixels of a box."""
        top, left = (max(0, side.start - more) for side in box)
        y, x = np.nonzero(mask[top : box[0].stop + more, left : box[1].stop + more])
        return np.asarray((y + (top + _MARGIN)) * self.width + x + (left + _MARGIN))

    def texture_for(self, inside: NDArray[np.int64], around: NDArray[np.int64]) -> NDArray[np.float32]:
        """Texture for a gap: from where no suspect lies and the surroundings look most like the gap's."""
        cost = self.bad.take(inside[:: -(-inside.size // SAMPLE)] + self.offsets).mean(axis=1) * _FAR
        gain = 1.0
        if around.size:
            around = around[:: -(-around.size // SAMPLE)]
            there = around + self.offsets
            differences = self.levels.take(there) - self.levels[around]
            differences[self.bad.take(there)] = 255.0
            cost += np.square(differences).mean(axis=1)
        best = int(np.argmin(cost))
        if around.size:
            contrasts = (float(self.texture[places].std()) + 1.0 for places in (around, around + self.offsets[best]))
            gain = float(np.clip(next(contrasts) / next(contrasts), *GAIN))
        return np.asarray(self.texture[inside + self.offsets[best]] * np.float32(gain))
