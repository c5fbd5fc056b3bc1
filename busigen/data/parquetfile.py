"""What a Parquet file that may have come from anywhere would cost its reader, found out before anything reads it.

A few kilobytes of Parquet can claim a billion rows, or pages that unpack to gigabytes, and a reader allocates what they
claim. So the footer and every page's header are read first, in Thrift's compact encoding.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

from busigen.foreign import looking, open_file

_MAGIC = b"PAR1"
_SPARE_BYTES, _ROW_BYTES = 1 << 20, 8 << 10
"""Bytes that a table may take, on disk and unpacked: in any case, and for each row. An honest row has some 600."""

_LEAST_ROW_BYTES, _FEW_ROWS = 24, 10_000
"""Bytes on disk that a table of more than a few rows has for each: a hash of 32 in each row does not get smaller, but a
run of the same value costs nothing on disk and, for each row and column, up to 16 bytes of memory."""

_MAX_COLUMNS = 128
"""Columns of a table; honest ones have some 40."""

_MAX_LIST = 1_000
"""Values that a list holds, in the mean of a column's rows."""

_FIXED_LENGTH = 7
"""Parquet's number of the type whose values all have one stated length, which runs of the same value repeat in full."""

_DEPTH = 16
"""Levels of nesting in a header; Parquet has fewer than ten."""

_PAGE_HEADER = 64 << 10
"""Most bytes of a page's header, which holds the least and greatest value of its column."""

Struct = dict[int, Any]


def refuse_costly(path: Path, rows: int, *, lists: bool = False) -> None:
    """Refuse a table that claims other than ``rows`` rows, or more room than they can need.

    What reading it takes is then bounded by what it has on disk: some 2 KiB for each row, which has 24 bytes there,
    beside what its pages unpack to, 8 KiB for each row.

    Args:
        path: the file.
        rows: number of rows that it should have.
        lists: whether columns may be lists.

    Raises:
        OSError: it is missing, cannot be read, or is no regular file.
        ValueError: it is refused, or no table.
    """
    limit = _SPARE_BYTES + _ROW_BYTES * rows
    try:
        with looking(path), open_file(path, limit=limit) as file:
            size = file.seek(0, os.SEEK_END)
            if size < 12 or (rows > _FEW_ROWS and size < _LEAST_ROW_BYTES * rows):
                raise ValueError(f"it has {size:,} bytes, which cannot hold a table of {rows:,} rows")
            # Mapped, because of a large one little is looked at.
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                _refuse(data, rows, limit, lists)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("its metadata are damaged") from error


def _refuse(data: mmap.mmap, rows: int, limit: int, lists: bool) -> None:
    size = len(data)
    length = int.from_bytes(data[-8:-4], "little")
    if data[:4] != _MAGIC or data[-4:] != _MAGIC or length > min(size - 12, _SPARE_BYTES + rows // 4):
        raise ValueError("it is no Parquet file, or cut short")
    footer = _Thrift(data, size - 8 - length, size - 8).structure()
    groups = footer[4]
    if footer[3] != rows or sum(group[3] for group in groups) != rows:
        raise ValueError(f"it does not claim to have {rows} rows")
    # All but the first are columns, or what they are made of.
    if not lists and any(5 in element for element in footer[2][1:]):
        raise ValueError("one of its columns holds lists or structures")
    unpacked = 0
    for group in groups:
        if len(group[1]) > _MAX_COLUMNS:
            raise ValueError(f"it has {len(group[1])} columns; at most {_MAX_COLUMNS} are read")
        for column in group[1]:
            unpacked += _unpacked(data, column, group[3])
            if unpacked > limit:
                raise ValueError(f"its pages unpack to more than {limit} bytes")


def _unpacked(data: mmap.mmap, column: Struct, rows: int) -> int:
    """Bytes that a column's pages unpack to.

    Raises:
        ValueError: it lies in another file, or its pages hold other than ``rows`` values, or more than a column of
            lists may hold.
    """
    facts = column[3]
    if 1 in column:
        raise ValueError("a column lies in another file")
    first = facts.get(11) or facts[9]
    end, values, total = first + facts[7], 0, 0
    claimed = facts[5]
    if not 4 <= first <= facts[9] < end <= len(data) or (claimed != rows and len(facts[3]) == 1):
        raise ValueError("a column has other values than its table has rows")
    if facts[1] == _FIXED_LENGTH or claimed > _MAX_LIST * rows:
        raise ValueError("a column holds what no table has")
    while first < end:
        reader = _Thrift(data, first, min(end, first + _PAGE_HEADER))
        page = reader.structure()
        if page[2] < 0 or page[3] < 0:
            raise ValueError("a page has a negative size")
        total += page[2]
        values += sum(page[field][1] for field in (5, 8) if field in page)
        first = reader.at + page[3]
    if first != end or values != claimed:
        raise ValueError("a column's pages hold other values than its table has rows")
    return total


class _Thrift:
    """Thrift's compact encoding, of which Parquet's headers are made: structures as dicts by field number."""

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
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
