"""Which images a reader study shows, and in which order."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from busigen.errors import InputError
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reader_study.records import Truth

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Side:
    """The images that one half of a study is drawn from: the set each comes from, and its recorded BI-RADS category."""

    truth: Truth
    images: ImageSet
    sources: Sequence[str | None]
    birads: Sequence[str | None]

    def room(self) -> dict[str, int]:
        """Number of groups that each class has images of: of each, a study shows one image at most."""
        pairs = {(name, int(group)) for name, group in zip(self.images.classes, self.images.groups, strict=True)}
        return {str(name): sum(one == name for one, _ in pairs) for name in np.unique(self.images.classes)}

    def without(self, ids: Collection[str]) -> Side:
        """The same without some images."""
        kept = [row for row, name in enumerate(self.images.table["id"]) if name not in ids]
        sources, birads = ([values[row] for row in kept] for values in (self.sources, self.birads))
        return Side(self.truth, self.images.take(np.array(kept, dtype=np.int64)), sources, birads)


def choose(sides: Sequence[Side], cases: int, rng: np.random.Generator) -> list[Rows]:
    """Rows of each side: as many of every class that both have, and of every source as far as there are enough.

    No two rows of a side are of one group (patient, shared background, near-duplicates).

    Raises `InputError` where the sides share no class, or a class has too few groups.
    """
    shared = sorted(set.intersection(*(set(side.room()) for side in sides)))
    if not shared:
        found = "; ".join(f"the {side.truth} ones are {', '.join(side.room())}" for side in sides)
        raise InputError(
            f"Real and synthetic images share no class: {found}.", fix="Give sets with classes in their names or rows."
        )
    counts = [cases // 2, cases - cases // 2]
    return [
        _drawn(side, dict(zip(shared, spread(count, [count] * len(shared)), strict=True)), cases, rng)
        for side, count in zip(sides, counts, strict=True)
    ]


def _drawn(side: Side, wanted: Mapping[str, int], cases: int, rng: np.random.Generator) -> Rows:
    order = rng.permutation(len(side.images))
    classes, groups = side.images.classes, side.images.groups
    taken: set[int] = set()
    chosen: list[int] = []
    # The rarest class first: a group of two classes is then left to the one that has fewer.
    room = side.room()
    for name in sorted(wanted, key=lambda name: room[name]):
        by_source: dict[str, list[int]] = {}
        held = set(taken)
        for row in order:
            if classes[row] == name and int(groups[row]) not in held:
                held.add(int(groups[row]))
                by_source.setdefault(side.sources[row] or "", []).append(int(row))
        free = sum(map(len, by_source.values()))
        if free < wanted[name]:
            raise InputError(
                f"{cases} cases need {wanted[name]} {side.truth} images of the class {name}, no two of one patient, "
                f"background or near-duplicate, and {side.images.name} has {free}.",
                fix=f"Give more images, or --cases {max(4, cases * free // wanted[name] // 4 * 4)}."
                if free
                else "Give more images.",
            )
        names = sorted(by_source)
        for source, count in zip(names, spread(wanted[name], [len(by_source[one]) for one in names]), strict=True):
            chosen += by_source[source][:count]
        taken |= {int(groups[row]) for row in chosen}
    return np.array(chosen, dtype=np.int64)


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
