"""A condition on a set's columns, such as one scanner: what is read of it, and what is said where nothing fits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from busigen.errors import InputError, UsageError
from busigen.text import printable

_SHOWN = 10


@dataclass(frozen=True)
class Within:
    """Images whose ``column`` holds ``value``, as text: ``4`` is 4. ``required``: The set has to have the column."""

    column: str
    value: str
    required: bool = False

    @classmethod
    def parse(cls, text: str) -> Within:
        """Read ``COLUMN=VALUE``; a ``UsageError`` where it is none."""
        column, equals, value = (part.strip() for part in text.partition("="))
        if not (column and equals and value):
            raise UsageError(f"--within is {text!r}.", fix='Give COLUMN=VALUE, such as --within source="busi".')
        return cls(column, value)

    @property
    def absent(self) -> str:
        """What a report says of a set that does not have the column."""
        return f"it has no column {self.column!r}, so that all of its images are taken"

    def rows(self, path: Path, values: Sequence[object] | None) -> NDArray[np.int64] | None:
        """Positions of the images of a set whose values of the column these are; None, for all, where it has none.

        Raises ``InputError`` where no image fits, naming what there is.
        """
        if values is None:
            if self.required:
                fix = "Give the folder that `busigen prepare` wrote, and one of its columns."
                raise InputError(f"--within {self.column}: {path} has no column of that name.", fix=fix)
            return None
        said = ["" if value is None else str(value) for value in values]
        found = np.flatnonzero([value == self.value for value in said])
        if not len(found):
            known = [f"{value or 'nothing'} ({count})" for value, count in Counter(said).most_common(_SHOWN)]
            more = ", ..." if len(set(said)) > len(known) else ""
            raise InputError(
                f"--within {self.column}={self.value}: no image of {path} has that value.",
                fix=f"It holds: {printable(', '.join(known))}{more}.",
            )
        return found
