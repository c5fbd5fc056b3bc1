"""Reading Parquet tables that may have come from anywhere: no more is read than the rows that they should have take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from busigen.data.parquetfile import refuse_costly


def read_table(path: Path, rows: int) -> pl.DataFrame:
    """A table that should have ``rows`` rows.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: it is no table, or one that does not have as many rows or takes more room than they can need.
    """
    check_claims(path, rows)
    with _panics_as_errors():
        table = pl.read_parquet(path)
    if table.height != rows:
        raise pl.exceptions.ComputeError(f"it has {table.height} rows instead of {rows}")
    return table


def find_rows(path: Path, rows: int, index: int) -> list[dict[str, Any]]:
    """The rows of one index in a table that should have ``rows`` rows; of a large one, little is read.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: as for ``read_table``.
    """
    check_claims(path, rows)
    with _panics_as_errors():
        return pl.scan_parquet(path).filter(pl.col("index") == index).collect().to_dicts()


def check_claims(path: Path, rows: int) -> None:
    """Refuse a table that claims other than ``rows`` rows, or more room than they can need.

    Raises:
        OSError: the file is missing or cannot be read.
        PolarsError: it is refused, or no table.
    """
    try:
        refuse_costly(path, rows)
    except ValueError as error:
        raise pl.exceptions.ComputeError(str(error)) from error


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    try:
        yield
    except pl.exceptions.PanicException as error:
        # Not an Exception: it would go past every handler and end the command with a traceback.
        raise pl.exceptions.ComputeError("its pages are damaged") from error
