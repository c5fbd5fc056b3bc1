"""Parquet tables: reading those that may have come from anywhere, with a bound on what they can cost, and joining them.

A few kilobytes of Parquet can claim a billion rows, or pages that unpack to gigabytes, and a reader allocates what they
claim. So the footer and every page's header are read first, in Thrift's compact encoding, and only a table whose claims
fit the number of rows that it should have is handed to polars.

polars is handed bytes and open files, never paths: it takes ``[``, ``*`` and ``?`` in a path for a pattern, whatever
the files are called, and refuses names that are no UTF-8.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import polars as pl
from polars.io.plugins import register_io_source

from busigen.foreign import looking, read_file

_MAGIC = b"PAR1"
_SPARE_BYTES, _ROW_BYTES = 1 << 20, 8 << 10
"""Bytes that a table may take, on disk and unpacked: in any case, and for each row. An honest row has some 600."""

_DEPTH = 16
"""Levels of nesting in a header; Parquet has fewer than ten."""

_PAGE_HEADER = 64 << 10
"""Most bytes of a page's header, which holds the least and greatest value of its column."""

Struct = dict[int, Any]


def read_table(path: Path, rows: int) -> pl.DataFrame:
    """A table that should have ``rows`` rows.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: it is no table, or one that does not have as many rows or takes more room than they can need.
    """
    content = _checked(path, rows)
    with looking(), _as_pythons_errors(path):
        table = pl.read_parquet(content)
    if table.height != rows:
        raise pl.exceptions.ComputeError(f"it has {table.height} rows instead of {rows}")
    return table


def find_rows(path: Path, rows: int, index: int) -> list[dict[str, Any]]:
    """The rows of one index in a table that should have ``rows`` rows; of a large one, little is unpacked.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: as for ``read_table``.
    """
    content = _checked(path, rows)
    with looking(), _as_pythons_errors(path):
        return pl.scan_parquet(content).filter(pl.col("index") == index).collect().to_dicts()


def write_joined(path: Path, tables: Iterable[pl.DataFrame], *, row_group_size: int | None = None) -> None:
    """Write the rows of several tables as one, in order; the tables are asked for while it is written.

    Args:
        path: the file, overwritten.
        tables: one at least, all of the columns of the first.
        row_group_size: rows that are gathered before they are written; None for polars' choice.

    Raises:
        OSError: the file cannot be written.
        PolarsError: a table has other columns than the first.
        Exception: whatever ``tables`` raises.
    """
    rest = iter(tables)
    first = next(rest)
    failed: list[BaseException] = []

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, most: int | None, size: int | None
    ) -> Iterator[pl.DataFrame]:
        try:
            yield from chain([first], rest)
        except BaseException as error:
            failed.append(error)
            raise

    options: dict[str, Any] = {"compression": "zstd", "compression_level": 3, "statistics": True}
    with path.open("wb") as file:
        try:
            with _as_pythons_errors(path):
                rows = register_io_source(read, schema=first.schema)
                rows.sink_parquet(file, row_group_size=row_group_size, maintain_order=True, **options)
        except (pl.exceptions.PolarsError, OSError):
            # What others raised, polars tells in words of its own.
            if failed:
                raise failed[0] from None
            raise


def _checked(path: Path, rows: int) -> io.BytesIO:
    """The bytes of a table, unless it claims other than ``rows`` rows, or more room than they can need.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: it is refused, or no table.
    """
    limit = _SPARE_BYTES + _ROW_BYTES * rows
    data = read_file(path, limit)
    try:
        _refuse_costly(data, rows, limit)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        reason = error if type(error) is ValueError else "its metadata are damaged"
        raise pl.exceptions.ComputeError(str(reason)) from error
    return io.BytesIO(data)


@contextmanager
def _as_pythons_errors(path: Path) -> Iterator[None]:
    """Raise polars' panics and the system's errors that it met as what Python has for them.

    Raises:
        OSError: the system refused polars something.
        PolarsError: any other failure.
    """
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        if found := re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error)):
            number = int(found[1] or found[2])
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, pl.exceptions.PanicException):
            # Not an Exception: it would go past every handler and end the command with a traceback.
            raise pl.exceptions.ComputeError("its pages are damaged") from error
        raise


def _refuse_costly(data: bytes, rows: int, limit: int) -> None:
    size = len(data)
    if size < 12:
        raise ValueError(f"it has {size} bytes, where a table has 12 at least")
    length = int.from_bytes(data[-8:-4], "little")
    if data[:4] != _MAGIC or data[-4:] != _MAGIC or length > size - 12:
        raise ValueError("it is no Parquet file, or cut short")
    footer = _Thrift(data, size - 8 - length, size - 8).structure()
    groups = footer[4]
    if footer[3] != rows or sum(group[3] for group in groups) != rows:
        raise ValueError(f"it does not claim to have {rows} rows")
    unpacked = 0
    for group in groups:
        for column in group[1]:
            unpacked += _unpacked(data, column, group[3])
            if unpacked > limit:
                raise ValueError(f"its pages unpack to more than {limit} bytes")


def _unpacked(data: bytes, column: Struct, rows: int) -> int:
    """Bytes that a column's pages unpack to.

    Raises:
        ValueError: it lies in another file, or its pages hold other than ``rows`` values.
    """
    facts = column[3]
    if 1 in column:
        raise ValueError("a column lies in another file")
    first = facts.get(11) or facts[9]
    end, values, total = first + facts[7], 0, 0
    if not 4 <= first <= facts[9] < end <= len(data) or facts[5] != rows:
        raise ValueError("a column has other values than its table has rows")
    while first < end:
        reader = _Thrift(data, first, min(end, first + _PAGE_HEADER))
        page = reader.structure()
        if page[2] < 0 or page[3] < 0:
            raise ValueError("a page has a negative size")
        total += page[2]
        values += sum(page[field][1] for field in (5, 8) if field in page)
        first = reader.at + page[3]
    if first != end or values != rows:
        raise ValueError("a column's pages hold other values than its table has rows")
    return total


class _Thrift:
    """Thrift's compact encoding, of which Parquet's headers are made: structures as dicts by field number."""

    def __init__(self, data: bytes, start: int, end: int) -> None:
        self.data, self.at, self.end = data, start, end
        self.depth = 0

    def structure(self) -> Struct:
        """The structure that begins here."""
        self.depth += 1
        if self.depth > _DEPTH:
            raise ValueError("its metadata are nested too deeply")
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            # A field's truth is its type; an element of a list has a byte of its own.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        self.depth -= 1
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._unsigned()
            if count > self.end - self.at:
                raise ValueError("its metadata claim a list longer than themselves")
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:
            return self.structure()
        raise ValueError("its metadata hold what Parquet's do not")

    def _byte(self) -> int:
        if self.at >= self.end:
            raise ValueError("its metadata are cut short")
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise ValueError("its metadata are cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("its metadata hold a number without end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
