"""Several lesions an image: where a further one may lie, and what the manifest says of each, by its number from 1."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import ndimage

from busigen.data.geometry import Mask
from busigen.registry import ATTRIBUTES
from busigen.runtime.dataset.shards import lesion_box

COLUMNS: dict[str, type] = {
    **dict.fromkeys(("window_top", "window_left", "window_side", "edit_pixels"), int),
    **dict.fromkeys(("area_share", *(name for name in ATTRIBUTES if name != "size")), float),
    **{f"asked_{name}": float for name in ATTRIBUTES},
}
"""What is said of a lesion. Where a sample has several, the columns without a number are those of its first one, but
for ``edit_pixels``, which counts those of all."""

FURTHER = {"across": (0.15, 0.85), "depth": (0.15, 0.5), "size": (0.004, 0.03)}
"""Between what a further lesion is asked for, in the units of `conditions.BOUNDS`, unless a user says. Ten images of
BUSI have two lesions of 60 pixels or more: 19 of the 20 lie there, and nine of the ten smaller ones have 0.002 to 0.027
of their image. Left to itself, stage 1 draws nearly all further lesions where the first one is."""

CLEARANCE = 20.0  # pixels from other lesions' edit regions to the centre: a small lesion's radius and its margin
PLACE_DRAWS = 32  # random numbers for places, two each, of which the first one that is clear of other lesions is taken

_SHAPE = ("pixels", "box_left", "box_top", "box_right", "box_bottom")


def free_place(
    draws: Sequence[float], bounds: Mapping[str, tuple[float, float]], taken: Sequence[Mask], valid: Mask
) -> dict[str, float]:
    """A place for a further lesion's centre, ``across`` and ``depth``, clear of edit regions that are ``taken``.

    ``draws`` are numbers in [0, 1), two to a place within ``bounds``; where none is clear, the last place is taken.
    Edit regions are ``(256, 256)`` bool, and so are the ``valid`` pixels, which are no letterbox bars.
    """
    rows, columns = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    distance = ndimage.distance_transform_edt(~np.logical_or.reduce(taken))
    found: dict[str, float] = {}
    for pair in zip(draws[::2], draws[1::2], strict=True):
        shares = zip(pair, (bounds["across"], bounds["depth"]), strict=True)
        across, depth = (low + share * (high - low) for share, (low, high) in shares)
        found = {"across": across, "depth": depth}
        if distance[rows[int(depth * rows.size)], columns[int(across * columns.size)]] >= CLEARANCE:
            break
    return found


def numbered_columns(most: int) -> dict[str, type]:
    """Manifest columns where samples have up to so many lesions; none for 0, where each has one."""
    found: dict[str, type] = {"lesions": int} if most else {}
    for number in range(1, most + 1):
        found |= {f"mask_{number}_sha256": str, **{f"lesion_{number}_{name}": int for name in _SHAPE}}
        found |= {f"lesion_{number}_{name}": kind for name, kind in COLUMNS.items()}
    return found


def numbered_row(most: int, masks: Sequence[Mask], rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A sample's fields of `numbered_columns` but for hashes, from its lesions' masks and their `COLUMNS`."""
    found: dict[str, Any] = {"lesions": len(masks)} if most else {}
    for number in range(1, most + 1):
        own: dict[str, Any] = dict.fromkeys((*_SHAPE, *COLUMNS))
        if number <= len(masks):
            own = {**shape_row(masks[number - 1]), **rows[number - 1]}
        found |= {f"lesion_{number}_{name}": value for name, value in own.items()}
    return found


def shape_row(mask: Mask) -> dict[str, int | None]:
    """Pixels and box of a lesion's mask ``(256, 256)``, as the manifest has them; of an empty one, all None."""
    pixels = int(mask.sum()) or None
    return dict(zip(_SHAPE, (pixels, *(lesion_box(mask) or (None,) * 4)), strict=True))
