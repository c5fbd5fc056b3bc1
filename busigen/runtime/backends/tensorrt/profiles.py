"""Batch sizes that engines are built for, the calls that compute other batches, and where a call's tensors lie."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from busigen.errors import IntegrityError, UsageError
from busigen.registry import DEFAULT_BATCH, MIN_BATCH, rows_per_call

MAX_BATCH = 4096  # largest `--batch-size`
ALIGNMENT = 256  # bytes at whose multiples a tensor begins, as cudaMalloc's blocks do
_ITEM = np.dtype(np.float32).itemsize  # bytes of a number: bundles take and give fp32, whatever they compute in
_IN_VERSION = re.compile(r"\bbatch (?P<dynamic>up to )?(?P<sizes>\d{1,4}(,\d{1,4})*)$")


class Profile(NamedTuple):
    """Rows that an engine takes in a call: least, best and most. All three are the same for a fixed batch."""

    least: int
    best: int
    most: int


class Call(NamedTuple):
    """One engine call on rows ``first`` to before ``end`` of a batch, with the last row repeated up to ``rows``."""

    first: int
    end: int
    profile: int
    rows: int


@dataclass(frozen=True)
class Batches:
    """Batch sizes to build engines for, the full one first, in rows at the smallest window; or a UsageError."""

    # ``dynamic`` asks for one profile for every batch up to the full one, in place of a fixed one per size.

    sizes: tuple[int, ...] = (DEFAULT_BATCH,)
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or any(not 1 <= size <= MAX_BATCH for size in self.sizes):
            shown = ",".join(map(str, self.sizes))
            raise UsageError(f"--batch-size is {shown!r}.", fix=f"Give whole numbers from 1 to {MAX_BATCH}.")

    @classmethod
    def parse(cls, text: str, *, dynamic: bool = False) -> Batches:
        """Read ``16`` or ``16,4``; a ``UsageError`` if it is neither."""
        try:
            return cls(tuple(sorted({int(size) for size in text.split(",")}, reverse=True)), dynamic)
        except ValueError:
            fix = "Give a batch size such as 16, or several such as 16,4: the first for full batches, the others for "
            raise UsageError(f"--batch-size is {text!r}.", fix=f"{fix}what is left over.") from None

    @classmethod
    def recorded(cls, run: Mapping[str, Any]) -> Batches | None:
        """Those of the engines that drew a dataset with this ``run.json``; None if its provider takes any batch."""
        try:
            if field := run.get("engine_batches"):
                return cls(tuple(field["sizes"]), bool(field["dynamic"]))
            # Older records have no such field, but the engines' version names the batches.
            if found := _IN_VERSION.search(str(run.get("fingerprint", {}).get("engine_version"))):
                return cls(tuple(int(size) for size in found["sizes"].split(",")), bool(found["dynamic"]))
        except UsageError:  # Somebody wrote the record by hand.
            pass
        return None

    def __str__(self) -> str:
        return f"batch {'up to ' if self.dynamic else ''}{','.join(map(str, self.sizes))}"

    def profiles(self, side: int) -> tuple[Profile, ...]:
        """Profiles of the engine of a graph whose calls are sized by ``side`` (`Bundle.call_side`), largest first."""
        rows = sorted({rows_per_call(side, size) for size in self.sizes}, reverse=True)
        if self.dynamic:
            return (Profile(MIN_BATCH, rows[0], rows[0]),)
        return tuple(Profile(count, count, count) for count in rows)


def calls(count: int, profiles: Sequence[Profile]) -> list[Call]:
    """Split a batch of ``count`` rows into full calls and one for the rest, by the smallest profile that holds it."""
    full = profiles[0].most
    planned = []
    for first in range(0, count, full):
        left = min(full, count - first)
        profile = max(number for number, profile in enumerate(profiles) if profile.most >= left)
        planned.append(Call(first, first + left, profile, max(left, profiles[profile].least)))
    return planned


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a block of memory: first byte, and shape with the batch in front."""

    offset: int
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return prod(self.shape) * _ITEM

    def view(self, block: NDArray[np.uint8]) -> NDArray[np.float32]:
        """The tensor as an array."""
        return block[self.offset : self.offset + self.size].view(np.float32).reshape(self.shape)


def places(shapes: Mapping[str, Sequence[int]]) -> tuple[dict[str, Place], int]:
    """Places of tensors of these shapes one after the other, and the block's size in bytes."""
    laid, at = {}, 0
    for name, shape in shapes.items():
        laid[name] = Place(at, tuple(shape))
        at += -(-laid[name].size // ALIGNMENT) * ALIGNMENT
    return laid, at


def fill(
    block: NDArray[np.uint8], laid: Mapping[str, Place], inputs: Mapping[str, NDArray[Any]], first: int, end: int
) -> None:
    """Write rows to their places, the last one repeated to the end; an ``IntegrityError`` if an input does not fit."""
    for name, place in laid.items():
        if (rows := inputs.get(name)) is None or rows.shape[1:] != place.shape[1:]:
            found = "is missing" if rows is None else f"has rows of shape {rows.shape[1:]}"
            wrong = f"the engine's input {name!r} {found}; it takes {place.shape[1:]}."
            raise IntegrityError(wrong, fix="Export the bundle again with 'busigen export'.")
        room = place.view(block)
        room[: end - first] = rows[first:end]
        room[end - first :] = rows[end - 1]
