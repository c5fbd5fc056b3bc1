"""Grids: every background with the same noise and place, and some attributes at each combination of their levels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from math import isnan, nan, prod

from busigen.errors import UsageError
from busigen.registry import ATTRIBUTES, BIRADS, LESION_CLASSES
from busigen.runtime.dataset.format import Plan
from busigen.runtime.sampling.conditions import BOUNDS, SampleConditions, parse_conditions

LEVELS: dict[str, tuple[str, ...]] = {
    "class": LESION_CLASSES,
    "birads": BIRADS,
    "size": ("0.02", "0.05", "0.1"),
    "depth": ("0.3", "0.4", "0.5"),
    "across": ("0.35", "0.5", "0.65"),
    "height_width": ("0.5", "0.75", "1.1"),
    "scanner": (),
}  # what can be varied, and between what unless it is said; scanners are the bundle's
HELD = {"across": "0.35:0.65", "depth": "0.25:0.45", "size": "0.02:0.08", "height_width": "0.5:0.9"}
"""Between what the attributes that are not varied are drawn for each background, unless asked otherwise: a lesion that
nothing holds would be another one for each class and category."""

MAX_CELLS = 64  # combinations a background, all of which are drawn again where one is refused
COLUMNS: dict[str, type] = {"grid_group": int, "grid_level": str}
"""Manifest columns of a grid: the background's number, from 0, and what the sample's own levels are."""

_BETWEEN = "levels have / between them, and a comma begins another attribute"
_NAMES = {"class": "", "birads": "BI-RADS "}


@dataclass(frozen=True)
class Grid:
    """What is varied, as one would type it with all levels, and the combinations: level by attribute, each a sample."""

    vary: str
    cells: tuple[Mapping[str, str], ...]

    @classmethod
    def parse(cls, text: str) -> Grid:
        """Read ``class,size=0.02/0.05``; a ``UsageError`` where an attribute or a level cannot be."""
        levels: dict[str, tuple[str, ...]] = {}
        for part in text.split(","):
            given, _, listed = (piece.strip() for piece in part.partition("="))
            name = given.replace("-", "_").lower()
            if name not in LEVELS:
                raise UsageError(f"--vary names {given!r}.", fix=f"Choose among: {', '.join(LEVELS)}; {_BETWEEN}.")
            if name in levels:
                raise UsageError(f"--vary names {given!r} twice.", fix="Name it once, with all of its levels.")
            found = tuple(level.strip() for level in listed.split("/")) if listed else LEVELS[name]
            if len(set(found)) < len(found) or len(found) < 2:
                fix = f"Give two or more ({_BETWEEN}), such as {name}={'/'.join(LEVELS[name] or ('NAME', 'any'))}."
                wrong = "has a level twice, or a single one" if found else "names no level"
                raise UsageError(f"--vary {part.strip()} {wrong}.", fix=fix)
            for level in found:
                _refuse_level(name, level)
            levels[name] = found
        if (count := prod(map(len, levels.values()))) > MAX_CELLS:
            fix = f"Vary fewer attributes, or give fewer levels; {MAX_CELLS} combinations are the most."
            raise UsageError(f"--vary {text} makes {count} combinations of each background.", fix=fix)
        cells = tuple(dict(zip(levels, combination, strict=True)) for combination in product(*levels.values()))
        return cls(",".join(f"{name}={'/'.join(found)}" for name, found in levels.items()), cells)

    def held(self, typed: Mapping[str, str | bool | None]) -> SampleConditions:
        """What is asked of all samples: the options as they were ``typed``, else `HELD`, without what is varied."""
        for name, value in typed.items():
            attribute = "height_width" if name == "taller_than_wide" else name
            if value and attribute in self.cells[0]:
                option = f"--{name.replace('_', '-')}"
                raise UsageError(f"{option} holds what --vary varies.", fix=f"Leave out {option}, or do not vary it.")
        open_ = {name: text for name, text in HELD.items() if name not in self.cells[0] and not typed.get(name)}
        if typed.get("taller_than_wide"):
            open_.pop("height_width", None)
        return parse_conditions(**{**typed, **open_})  # type: ignore[arg-type]

    def levels(self, name: str) -> tuple[str, ...]:
        """The levels of an attribute in order; none where it is not varied."""
        return tuple(dict.fromkeys(cell[name] for cell in self.cells if name in cell))

    def cell(self, index: int) -> Mapping[str, str]:
        """The levels of a sample: all of a background follow one another."""
        return self.cells[index % len(self.cells)]

    def conditions(self, index: int, held: SampleConditions) -> SampleConditions:
        """What is asked of one sample."""
        cell = self.cell(index)
        own = {name: (float(cell[name]), float(cell[name])) for name in ATTRIBUTES if name in cell}
        birads = {cell["birads"]: 1.0} if "birads" in cell else held.birads
        return replace(held, ranges={**held.ranges, **own}, birads=birads)

    def refuse_cut(self, plan: Plan) -> None:
        """Raise a ``UsageError`` where a dataset or its shards would hold a part of a background's samples."""
        cells = len(self.cells)
        for option, value in (("--count", plan.count), ("--shard-size", plan.shard_size)):
            if value % cells:
                fix = f"Give a multiple of {cells}, the combinations of each background."
                raise UsageError(f"{option} is {value}, and --vary {self.vary} is given.", fix=fix)

    def row(self, index: int) -> dict[str, object]:
        """A sample's manifest fields, by `COLUMNS`."""
        said = (f"{_NAMES.get(name, name.replace('_', '/') + ' ')}{level}" for name, level in self.cell(index).items())
        return dict(zip(COLUMNS, (index // len(self.cells), ", ".join(said)), strict=True))


def levels_of(said: str) -> dict[str, str]:
    """Level by attribute, from what `Grid.row` says of a sample; what it does not know is left out."""
    names = {_NAMES.get(name, name.replace("_", "/") + " "): name for name in LEVELS}
    found = {}
    for part in said.split(", "):
        name, _, level = part.rpartition(" ")
        attribute = names.get(f"{name} " if name else "")
        # Any number may be a level of the others.
        if attribute and level and (attribute not in _NAMES or level in LEVELS[attribute]):
            found[attribute] = level
    return found


def _refuse_level(name: str, level: str) -> None:
    if name == "scanner":
        return  # Which there are, the bundle says.
    wrong, fix = "" if level in LEVELS[name] else "is none of its levels", f"Choose among: {', '.join(LEVELS[name])}."
    if name in BOUNDS:
        least, greatest = BOUNDS[name]
        fix = f"Give single numbers from {least:g} to {greatest:g}, with / between them."
        try:
            value = float(level)
        except ValueError:
            value = nan
        wrong = "is too small" if value < least else "is too large" if value > greatest else ""
        if isnan(value):
            wrong = "is no number"
    if wrong:
        raise UsageError(f"--vary {name}={level} {wrong}.", fix=fix)
