"""Quality gates, which judge draws before they reach a shard. Each returns the reason to refuse one, or ``None``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import Mask, around
from busigen.data.images import BACKGROUND_DEVIATION, BACKGROUND_MEAN, picture_fault

AREA_RANGE = (0.002, 0.45)  # lesion area as a share of the valid image; BUSI's run from 0.3 % to 56 %
CRUMB_SHARE = 0.10  # of the outline's area outside its largest part, at most; beyond it the mask is crumbling

BORDER_SHARE = 0.02
"""Share of the lesion's outline that may run along the image's border before the lesion counts as cut off. Annotators,
too, let an outline graze the border: 11 of the 1,234 training lesions touch it, 9 with more than this share."""

MIN_CONTRAST = 4.0  # least difference in mean grey levels between the lesion and the band around it

ASKED_TOLERANCE = {"across": 0.02, "depth": 0.02, "size": 0.1, "height_width": 0.12}
"""Greatest difference between a mask and its conditions: of places as a share of the image's side, of the rest as a
share of the condition. A lesion of the least size is 14 pixels wide: a pixel more in height and width is a tenth."""


def limits() -> dict[str, object]:
    """The limits that decide which draws pass, by name, as a run's record holds them."""
    # Written out: another constant in this module, or another name for one, makes no dataset another run's.
    return {
        "AREA_RANGE": AREA_RANGE,
        "ASKED_TOLERANCE": ASKED_TOLERANCE,
        "BACKGROUND_DEVIATION": BACKGROUND_DEVIATION,
        "BACKGROUND_MEAN": BACKGROUND_MEAN,
        "BORDER_SHARE": BORDER_SHARE,
        "CRUMB_SHARE": CRUMB_SHARE,
        "MIN_CONTRAST": MIN_CONTRAST,
    }


def asked_reason(found: Mapping[str, float], wanted: Mapping[str, float]) -> str | None:
    """Judge a mask by the conditions: its attributes and the requested ones, by name, in the user's units."""
    for name, value in wanted.items():
        scale = 1.0 if name in ("across", "depth") else value
        if abs(found[name] - value) > ASKED_TOLERANCE[name] * scale:
            return "not as asked"
    return None


def mask_reason(raw: Mask, mask: Mask, valid: Mask) -> str | None:
    """Judge stage 1's outline: ``raw`` where its distance is positive, ``mask`` its largest part within ``valid``."""
    if not mask.any():
        return "empty mask"
    share = mask.sum() / max(int(valid.sum()), 1)
    if share < AREA_RANGE[0]:
        return "tiny mask"
    if share > AREA_RANGE[1]:
        return "huge mask"
    inside = raw & valid
    if (inside & ~mask).sum() > CRUMB_SHARE * inside.sum():
        return "crumbling mask"
    box = around(mask, 1)
    outline = mask[box] & ~ndimage.binary_erosion(mask[box], border_value=1)
    if cut_pixels(mask, valid) > BORDER_SHARE * max(int(outline.sum()), 1):
        return "mask cut by the border"
    return None


def near_reason(edits: Sequence[Mask]) -> str | None:
    """Judge a lesion by the edit regions of its sample so far, of which the last is its own: it may meet no other."""
    return "lesions too near" if any((edits[-1] & other).any() for other in edits[:-1]) else None


def given_reason(pixels: int, mask: Mask, valid: Mask) -> str | None:
    """Judge a user's mask of so many ``pixels`` where it was placed; its size and form are the user's affair."""
    return "mask larger than the image" if int((mask & valid).sum()) < pixels else None


def cut_pixels(mask: Mask, valid: Mask) -> int:
    """Lesion pixels on the outermost line of the valid image; the mask is not empty."""
    box = around(mask, 1)
    inner: Mask = ndimage.binary_erosion(valid[box], structure=np.ones((3, 3)))
    return int((mask[box] & ~inner).sum())


def image_reason(image: NDArray[np.uint8], mask: Mask, valid: Mask) -> str | None:
    """Judge the painted image: the lesion must differ from the band of 8 pixels around it."""
    width = 8
    box = around(mask, width)
    pixels, lesion = image[box], mask[box]
    band = ndimage.binary_dilation(lesion, iterations=width) & ~lesion & valid[box]
    if not band.any():
        return "no surroundings"
    if abs(float(pixels[lesion].mean()) - float(pixels[band].mean())) < MIN_CONTRAST:
        return "no contrast"
    return None


def background_reason(image: NDArray[np.uint8], valid: Mask | None = None) -> str | None:
    """Judge a background, (256, 256) uint8, where it is ``valid``: not black, white, flat, or of two grey levels."""
    fault = picture_fault(image, valid)
    return "flat background" if fault == "flat" else None if fault is None else f"background {fault}"
