"""The pairs of a dataset as a page shows them: all rows at hand, pictures read from the shards when asked for."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.errors import BusigenError, InputError, IntegrityError, UsageError
from busigen.runtime.convert.outlines import rings
from busigen.runtime.convert.selection import parse_where
from busigen.runtime.dataset.finalize import COLOURS
from busigen.runtime.dataset.format import MANIFEST_FILE, RUN_FILE, differences, key_of, shard_path
from busigen.runtime.dataset.reader import Dataset, Member, Places, find_members, read_member
from busigen.runtime.dataset.shards import FIXED_COLUMNS, ShardRecord, recorded_schema
from busigen.runtime.maintenance.merge import PARTS_FOLDER, open_parts, part_name
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.viewing.beside import Beside, Origin

FEW = 20  # Values of a column that the page offers to choose from
TOLD = ("class", "lesions", "asked_birads", "grid_level")  # Columns that tiles show, where a dataset has them
_ORDERS = 8  # Filters and sortings whose result is kept: going from page to page asks for the same again
_MEMBERS = 64  # Pairs whose files are kept: image and outline are asked for one after the other
_RECORDS = 16  # Shards whose refused draws are kept; a record may have megabytes
_VERIFY = "Run `busigen verify` on the dataset to see what is damaged."

Rows = NDArray[np.int64]  # Positions in the table of all pairs, in the order in which they are shown


@dataclass(frozen=True)
class Query:
    """Which pairs are shown and in which order; ``conditions`` are written as for `convert --where`."""

    conditions: tuple[str, ...] = ()
    sort: str = ""  # A column; "" for the manifest's order
    down: bool = False  # Whether large values come first; a pair without one comes last in any case


class Pairs:
    """The pairs of a finished dataset, plain or merged.

    A pair's name is what `busigen explain` takes: its key, of a merged dataset with the part before it. ``where`` and
    ``limit`` leave out pairs for good, ``healthy`` and ``replay`` say where what they were painted into is found (see
    `Beside`, which may raise as well).

    Raises:
        UsageError: an unfit condition or limit.
        InputError: there is no finished dataset, or no pair is as asked for.
        IntegrityError: it is damaged.
    """

    def __init__(
        self,
        folder: Path,
        *,
        where: str | None = None,
        limit: int | None = None,
        healthy: Path | None = None,
        replay: Inputs | None = None,
    ) -> None:
        if limit is not None and limit < 1:
            raise UsageError(f"--limit is {limit}.", fix="Give a whole number of 1 or more.")
        self.folder, self.name = folder, folder.resolve().name
        self._parts = open_parts(folder)
        self.merged = self._parts[0].folder != folder
        tables = [_rows_of(part) for part in self._parts]
        if self.merged:
            tables = [
                table.select(pl.lit(part_name(number)).alias("part"), pl.all()) for number, table in enumerate(tables)
            ]
        if any(table.schema != tables[0].schema for table in tables):
            raise IntegrityError(f"The parts of {folder} have other columns than one another.", fix=_VERIFY)
        self._starts = np.cumsum([0, *(table.height for table in tables)])
        self._table: pl.DataFrame = pl.concat(tables)
        self.columns = {name: _KINDS[kind] for name, kind in self._table.schema.items()}
        self._all = np.arange(self._table.height)
        if where is not None:
            self._all = self._fulfilling(where)
        self._all = self._all[:limit]
        if not len(self._all):
            raise InputError(f"no pair of {folder} is as --where asks.", fix="Ask for less, or leave it out.")
        self._shown = frozenset(self._all.tolist()) if len(self._all) < self._table.height else None
        self.beside = Beside(self._parts, healthy, replay)
        self._places: dict[tuple[int, int], Places] = {}
        self._searching = Lock()
        self.member = lru_cache(maxsize=_MEMBERS)(self._read_member)
        self.order = lru_cache(maxsize=_ORDERS)(self._order)
        self._refusals = lru_cache(maxsize=_RECORDS)(self._read_refusals)

    def __len__(self) -> int:
        return len(self._all)

    def about(self) -> dict[str, Any]:
        """What the page says of the dataset as a whole, and its columns with what they hold, as plain JSON."""
        rows = self._table if len(self) == self._table.height else self._table[self._all]
        counts = dict(sorted(rows["class"].value_counts().iter_rows()))
        return {
            "name": self.name,
            "pairs": len(self),
            "classes": counts,
            "columns": [_described(rows[name], kind) for name, kind in self.columns.items()],
        }

    def _order(self, query: Query) -> Rows:
        """The pairs that fulfil a query, in order; a UsageError where it names what is not there."""
        rows = self._all
        for condition in query.conditions:
            rows = np.intersect1d(rows, self._fulfilling(condition), assume_unique=True)
        if not query.sort:
            return rows[::-1] if query.down else rows
        if query.sort not in self.columns:
            fix = f"The manifest has: {', '.join(self.columns)}."
            raise UsageError(f"there is no column {query.sort!r} to sort by.", fix=fix)
        values = pl.DataFrame({"value": self._table[query.sort].gather(rows), "row": rows})
        # NaN, which polars takes for the largest number, is nothing to sort by.
        found = values.with_columns(pl.col("value").fill_nan(None)) if self.columns[query.sort] == "float" else values
        return found.sort("value", descending=query.down, nulls_last=True, maintain_order=True)["row"].to_numpy()

    def _fulfilling(self, condition: str) -> Rows:
        return np.flatnonzero(self._table.select(parse_where(condition, self.columns)).to_series().fill_null(False))

    def name_of(self, row: int) -> str:
        """The name of the pair at a position in the table."""
        part, index = self._locate(row)
        prefix = part_name(part).removeprefix(f"{PARTS_FOLDER}/") + "/" if self.merged else ""
        return f"{prefix}{key_of(index)}"

    def row_of(self, name: str) -> int:
        """The position in the table of the pair of a name; a KeyError if it is not among those that are shown."""
        folder, _, key = name.rpartition("/")
        numbers = {part_name(n).removeprefix(f"{PARTS_FOLDER}/"): n for n in range(len(self._parts))}
        part = numbers.get(folder, -1) if self.merged else -1 if folder else 0
        index = int(key) if len(key) == 9 and key.isascii() and key.isdecimal() else -1
        if part < 0 or index not in (span := self._parts[part].plan.span):
            raise KeyError(name)
        row = int(self._starts[part]) + index - span.start
        if self._shown is not None and row not in self._shown:
            raise KeyError(name)
        return row

    def tiles(self, rows: Rows, sort: str = "") -> list[dict[str, Any]]:
        """Of some pairs what their tiles say: name, `TOLD` and, where they are sorted, the value that decides."""
        told = self._table.select(name for name in TOLD if name in self._table.columns)[rows]
        values = self._table[sort].gather(rows) if sort else [None] * len(rows)
        return [
            {"name": self.name_of(row), **{name: plain(cell) for name, cell in cells.items()}, "value": plain(value)}
            for row, cells, value in zip(rows.tolist(), told.iter_rows(named=True), values, strict=True)
        ]

    def row(self, row: int) -> dict[str, Any]:
        """A pair's row of the manifest, as plain JSON."""
        return {name: plain(value) for name, value in self._table.row(row, named=True).items()}

    def refused(self, row: int) -> list[dict[str, Any]] | None:
        """The refused draws before a pair, as plain JSON; None if its shard's record is lost."""
        part, index = self._locate(row)
        record = self._refusals(part, index // self._parts[part].plan.shard_size)
        return None if record is None else record.get(index, [])

    def origin(self, row: int) -> Origin | None:
        """What a pair was painted into; None where it is not at hand."""
        return self.beside.origin(self._locate(row)[0], self._table.row(row, named=True))

    def problems(self, row: int, member: Member) -> list[str]:
        """In what a pair's files differ from its row of the manifest."""
        expected = {name: value for name, value in self._table.row(row, named=True).items() if name != "part"}
        found = [f"the shard says {name} is {a!r:.80}, the manifest {b!r:.80}." for name, a, b in
                 differences(member.row, expected)]  # fmt: skip
        for kind, content in member.pictures.items():
            if hashlib.sha256(content).hexdigest() != expected.get(f"{kind}_sha256"):
                found.append(f"the {kind} has another sha256 than the manifest records.")
        return found

    def _read_member(self, row: int) -> Member:
        """A pair's files from its shard; an IntegrityError if they are damaged; the PNGs are not decoded."""
        part, index = self._locate(row)
        plan = self._parts[part].plan
        number = index // plan.shard_size
        path = self._parts[part].folder / shard_path(number, "tar")
        # Browsers ask for several of a shard's pictures at once, and one search serves them all.
        with self._searching:
            if (part, number) not in self._places:
                self._places[part, number] = find_members(path, plan.indices(number))
        return read_member(path, index, self._places[part, number])

    def _locate(self, row: int) -> tuple[int, int]:
        """The part and the index there of a position in the table."""
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        return part, self._parts[part].plan.first + row - int(self._starts[part])

    def _read_refusals(self, part: int, number: int) -> dict[int, list[dict[str, Any]]] | None:
        try:
            record = ShardRecord.read(self._parts[part].folder, number)
        except (OSError, BusigenError):
            return None
        found: dict[int, list[dict[str, Any]]] = {}
        for draw in record.rejections:
            entry = {"attempt": draw.attempt, "class": draw.label, "reason": draw.reason}
            found.setdefault(draw.index, []).append(entry)
        return found


_KINDS = {pl.String(): "str", pl.Int64(): "int", pl.Float64(): "float", pl.Boolean(): "bool"}


def _rows_of(part: Dataset) -> pl.DataFrame:
    """A part's manifest, which has to be what its record says: the page finds a pair by its place in it."""
    table, path = part.manifest(), part.folder / MANIFEST_FILE
    try:
        wanted = recorded_schema(part.info["columns"])
    except ValueError as error:
        raise IntegrityError(f"{part.folder / RUN_FILE}: {error}.", fix=_VERIFY) from error
    span = part.plan.span
    if table.schema != wanted or not (table["index"] == pl.Series(np.arange(span.start, span.stop))).all():
        raise IntegrityError(f"{path} does not hold the rows {span.start} to {span[-1]}, in order.", fix=_VERIFY)
    return table


def _described(column: pl.Series, kind: str) -> dict[str, Any]:
    found: dict[str, Any] = {"name": column.name, "type": kind, "fixed": column.name in FIXED_COLUMNS}
    if kind in ("int", "float"):
        numbers = column.fill_nan(None) if kind == "float" else column
        found |= {"least": plain(numbers.min()), "most": plain(numbers.max())}
    elif column.n_unique() <= FEW:
        found["values"] = sorted(str(value) for value in column.unique().drop_nulls())
    return found


def plain(value: Any) -> Any:
    """A manifest's value for JSON, which knows neither NaN nor infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def outline_svg(mask: NDArray[np.bool_], label: str) -> str:
    """The outline of a mask, (256, 256) bool, along its pixels' edges, as an SVG in its class's colour."""
    path = "".join(f"M{'L'.join(f'{x} {y}' for x, y in ring)}Z" for ring in rings(mask))
    height, width = mask.shape
    colour = "#{:02x}{:02x}{:02x}".format(*COLOURS.get(label, (255, 255, 255)))
    line = f'<path d="{path}" fill="none" vector-effect="non-scaling-stroke" stroke='
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    # On a dark line, the bright one is seen on any grey.
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
        f'{line}"#000" stroke-opacity=".55" stroke-width="3"/>{line}"{colour}" stroke-width="1.5"/></svg>'
    )


def picture(member: Member, kind: str) -> bytes:
    """A pair's "image" or "mask" as it lies in the shard, or its "outline"; an IntegrityError if it is no such PNG."""
    try:
        # Decoded in any case: a small PNG of another size could take all memory of who shows it.
        pixels = member.decoded("image" if kind == "image" else "mask")
    except ValueError as error:
        raise IntegrityError(f"Sample {member.key} is damaged: {error}.", fix=_VERIFY) from error
    return outline_svg(pixels, str(member.row.get("class"))).encode() if kind == "outline" else member.pictures[kind]
