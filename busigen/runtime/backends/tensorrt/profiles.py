"""Which batches an engine is built for: a full one, smaller ones for what is left over, or any up to a size."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from busigen.errors import UsageError
from busigen.registry import BUCKETS, DEFAULT_BATCH, MIN_BATCH, rows_per_call

MAX_BATCH = 4096
"""Largest batch size, that of ``generate``, too."""


_IN_VERSION = re.compile(r"\bbatch (?P<dynamic>up to )?(?P<sizes>\d{1,4}(,\d{1,4})*)$")


class Profile(NamedTuple):
    """Rows that an engine takes in a call: at least, at best and at most. A static one has three times the same."""

    least: int
    best: int
    most: int


class Call(NamedTuple):
    """One call of an engine: which rows of a batch it computes, and with which of the engine's profiles."""

    first: int
    end: int
    profile: int
    rows: int
    """That the engine is run with: the last row is repeated up to there."""


@dataclass(frozen=True)
class Batches:
    """What engines are to be built for.

    Attributes:
        sizes: batch sizes, the full one first; as in ``generate``, they count rows at the smallest window.
        dynamic: one profile for every batch up to the full one, in place of a static one for each size.
    """

    sizes: tuple[int, ...] = (DEFAULT_BATCH,)
    dynamic: bool = False

    def __post_init__(self) -> None:
        if not self.sizes or any(not 1 <= size <= MAX_BATCH for size in self.sizes):
            shown = ",".join(map(str, self.sizes))
            raise UsageError(f"--batch-size is {shown!r}.", fix=f"Give whole numbers from 1 to {MAX_BATCH}.")

    @classmethod
    def parse(cls, text: str, *, dynamic: bool = False) -> Batches:
        """Read ``16`` or ``16,4``.

        Raises:
            UsageError: that is not what it says.
        """
        try:
            return cls(tuple(sorted({int(size) for size in text.split(",")}, reverse=True)), dynamic)
        except ValueError:
            fix = "Give a batch size such as 16, or several such as 16,4: the first for full batches, the others for "
            raise UsageError(f"--batch-size is {text!r}.", fix=f"{fix}what is left over.") from None

    @classmethod
    def recorded(cls, run: Mapping[str, Any]) -> Batches | None:
        """Those of the engines that drew a dataset; ``None`` where its provider takes any batch.

        Args:
            run: content of ``run.json``. Records of before they had a field for it say it in the engines' version.
        """
        try:
            if field := run.get("engine_batches"):
                return cls(tuple(field["sizes"]), bool(field["dynamic"]))
            if found := _IN_VERSION.search(str(run.get("fingerprint", {}).get("engine_version"))):
                return cls(tuple(int(size) for size in found["sizes"].split(",")), bool(found["dynamic"]))
        except UsageError:  # A record that somebody wrote by hand.
            pass
        return None

    def __str__(self) -> str:
        shown = ",".join(map(str, self.sizes))
        return f"batch up to {shown}" if self.dynamic else f"batch {shown}"

    def profiles(self, graph: str) -> tuple[Profile, ...]:
        """Those of a graph's engine, the largest first."""
        rows = sorted({rows_per_call(side_of(graph), size) for size in self.sizes}, reverse=True)
        if self.dynamic:
            return (Profile(MIN_BATCH, rows[0], rows[0]),)
        return tuple(Profile(count, count, count) for count in rows)


def side_of(graph: str) -> int:
    """The window's side, in pixels, that says how many rows a call of a graph has."""
    _, _, side = graph.partition("@")
    # The prior draws whole images; what has no window otherwise is as cheap as a small one.
    return int(side) if side else BUCKETS[-1] if graph == "prior" else BUCKETS[0]


def calls(count: int, profiles: Sequence[Profile]) -> list[Call]:
    """How a batch of ``count`` rows is computed: in full calls, the rest by the smallest profile that holds it.

    Args:
        count: rows, one at least.
        profiles: an engine's, the largest first.
    """
    full = profiles[0].most
    planned = []
    for first in range(0, count, full):
        left = min(full, count - first)
        profile = max(number for number, profile in enumerate(profiles) if profile.most >= left)
        planned.append(Call(first, first + left, profile, max(left, profiles[profile].least)))
    return planned
