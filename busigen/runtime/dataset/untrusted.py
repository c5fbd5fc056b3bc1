"""Parquet tables and tar files from anywhere, read within bounds of memory; joining tables.

polars is handed open files, never paths: it takes ``[``, ``*`` and ``?`` in a path for a pattern, whatever the files
are called, and refuses names that are no UTF-8.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
from polars.io.plugins import register_io_source

from busigen.foreign import looking, open_file, refuse_costly


def read_table(path: Path, rows: int) -> pl.DataFrame:
    """A table that should have ``rows`` rows.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: it is no table, or one that does not have as many rows or takes more room than they can need.
    """
    with _checked(path, rows) as file:
        table = pl.read_parquet(file)
    if table.height != rows:
        raise pl.exceptions.ComputeError(f"it has {table.height} rows instead of {rows}")
    return table


def find_rows(path: Path, rows: int, index: int) -> list[dict[str, Any]]:
    """The rows of one index in a table that should have ``rows`` rows, most of which are not read; see `read_table`."""
    with _checked(path, rows) as file:
        return pl.scan_parquet(file).filter(pl.col("index") == index).collect().to_dicts()


def write_joined(path: Path, tables: Iterable[pl.DataFrame], *, row_group_size: int | None = None) -> None:
    """Write the rows of several tables as one, in order; each table is taken from the iterator when it is written.

    Args:
        path: the file, overwritten.
        tables: one at least, all of the columns of the first.
        row_group_size: rows that are gathered before they are written; None for polars' choice.

    Raises:
        OSError: the file cannot be written.
        PolarsError: a table has other columns than the first.
        Exception: raised by ``tables``.
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
            # Polars wraps what the iterator raised in an error of its own.
            if failed:
                raise failed[0] from None
            raise


@contextmanager
def _checked(path: Path, rows: int) -> Iterator[BinaryIO]:
    """An open table file, refused if it claims other than ``rows`` rows or more memory than they can need."""
    try:
        refuse_costly(path, rows)
    except ValueError as error:
        raise pl.exceptions.ComputeError(str(error)) from error
    with looking(path), open_file(path) as file, _as_pythons_errors(path):
        yield file


@contextmanager
def _as_pythons_errors(path: Path) -> Iterator[None]:
    """Turn polars' panics into errors, and the system's errors in its messages into an OSError."""
    try:
        yield
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        if found := re.search(r"\(os error (\d+)\)|\bOs \{ code: (\d+)", str(error)):
            number = int(found[1] or found[2])
            raise OSError(number, os.strerror(number), str(path)) from error
        if isinstance(error, pl.exceptions.PanicException):
            # A panic is a BaseException, which no handler of errors would catch.
            raise pl.exceptions.ComputeError("its pages are damaged") from error
        raise


HEADER_LIMIT = 16 << 10
"""Most bytes that the headers of one member may take; a plain one takes 512. A long name or a set of PAX records can
claim any size, and tarfile reads all of it at once; what tarfiles before Python 3.12.6 make of overlapping records
grows with their square: 16 KiB into some 70 MB."""


class TarHeaders:
    """An uncompressed tar file's members, one after another. Open one with ``open_headers``."""

    def __init__(self, file: _BoundedFile, tar: tarfile.TarFile) -> None:
        self._file = file
        self._tar = tar

    @property
    def offset(self) -> int:
        """Where in the file the next member's header should lie, in bytes."""
        return self._tar.offset

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end of the archive or at a damaged header.

        Raises:
            tarfile.TarError: its headers are malformed, or take more than ``HEADER_LIMIT`` bytes.
            OSError: the file cannot be read.
        """
        self._file.left = HEADER_LIMIT
        with _malformed_as_tar_error():
            member = self._tar.next()
        # tarfile keeps every header that it has read, and every record of the global ones, in memory.
        vars(self._tar)["members"] = []
        self._tar.pax_headers = {}
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        """A plain member's content, shorter than its size if the file is cut short. Callers check the size before."""
        self._file.left = member.size
        self._file.seek(member.offset_data)
        return self._file.read(member.size)


@contextmanager
def open_headers(path: Path) -> Iterator[TarHeaders]:
    """The headers of an uncompressed tar file; a few kilobytes of a compressed one could unpack to terabytes.

    Raises:
        tarfile.TarError: it is no tar file, or its first member is refused; see ``TarHeaders.next``.
        OSError: the file cannot be read, or is no regular one.
    """
    with _BoundedFile(open_file(path).detach()) as file:
        with _malformed_as_tar_error():
            tar = tarfile.TarFile(fileobj=file)
        with tar:
            yield TarHeaders(file, tar)


class _BoundedFile(io.BufferedReader):
    """A file that refuses to read more than ``left`` bytes; the reader sets ``left`` for each member."""

    left = HEADER_LIMIT

    def read(self, size: int | None = -1, /) -> bytes:
        # A negative size means all that is left; tarfile also computes one from a header with a negative size.
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"the headers of one member claim more than {HEADER_LIMIT:,} bytes")
        self.left -= size
        return super().read(size)


@contextmanager
def _malformed_as_tar_error() -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, ValueError, OverflowError, RecursionError) as error:
        # Errors that tarfile raises on malformed records; their text is a bare key, or does not name the file.
        raise tarfile.ReadError(f"one of its headers is malformed ({type(error).__name__})") from error
