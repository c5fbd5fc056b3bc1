"""Parquet tables: reading those that may have come from anywhere, no more than their rows take, and joining them.

polars is handed open files, never paths: it takes ``[``, ``*`` and ``?`` in a path for a pattern, whatever the files
are called, and refuses names that are no UTF-8.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import polars as pl
from polars.io.plugins import register_io_source

from busigen.data.parquetfile import refuse_costly
from busigen.foreign import looking, open_file


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
    """The rows of one index in a table that should have ``rows`` rows; of a large one, little is read.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: as for ``read_table``.
    """
    with _checked(path, rows) as file:
        return pl.scan_parquet(file).filter(pl.col("index") == index).collect().to_dicts()


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


@contextmanager
def _checked(path: Path, rows: int) -> Iterator[BinaryIO]:
    """A table for polars, unless it claims other than ``rows`` rows, or more room than they can need.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: it is refused, or no table.
    """
    try:
        refuse_costly(path, rows)
    except ValueError as error:
        raise pl.exceptions.ComputeError(str(error)) from error
    with looking(path), open_file(path) as file, _as_pythons_errors(path):
        yield file


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
