"""Suspecting text, calipers and other marks that a scanner painted over the ultrasound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.neighbours import grow, highest, lowest

STROKE_WIDTH = 7
"""Pixels: a bright run along a row that is shorter than this can be a pen stroke."""

STROKE_HEIGHT = 4
"""Pixels down a column that a stroke must run."""

STROKE_CONTRAST = 40.0
"""Grey levels by which a stroke exceeds both of its sides."""

CROSS_CONTRAST = 36.0
"""Grey levels by which a caliper's four arms exceed its four quadrants."""

NOISE_FACTOR = 4.0
"""Both must also exceed the image's mean stroke contrast by this factor: grainy images are full of short runs."""

LINE_STROKES = 5
"""Strokes side by side that make a line of text."""

WORD_STROKES = 3
"""Strokes side by side among which a cross is a letter, or part of the maker's badge, rather than a caliper."""

LINE_HEIGHT = (6, 30)
"""Least and greatest height in pixels of a line of text."""

BADGE_SIDE = 40
"""Pixels from the upper left corner within which some scanners put a badge."""

_LINE_GAP = 13
_ARM = 4
_GROW = 2
_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.bool_)
_STRAIGHT = ((-1, 0), (1, 0), (0, -1), (0, 1))
_OBLIQUE = ((-1, -1), (-1, 1), (1, -1), (1, 1))


@dataclass(frozen=True)
class Overlays:
    """What is suspected in one image.

    Attributes:
        text: At least one line of letters or digits.
        calipers: At least two measuring crosses.
        mask: ``bool (H, W)``, the suspected pixels and 2 pixels around them.
    """

    text: bool
    calipers: bool
    mask: NDArray[np.bool_]


def find_overlays(pixels: NDArray[np.uint8]) -> Overlays:
    """Look for text and calipers.

    Ultrasound is much finer along the beam than across it, so thin bright structures in it lie flat. Thin bright
    structures that stand upright and have crisp sides are pen strokes; several side by side are text. A caliper is a
    bright cross with four dark quadrants, and comes in pairs.

    By eye, on 18 random images each from BUSI (12) and BUS-BRA (6): all 18 with ``text`` had letters (four of them only
    the maker's badge), 17 of the 18 with ``calipers`` had calipers. Of 18 with neither, 9 still had a faint, dark or
    single caliper or a ruler along the side: a suspicion is nearly always right, its absence proves nothing.

    Args:
        pixels: Native grey levels, ``uint8 (H, W)``.

    Returns:
        The suspicion.
    """
    contrast = _stroke_contrast(pixels)
    noise = NOISE_FACTOR * float(contrast.mean())
    strokes = _strokes(contrast, max(STROKE_CONTRAST, noise))
    lines, words = _text(strokes)
    crosses = _crosses(pixels, max(CROSS_CONTRAST, noise)) & ~words
    crosses[:BADGE_SIDE, :BADGE_SIDE] = False
    spots = grow(crosses, _ARM)
    calipers = bool(crosses.any()) and ndimage.label(spots)[1] >= 2
    marked = strokes | lines | (spots if calipers else False)
    return Overlays(text=bool(lines.any()), calipers=calipers, mask=grow(marked, _GROW))


def overlay_mask(pixels: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Pixels suspected to be overlay, grown by 2 pixels.

    Args:
        pixels: Native grey levels, ``uint8 (H, W)``.

    Returns:
        ``bool (H, W)``.
    """
    return find_overlays(pixels).mask


def _stroke_contrast(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """How much brighter a pixel is than both sides of the narrow run it lies in, along its row."""
    side = STROKE_WIDTH // 2
    background = highest(lowest(pixels, side, side, axis=1), side, side, axis=1)
    contrast: NDArray[np.uint8] = pixels - np.minimum(background, pixels)
    return contrast


def _strokes(contrast: NDArray[np.uint8], floor: float) -> NDArray[np.bool_]:
    """The upright runs of high contrast, ``bool (H, W)``."""
    crisp = (contrast >= floor).view(np.uint8)
    # The second window looks the other way, or an even height would shift the strokes by a pixel.
    runs = lowest(crisp, 0, STROKE_HEIGHT - 1, axis=0)
    return highest(runs, STROKE_HEIGHT - 1, 0, axis=0).view(np.bool_)


def _text(strokes: NDArray[np.bool_]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Boxes around strokes that stand side by side: lines of text, and anything that may be a word."""
    lines, words = np.zeros_like(strokes), np.zeros_like(strokes)
    numbers, count = ndimage.label(strokes, structure=_EIGHT_NEIGHBOURS)
    if count < WORD_STROKES:
        return lines, words
    clusters, _ = ndimage.label(highest(strokes.view(np.uint8), _LINE_GAP // 2, _LINE_GAP // 2, axis=1))
    for box in ndimage.find_objects(clusters):
        members = np.count_nonzero(np.unique(numbers[box]))
        height, width = (side.stop - side.start for side in box)
        if members >= WORD_STROKES:
            words[box] = True
        tall = LINE_HEIGHT[0] <= height <= LINE_HEIGHT[1]
        if members >= LINE_STROKES and tall and width - _LINE_GAP >= 2 * height:
            lines[box] = True
    return lines, words


def _crosses(pixels: NDArray[np.uint8], floor: float) -> NDArray[np.bool_]:
    """Centres of upright and oblique crosses, ``bool (H, W)``."""
    # Lines two pixels wide have their middle between pixels; the maximum of 2 x 2 makes both kinds alike.
    bright = np.pad(highest(highest(pixels, 1, 0, axis=0), 1, 0, axis=1), _ARM, mode="edge")
    dark = np.pad(pixels, _ARM, mode="edge")
    shape = pixels.shape
    upright = _excess(bright, dark, _STRAIGHT, _OBLIQUE, shape)
    tilted = _excess(bright, dark, _OBLIQUE, _STRAIGHT, shape)
    return np.maximum(upright, tilted) >= floor


def _excess(
    bright: NDArray[np.uint8],
    dark: NDArray[np.uint8],
    arms: tuple[tuple[int, int], ...],
    quadrants: tuple[tuple[int, int], ...],
    shape: tuple[int, ...],
) -> NDArray[np.int16]:
    """By how much the darkest point of the arms exceeds the brightest quadrant, ``int16 (H, W)``."""

    def shifted(levels: NDArray[np.uint8], down: int, right: int) -> NDArray[np.uint8]:
        return levels[_ARM + down : _ARM + down + shape[0], _ARM + right : _ARM + right + shape[1]]

    lowest = shifted(bright, 0, 0)
    for down, right in arms:
        for reach in (2, 3):
            lowest = np.minimum(lowest, shifted(bright, down * reach, right * reach))
    reach = 3 if 0 not in quadrants[0] else 4
    highest = np.zeros(shape, dtype=np.uint8)
    for down, right in quadrants:
        highest = np.maximum(highest, shifted(dark, down * reach, right * reach))
    return lowest.astype(np.int16) - highest.astype(np.int16)
