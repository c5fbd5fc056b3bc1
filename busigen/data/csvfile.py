"""Reading the CSV files that come with labelled folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import polars as pl

from busigen.errors import InputError
from busigen.foreign import open_file


def read_rows(path: Path, required: Sequence[str]) -> list[dict[str, str | None]]:
    """Read a CSV file as text, without guessing types.

    Args:
        path: The file; UTF-8 with or without a byte order mark, any line ends.
        required: Columns it must have.

    Returns:
        One dictionary per row; values are stripped, empty ones None.

    Raises:
        InputError: It is unreadable, no CSV, or lacks a column.
    """
    try:
        # Nothing is inferred: a patient "007" must not become 7.
        # An open file, because polars takes a path for a pattern.
        with open_file(path) as file:
            frame = pl.read_csv(file, infer_schema=False, encoding="utf8-lossy")
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        problem = f"{path.name} cannot be read as CSV: {reason}."
        raise InputError(problem, fix="Save it as comma-separated UTF-8.") from error
    frame = frame.rename({name: name.strip().lstrip("\ufeff") for name in frame.columns})
    missing = [name for name in required if name not in frame.columns]
    if missing:
        raise InputError(
            f"{path.name} has no column {', '.join(missing)}; it has {', '.join(frame.columns)}.",
            fix=f"Name its columns {', '.join(required)}.",
        )
    return [{name: (value or "").strip() or None for name, value in row.items()} for row in frame.iter_rows(named=True)]
