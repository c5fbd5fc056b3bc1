"""What a classifier is shown of each image: all of it, the lesion, or only the seam around the lesion.

No view holds a letterbox bar or a filled-in pixel, and none is given the mask: bars and mask would tell two sets apart
by how their files were made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from skimage import measure

from busigen.evaluation.context import ImageSet

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]

MARGIN = 1.5
"""Side of the lesion crop over the longer side of the lesion's box."""

SMALLEST = 64
"""Pixels of the working frame that a lesion crop spans at least."""

BAND = 16
"""Pixels that the ring reaches inwards and outwards of the outline."""

RING_LENGTH = 256
"""Pixels along the outline; shorter outlines go round again, longer ones are cut."""

_SMOOTHING = 2.0
"""Sigma in pixels of the distance map whose gradient gives the outline's normals, so that jags do not cross them."""


def whole(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """The largest centred square inside the letterbox bars, as 192 by 192 pixels."""
    top, bottom, left, right = _box(valid)
    side = min(bottom - top, right - left)
    y, x = (bottom - top - side) / 2, (right - left - side) / 2
    return _resized(image[top:bottom, left:right], y, x, side, 192)


def lesion(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """A square around the largest lesion, moved and if need be shrunk to lie on the image, as 128 by 128 pixels."""
    top, bottom, left, right = _box(valid)
    y0, y1, x0, x1 = _box(_largest(mask))
    side = min(max(MARGIN * max(y1 - y0, x1 - x0), SMALLEST), bottom - top, right - left)
    y = np.clip((y0 + y1 - side) / 2, top, bottom - side)
    x = np.clip((x0 + x1 - side) / 2, left, right - side)
    # Cut to the image first: resampling reaches a pixel beyond its box, which must not be a bar's.
    return _resized(image[top:bottom, left:right], y - top, x - left, side, 128)


def ring(image: Pixels, mask: Mask, valid: Mask) -> Pixels:
    """The band within ``BAND`` pixels of the largest lesion's outline, unrolled: 32 rows from inside to outside.

    Blanking all other pixels in place would leave the outline's shape in the picture. Unrolled along the outline's
    normals at the image's own pixel scale, the strip shows only what lies across the edge; a seam is a line along its
    middle. Where a normal leaves the image, the last pixel is repeated.
    """
    part = _largest(mask)
    padded = np.pad(part, 1)
    distance = ndimage.distance_transform_edt(~padded) - ndimage.distance_transform_edt(padded)
    slope = np.stack(np.gradient(ndimage.gaussian_filter(distance, _SMOOTHING)))
    contours = measure.find_contours(padded.astype(np.float32), 0.5)
    outline = max(contours, key=len)
    steps = np.hypot(*np.diff(outline, axis=0).T)
    along = np.concatenate([[0.0], np.cumsum(steps)])
    places = np.arange(RING_LENGTH) % max(along[-1], 1.0)
    points = np.stack([np.interp(places, along, outline[:, k]) for k in (0, 1)])
    normals = np.stack([ndimage.map_coordinates(slope[k], points, order=1) for k in (0, 1)])
    normals /= np.maximum(np.hypot(*normals), 1e-6)
    offsets = np.arange(-BAND, BAND) + 0.5
    coordinates = points[:, None] - 1 + normals[:, None] * offsets[:, None]
    top, bottom, left, right = _box(valid)
    coordinates[0] = np.clip(coordinates[0], top, bottom - 1)
    coordinates[1] = np.clip(coordinates[1], left, right - 1)
    strip = ndimage.map_coordinates(image.astype(np.float32), coordinates, order=1)
    return np.asarray(np.rint(strip), dtype=np.uint8)


@dataclass(frozen=True)
class View:
    """One view.

    Attributes:
        name: Part of a figure's key.
        label: For people.
        cut: Maps image, mask and valid pixels of one frame to ``uint8 (height, width)`` of a fixed size.
        cells: Rows and columns of the grid in which a fixed network's responses are pooled.
    """

    name: str
    label: str
    cut: Callable[[Pixels, Mask, Mask], Pixels]
    cells: tuple[int, int]

    def of(self, images: ImageSet) -> Pixels:
        """``uint8 (N, height, width)``; every mask must hold a lesion, but for the view of whole images."""
        return np.stack([self.cut(*frame) for frame in zip(images.images, images.masks, images.valid, strict=True)])


VIEWS = {
    view.name: view
    for view in (
        View("whole", "whole image", whole, (3, 1)),
        View("lesion", "lesion crop", lesion, (3, 3)),
        View("ring", "ring around the outline", ring, (5, 1)),
    )
}


def _box(mask: Mask) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


def _largest(mask: Mask) -> Mask:
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count <= 1:
        return mask
    return np.asarray(labels == 1 + np.argmax(np.bincount(labels.ravel())[1:]))


def _resized(image: Pixels, y: float, x: float, side: float, to: int) -> Pixels:
    box = (x, y, x + side, y + side)
    return np.asarray(Image.fromarray(image).resize((to, to), Image.Resampling.BILINEAR, box=box))
