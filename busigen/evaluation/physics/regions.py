"""Where an image is measured: lesion, ring around it, background, and the strips below and beside it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import around

RING = (2.0, 12.0)
"""Distances in pixels from the outline between which the ring lies. The 2 px gap leaves the blurred margin out."""

POSTERIOR_GAP = 4
"""Rows between a lesion's lowest pixel and the strips below it: the bright posterior margin belongs to neither."""

POSTERIOR_DEPTH = (16, 48)
"""Least and greatest depth in rows of the strips; between these it is the lesion's own height."""

LATERAL_GAP = 4
"""Columns between a lesion's width and the strips beside it, which leaves out refraction at its edges."""

MIN_PIXELS = 64
"""A region of fewer pixels is not measured: its moments would be mostly noise."""

EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.bool_)


@dataclass(frozen=True)
class Regions:
    """Where an image is measured. All masks are ``bool (H, W)`` and hold no overlays and no letterbox bars.

    Attributes:
        tissue: All that may be measured: the image without its overlays.
        ring: The band around them, ``RING`` px outside the outline.
        posterior: Below the largest lesion, as wide as it, ``POSTERIOR_GAP`` rows under its lowest pixel and as deep as
            it is high (within ``POSTERIOR_DEPTH``; less where the image ends).
        lateral: The same rows on both sides, each half as wide as the lesion.
        distance: ``float32 (H, W)``, distance in pixels to the outline, negative inside, ``inf`` beyond the ring,
            ``-inf`` where the lesion fills the frame and has no outline.
        largest: ``bool (H, W)``, the largest connected lesion, overlays and all: what shape is measured on.
        box: Rows and columns that hold lesions and ring; None without a lesion.
    """

    tissue: NDArray[np.bool_]
    lesion: NDArray[np.bool_]
    ring: NDArray[np.bool_]
    background: NDArray[np.bool_]
    posterior: NDArray[np.bool_]
    lateral: NDArray[np.bool_]
    distance: NDArray[np.float32]
    largest: NDArray[np.bool_]
    box: tuple[slice, slice] | None

    def named(self, name: str) -> tuple[NDArray[np.bool_], tuple[slice, slice]]:
        """``lesion``, ``ring`` or ``background``, and a window that holds it."""
        everything = (slice(None), slice(None))
        return getattr(self, name), everything if name == "background" or self.box is None else self.box


def find_regions(mask: NDArray[np.bool_], valid: NDArray[np.bool_], overlays: NDArray[np.bool_]) -> Regions:
    """Divide one image.

    Args:
        mask: ``bool (H, W)``, True on lesions; may be empty.
        valid: ``bool (H, W)``, True on the image.
        overlays: ``bool (H, W)``, True on suspected calipers and text.

    Returns:
        The regions; all but ``tissue`` and ``background`` are empty where there is no lesion.
    """
    tissue = valid & ~overlays
    mask = mask & valid
    distance = np.full(mask.shape, np.inf, dtype=np.float32)
    empty = np.zeros(mask.shape, dtype=np.bool_)
    if not mask.any():
        return Regions(tissue, empty, empty, tissue, empty, empty, distance, empty, None)
    box = around(mask, int(RING[1]) + 1)
    inside = mask[box]
    away = ndimage.distance_transform_edt(~inside)
    # The outline runs between pixels, half a pixel from the centres on both sides of it.
    near = np.where(inside, 0.5 - _depth(inside), away - 0.5).astype(np.float32)
    distance[box] = np.where(near <= RING[1], near, np.inf)
    largest = largest_part(mask)
    posterior, lateral = _below(largest, mask, tissue)
    # Not isinf: a lesion that fills the frame lies at minus infinity.
    beyond = np.isposinf(distance)
    return Regions(
        tissue=tissue,
        lesion=mask & tissue,
        ring=(distance > RING[0]) & ~beyond & tissue,
        background=beyond & tissue,
        posterior=posterior,
        lateral=lateral,
        distance=distance,
        largest=largest,
        box=box,
    )


def bounds(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a mask that is not empty; the last two are beyond it."""
    rows, columns = around(mask, 0)
    return rows.start, columns.start, rows.stop, columns.stop


def largest_part(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The largest 8-connected part of a mask that is not empty; its holes stay."""
    box = around(mask, 0)
    labels, count = ndimage.label(mask[box], structure=EIGHT_NEIGHBOURS)
    if count <= 1:
        return mask
    largest = np.zeros_like(mask)
    largest[box] = labels == np.bincount(labels.ravel())[1:].argmax() + 1
    return largest


def _depth(inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    # Padded by its own edge, so that a lesion that the frame cuts off has no outline there.
    padded = np.pad(inside, 1, mode="edge")
    if padded.all():
        return np.full(inside.shape, np.inf)
    depth: NDArray[np.float64] = ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    return depth


def _below(
    largest: NDArray[np.bool_], mask: NDArray[np.bool_], tissue: NDArray[np.bool_]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    top, left, bottom, right = bounds(largest)
    depth = int(np.clip(bottom - top, *POSTERIOR_DEPTH))
    band = slice(bottom + POSTERIOR_GAP, bottom + POSTERIOR_GAP + depth)
    half = max((right - left + 1) // 2, 4)
    free = tissue & ~mask
    posterior, lateral = np.zeros_like(mask), np.zeros_like(mask)
    posterior[band, left:right] = free[band, left:right]
    for side in (
        slice(max(left - LATERAL_GAP - half, 0), max(left - LATERAL_GAP, 0)),
        slice(right + LATERAL_GAP, right + LATERAL_GAP + half),
    ):
        lateral[band, side] = free[band, side]
    return posterior, lateral
