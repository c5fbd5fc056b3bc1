"""Several lesions an image: what the manifest says of each, by its number from 1, beside what it says of the sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

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

_SHAPE = ("pixels", "box_left", "box_top", "box_right", "box_bottom")


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
