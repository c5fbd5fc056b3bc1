"""Whether a mask's outline lies where the image has an edge, by trying the outline everywhere around its place."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

REACH = 16
"""Farthest displacement in pixels, down and across, at which the outline is tried."""

STEP = 2
"""Pixels between tried displacements; finer ones move the best place by less than annotators disagree."""

BLUR = 2.0
"""Width in pixels of the Gaussian before the gradient, above a speckle grain: speckle has edges everywhere."""

MIN_OUTLINE = 24
"""Outline pixels on the image, away from its rim, that a judgement needs."""

RIM = 3
"""Pixels along the image's rim that do not count: the step to a letterbox bar is no lesion's edge."""

_DOWN, _ACROSS = (
    part.ravel()[:, None] for part in np.mgrid[-REACH : REACH + 1 : STEP, -REACH : REACH + 1 : STEP].astype(np.int64)
)
_DISTANCE = np.hypot(_DOWN, _ACROSS).ravel()


@dataclass(frozen=True)
class EdgeFit:
    """How well an outline fits.

    Attributes:
        displacement: Pixels from the outline's place to the place nearby where it fits best, 0 to 22.6.
        contrast: Grey levels per pixel by which the image brightens across the outline in its place, less the mean over
            all places tried, in standard deviations over them.
    """

    displacement: float
    contrast: float


def edge_fit(image: NDArray[np.uint8], mask: NDArray[np.bool_], valid: NDArray[np.bool_]) -> EdgeFit | None:
    """Compare the outline's place with every place up to ``REACH`` pixels away.

    In each place the smoothed image's gradient is averaged along the outline's outward normals. Nearly all lesions are
    darker than what is around them, so the sum is largest where outline and edge agree.

    Args:
        image: ``uint8 (H, W)``.
        mask: ``bool (H, W)``.
        valid: ``bool (H, W)``, pixels that are image.

    Returns:
        The fit, or None where less than ``MIN_OUTLINE`` pixels of outline lie on the image.
    """
    inside = ndimage.binary_erosion(valid, iterations=RIM)
    rows, columns = np.nonzero((mask ^ ndimage.binary_erosion(mask)) & inside)
    if len(rows) < MIN_OUTLINE:
        return None
    slope = np.gradient(ndimage.gaussian_filter(image.astype(np.float32), BLUR))
    normal = -np.stack(np.gradient(ndimage.gaussian_filter(mask.astype(np.float32), BLUR)))[:, rows, columns]
    normal /= np.linalg.norm(normal, axis=0) + 1e-6
    down, across = rows + _DOWN, columns + _ACROSS
    height, width = image.shape
    within = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    down, across = down.clip(0, height - 1), across.clip(0, width - 1)
    within &= inside[down, across]
    rise = (slope[0][down, across] * normal[0] + slope[1][down, across] * normal[1]) * within
    fit = rise.sum(axis=1) / np.maximum(within.sum(axis=1), 1)
    # A place where most of the outline hangs over the rim is judged by too little of it.
    tried = within.mean(axis=1) >= 0.5
    here = int(np.argmin(_DISTANCE))
    if not tried[here]:
        return None
    best = int(np.argmax(np.where(tried, fit, -np.inf)))
    contrast = (fit[here] - fit[tried].mean()) / (fit[tried].std() + 1e-6)
    return EdgeFit(displacement=float(_DISTANCE[best]), contrast=float(contrast))
