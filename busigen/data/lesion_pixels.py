"""Which pixels of a mask file are lesion, and which masks mark something else."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.decoding import FULL, Decoded, looked_up
from busigen.data.geometry import around
from busigen.data.neighbours import shrink
from busigen.errors import InputError

Levels = NDArray[np.uint8 | np.uint16]

_LABELS = 16
"""Most levels of a file that is taken for labels. Masks with soft edges, or saved as JPEG, have more, or none but one
that covers an area."""

_LABEL_MARGIN, _GREY_MARGIN = 2, 4
"""Half the side, without its middle, of a square that a label's area holds somewhere, and that the grey between
background and lesion never holds: soft edges are narrower. In photographs such squares are common: their middles make
up at least 2.8 % of each of BUSI's and BUS-BRA's images."""

_GREY_SHARE, _GREY_MOST = 0.001, 0.25
_HUE_SHARE = 0.02
"""Share of the lesion above which a colour of its own is another structure rather than noise of JPEG."""

_HOLE_SHARE = 0.25
"""Share of a lesion with its holes above which only its outline is drawn. Of BUSI's and BUS-BRA's 1,655 masks with a
lesion, the largest is 0.002."""

_FRAME_SHARE = 0.5
"""Share of the image's outermost pixels above which a mask is inverted; the largest of the same masks is 0.03."""

_LINE = 24
"""Extent in pixels from which a lesion is more than a line's width across; all of the same masks are."""

_WHICH = "Say which grey levels are lesion, as in `busigen prepare --mask-values 1`, or save masks of lesions alone."


def lesion_pixels(decoded: Decoded, values: Collection[int] = ()) -> NDArray[np.bool_]:
    """Which pixels are lesion: see `busigen.data.images.read_mask`.

    Args:
        decoded: The mask file.
        values: The levels that are lesion; empty: bright ones, or the file's only label.

    Returns:
        ``bool (H, W)``.

    Raises:
        InputError: Several labels or colours are marked, or 255 ("ignore") beside a label, or the file is a picture.
    """
    levels, hues = _levels(decoded)
    if values:
        return _any_of(levels, values)
    peak = int(levels.max())
    full = FULL[0] if peak <= FULL[0] else FULL[-1]
    present = _present(levels)
    if present.size <= _LABELS and not decoded.lossy:
        _refuse_labels(decoded.name, levels, present)
        if peak <= full // 2:
            return levels > 0
    else:
        # JPEG overshoots beside an edge, so that the lesion's own level may be well below the brightest.
        grey = (levels > peak // 8) & (levels < peak * 2 // 3)
        picture = shrink(grey, _GREY_MARGIN).mean() > _GREY_SHARE or grey.mean() > _GREY_MOST
        if peak > full // 16 and picture:
            raise InputError(
                f"{decoded.name} is a picture, not a mask: it has {present.size} grey levels.",
                fix="Save the lesion in white and all else in black; an image or an outline drawn over one is no mask.",
            )
        if full // 16 < peak <= full // 2:
            raise InputError(f"{decoded.name} is no clear mask: its brightest level is {peak} of {full}.", fix=_WHICH)
    if (hues > _HUE_SHARE * hues.sum()).sum() > 1:
        raise InputError(
            f"{decoded.name} marks structures in several colours.", fix="Save the lesion alone, in white on black."
        )
    return levels > full // 2


def refuse_shape(mask: NDArray[np.bool_], name: str) -> None:
    """Refuse a mask that is inverted, or an outline without what it surrounds.

    Args:
        mask: ``bool (H, W)``, native, not empty.
        name: The file's name, for messages.

    Raises:
        InputError: It is one of these.
    """
    sides = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    if all(side.any() for side in sides) or np.concatenate(sides).mean() > _FRAME_SHARE:
        raise InputError(
            f"{name} marks {mask.mean():.0%} of the image, up to all of its borders: it is inverted, or has a frame.",
            fix="Lesions are white, all else is black.",
        )
    lesion = np.pad(mask[around(mask, 0)], 1)
    holes = int(ndimage.binary_fill_holes(lesion).sum() - lesion.sum())
    line = max(lesion.shape) > _LINE and not shrink(lesion, _LABEL_MARGIN).any()
    if line or holes > _HOLE_SHARE * (holes + lesion.sum()):
        raise InputError(
            f"{name} marks an outline alone: {holes} pixels lie inside of {lesion.sum()} that are marked.",
            fix="Fill the outline.",
        )


def _levels(decoded: Decoded) -> tuple[Levels, NDArray[np.int64]]:
    """One level per pixel, and how many bright pixels have each of eight hues (none where the file has no colour).

    A hue says which channels reach half of the brightest one. The brightest channel counts, not luminance: annotation
    tools paint lesions pure red or dark blue.
    """
    hues = np.zeros(8, np.int64)
    if decoded.deep or decoded.grey:
        return decoded.levels(), hues
    width, height = decoded.image.size
    colour, alpha = np.empty((height, width), np.uint8), np.empty((height, width), np.uint8)
    for rows, band in decoded.bands():
        channels = np.asarray(band.convert("RGBA"))
        colour[rows], alpha[rows] = channels[..., :3].max(axis=2), channels[..., 3]
        bright = channels[colour[rows] > FULL[0] // 2, :3]
        hue = (bright > bright.max(axis=1, keepdims=True) // 2) @ np.array([4, 2, 1])
        hues += np.bincount(hue, minlength=8)
    if colour.min() == colour.max() and alpha.min() != alpha.max():
        return alpha, np.zeros_like(hues)
    decoded.refuse_shallow(int(colour.max()))
    return colour, hues


def _any_of(levels: Levels, values: Collection[int]) -> NDArray[np.bool_]:
    table = np.zeros(FULL[-1] + 1, np.bool_)
    table[[value for value in values if 0 <= value < table.size]] = True
    return looked_up(table, levels)


def _present(levels: Levels) -> NDArray[np.intp]:
    """The levels that occur, rising."""
    seen = np.zeros(FULL[-1] + 1, np.bool_)
    for row in levels:
        seen[row] = True
    return np.flatnonzero(seen)


def _refuse_labels(name: str, levels: Levels, present: NDArray[np.intp]) -> None:
    """Refuse labels beside the largest one that cover an area; levels of soft edges cover none."""
    peak = int(present[-1])
    others = [v for v in present.tolist() if 0 < v <= peak - peak // 16 and v != peak]
    labels = [v for v in others if shrink(levels == v, _LABEL_MARGIN).any()]
    if labels:
        shares = ", ".join(f"{level} ({float((levels == level).mean()):.1%})" for level in (*labels, peak))
        ignore = " (255 often means 'ignore')" if peak == FULL[0] else ""
        raise InputError(f"{name} marks several structures, with the levels {shares} of the image{ignore}.", fix=_WHICH)
