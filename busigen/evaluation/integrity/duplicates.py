"""Images and masks that a set holds more than once."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from busigen.data.groups import NEAR_DUPLICATE
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reading.held_out import correlations, thumbnails
from busigen.registry import SYNTHETIC

_BLOCK = 512


@dataclass(frozen=True)
class Duplicates:
    """Which images repeat an earlier one: three times ``bool (N,)``, and the earlier image, ``int64 (N,)`` or -1.

    Attributes:
        exact: The same pixels.
        near: Thumbnails correlate above ``groups.NEAR_DUPLICATE``; pairs painted into one healthy image do not count.
        mask: The same lesion mask, pixel by pixel.
        twin: The most alike of the earlier images, where ``near``.
    """

    exact: NDArray[np.bool_]
    near: NDArray[np.bool_]
    mask: NDArray[np.bool_]
    twin: NDArray[np.int64]


def find_duplicates(images: ImageSet) -> Duplicates:
    """Look for repeats in one set."""
    near, twin = _near(images)
    return Duplicates(
        exact=_repeats(images.images),
        near=near,
        mask=_repeats(images.masks) & np.asarray(images.masks.any(axis=(1, 2))),
        twin=twin,
    )


def _repeats(arrays: NDArray[np.uint8] | NDArray[np.bool_]) -> NDArray[np.bool_]:
    seen: set[bytes] = set()
    repeats = np.zeros(len(arrays), np.bool_)
    for row, array in enumerate(arrays):
        digest = hashlib.sha256(np.ascontiguousarray(array).data).digest()
        repeats[row] = digest in seen
        seen.add(digest)
    return repeats


def _near(images: ImageSet) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    small = thumbnails(images)
    # Images of one background are alike by construction: each image without a real one gets a name of its own.
    names = [
        name if name not in (None, SYNTHETIC) else f"#{row}" for row, name in enumerate(images.table["background"])
    ]
    _, background = np.unique(np.array(names, dtype=np.str_), return_inverse=True)
    near = np.zeros(len(images), np.bool_)
    twin = np.full(len(images), -1, np.int64)
    rows = np.arange(len(images))
    for start in range(0, len(images), _BLOCK):
        block = rows[start : start + _BLOCK]
        alike = correlations(small[block], small[: block[-1] + 1])
        earlier = (rows[None, : block[-1] + 1] < block[:, None]) & (
            background[None, : block[-1] + 1] != background[block][:, None]
        )
        alike = np.where(earlier, alike, -1.0)
        best = alike.argmax(axis=1)
        found = alike[np.arange(len(block)), best] > NEAR_DUPLICATE
        near[block], twin[block] = found, np.where(found, best, -1)
    return near, twin
