"""Which images a reader study shows, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.errors import InputError
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reader_study.records import Truth

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """The images that one half of a study is drawn from.

    Their table also says which set each comes from (``source``), its ``scanner``, and its recorded BI-RADS category
    (``birads``), null where that is unknown.
    """

    truth: Truth
    images: ImageSet

    def room(self) -> dict[str, int]:
        """Number of groups that each class has images of: of each, a study shows one image at most."""
        return dict(self.images.table.group_by("class").agg(pl.col("group").n_unique()).sort("class").iter_rows())

    def without(self, ids: Collection[str]) -> Side:
        """The same without some images."""
        kept = np.array([name not in ids for name in self.images.table["id"]], dtype=np.bool_)
        return replace(self, images=self.images.take(kept))

    def pool(self, label: str, order: Rows, drawn: Sequence[int]) -> pl.DataFrame:
        """Images of a class in this order, one of each group of which none is drawn yet; ``row`` is their place."""
        table = self.images.table.with_row_index("row").with_columns(pl.col("source", "scanner").fill_null(""))
        wanted = (pl.col("class") == label) & ~pl.col("group").is_in(table["group"][list(drawn)].to_list())
        return table[order.tolist()].filter(wanted).unique("group", keep="first", maintain_order=True)


def choose(sides: Sequence[Side], cases: int, rng: np.random.Generator) -> tuple[list[Rows], list[str]]:
    """Rows of each side, as many of every class that both have, and what to know about them.

    Within a class, each scanner that both sides have is as frequent on one side as on the other, and as the other
    scanners as far as there are enough; what is left is drawn from all the rest, each source as often as the others. No
    two rows of a side are of one group (patient, shared background, near-duplicates).

    Raises `InputError` where the sides share no class, or a class has too few groups.
    """
    rooms = [side.room() for side in sides]
    shared = sorted(set.intersection(*map(set, rooms)))
    if not shared:
        found = "; ".join(
            f"the {side.truth} ones are {', '.join(room)}" for side, room in zip(sides, rooms, strict=True)
        )
        raise InputError(
            f"Real and synthetic images share no class: {found}.", fix="Give sets with classes in their names or rows."
        )
    dealt = (spread(count, [count] * len(shared)) for count in (cases // 2, cases - cases // 2))
    wanted = dict(zip(shared, zip(*dealt, strict=True), strict=True))
    orders = [rng.permutation(len(side.images)) for side in sides]
    chosen: list[list[int]] = [[] for _ in sides]
    unmatched = []
    # The rarest class first: a group of two classes is then left to the one that has fewer.
    for label in sorted(shared, key=lambda label: min(room[label] for room in rooms)):
        pools = [side.pool(label, order, rows) for side, order, rows in zip(sides, orders, chosen, strict=True)]
        for side, pool, count in zip(sides, pools, wanted[label], strict=True):
            _refuse_few(side, label, pool.height, count, cases)
        common = _common(pools)
        room = sum(common.values())
        for pool, rows, count in zip(pools, chosen, wanted[label], strict=True):
            alike = _evenly(pool, "scanner", min(count, room), common)
            left = pool.filter(~pl.col("row").is_in(alike))
            rows += alike + _evenly(left, "source", count - len(alike), _counts(left["source"]))
        if room < (most := max(wanted[label])):
            unmatched.append(f"{room} of {most} {label}")
    notes = unmatched and [
        f"Scanners are matched for {', '.join(unmatched)} images a side, as far as both sets name the same. "
        "Those of the others may give them away."
    ]
    return [np.array(rows, dtype=np.int64) for rows in chosen], notes


def _refuse_few(side: Side, label: str, free: int, wanted: int, cases: int) -> None:
    if free < wanted:
        raise InputError(
            f"{cases} cases need {wanted} {side.truth} images of the class {label}, no two of one patient, "
            f"background or near-duplicate, and {side.images.name} has {free}.",
            fix=f"Give more images, or --cases {max(4, cases * free // wanted // 4 * 4)}."
            if free
            else "Give more images.",
        )


def _counts(values: pl.Series) -> dict[str, int]:
    """How often each value comes, by name."""
    return {str(name): int((values == name).sum()) for name in values.unique().sort()}


def _common(pools: Sequence[pl.DataFrame]) -> dict[str, int]:
    """The scanners that all pools name, and how many images of each they can all give."""
    counts = [_counts(pool["scanner"]) for pool in pools]
    names = set.intersection(*map(set, counts)) - {""}
    return {name: min(count[name] for count in counts) for name in sorted(names)}


def _evenly(pool: pl.DataFrame, column: str, count: int, room: Mapping[str, int]) -> list[int]:
    """Rows of a pool, its first ones of each value of a column: as evenly as there is room for these values."""
    dealt = zip(room, spread(count, list(room.values())), strict=True)
    return [row for name, many in dealt for row in pool.filter(pl.col(column) == name)["row"].head(many)]


def spread(count: int, room: Sequence[int]) -> list[int]:
    """Deal ``count`` to places with so much room, as evenly as that allows; a `ValueError` where it is too little."""
    if count > sum(room):
        raise ValueError(f"{count} do not fit into {sum(room)}")
    dealt = [0] * len(room)
    for _ in range(count):
        dealt[min((k for k in range(len(room)) if dealt[k] < room[k]), key=lambda k: dealt[k])] += 1
    return dealt


def sequence(truths: Sequence[Truth], repeats: int, rng: np.random.Generator) -> list[int]:
    """Cases in the order in which they are shown, ``repeats`` of them twice.

    Those come once in the first third of the cases and again in what follows the second, so that at least a third lies
    between; as many real as synthetic ones. ``repeats`` is a third of the cases at most.
    """
    order = [int(case) for case in rng.permutation(len(truths))]
    third = len(order) // 3
    real, synthetic = ([case for case in order if truths[case] == truth] for truth in ("real", "synthetic"))
    twice = [*real[: repeats // 2], *synthetic[: repeats - repeats // 2]]
    once = [case for case in order if case not in twice]
    first, rest = [*twice, *once][:third], [*twice, *once][third:]
    middle, last = rest[:third], [*rest[third:], *twice]
    return [int(case) for part in (rng.permutation(first), middle, rng.permutation(last)) for case in part]
