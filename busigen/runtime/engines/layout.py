"""Where the tensors of a call lie: one block of memory for what goes in, and one for what comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray

from busigen.errors import IntegrityError
from busigen.runtime.backend import Arrays

ALIGNMENT = 256
"""Bytes at whose multiples a tensor begins, as cudaMalloc's blocks do."""

ITEM = np.dtype(np.float32).itemsize
"""Bytes of a number: bundles take and give fp32, whatever they compute in."""


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in its block: first byte, and shape with the batch in front."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * ITEM


def places(shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Place], int]:
    """Lay tensors out one after the other.

    Args:
        shapes: of each, the batch in front.

    Returns:
        Each one's place, and the block's size in bytes.
    """
    laid, at = {}, 0
    for name, shape in shapes.items():
        laid[name] = Place(at, tuple(shape))
        at += -(-laid[name].size // ALIGNMENT) * ALIGNMENT
    return laid, at


def fill(block: NDArray[np.uint8], laid: Mapping[str, Place], inputs: Arrays, first: int, end: int) -> None:
    """Write rows of a batch to their places, the last one repeated to the end of each.

    Args:
        block: the bytes of all inputs.
        laid: their places.
        inputs: the batch.
        first: row that the call begins with.
        end: row before which it ends.

    Raises:
        IntegrityError: an input is missing or has another shape than the engine's.
    """
    for name, place in laid.items():
        rows = inputs.get(name)
        if rows is None or rows.shape[1:] != place.shape[1:]:
            found = "is missing" if rows is None else f"has rows of shape {rows.shape[1:]}"
            raise IntegrityError(
                f"the engine's input {name!r} {found}; it takes {place.shape[1:]}.",
                fix="Export the bundle again with 'busigen export'.",
            )
        room = view(block, place)
        room[: end - first] = rows[first:end]
        room[end - first :] = rows[end - 1]


def view(block: NDArray[np.uint8], place: Place) -> NDArray[np.float32]:
    """A tensor in a block, as an array."""
    return block[place.offset : place.offset + place.size].view(np.float32).reshape(place.shape)
