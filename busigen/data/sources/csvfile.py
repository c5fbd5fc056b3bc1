"""Reading the CSV files that come with labelled folders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import polars as pl

from busigen.errors import InputError
from busigen.foreign import open_file

CONTRADICTION = "contradiction"
"""Key of a row of `by_file` that says in what the table's rows for one file differ; it is absent where they agree."""


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


def by_file(rows: Iterable[dict[str, str | None]], name_of: Callable[[str], str]) -> dict[str, dict[str, str | None]]:
    """The table's row of every file. Of rows that differ, the first, with what they differ in as `CONTRADICTION`.

    Args:
        rows: What `read_rows` gave, with a column ``file``.
        name_of: What a file is looked up by, given what stands in that column.
    """
    found: dict[str, dict[str, str | None]] = {}
    for row in rows:
        name = name_of(row["file"] or "")
        first = found.setdefault(name, dict(row))
        differ = [key for key in row if key != "file" and row[key] != first[key]]
        if differ:
            said = "; ".join(f"{key} is {first[key] or 'empty'!r} and {row[key] or 'empty'!r}" for key in differ)
            first.setdefault(CONTRADICTION, said)
    return found
