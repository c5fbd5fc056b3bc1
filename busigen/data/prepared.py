"""What a prepared folder holds: file names, columns and the version of both."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from numpy.lib import format as npy
from numpy.typing import NDArray
from pydantic import Strict

from busigen.errors import InputError, IntegrityError
from busigen.files import leftovers, sha256_of
from busigen.foreign import looking, open_file, refuse_costly
from busigen.records import Record, Text, Whole, checked, read_given
from busigen.registry import RESOLUTION

SCHEMA_VERSION = 2  # Raised whenever a column or an array changes meaning.
INFO, TABLE = "prepared.json", "table.parquet"
# The audit measures on the first three, and training reads the last two.
ARRAYS = {name: f"{name}.npy" for name in ("images", "masks", "overlays", "clean", "suspects")}
DTYPES = {name: np.dtype(np.bool_ if name in ("overlays", "suspects") else np.uint8) for name in ARRAYS}
FILES = (*ARRAYS.values(), TABLE, INFO)  # Everything in a prepared folder; the last one makes it valid.
WRITTEN = re.compile("|".join(map(re.escape, FILES)))  # Matches the names in `FILES`.
PARTIAL = frozenset(f"{name}.partial" for name in FILES)  # An earlier busigen's names of unfinished files.

COLUMNS: dict[str, pl.DataType] = {
    "row": pl.Int64(),
    "id": pl.String(),
    "class": pl.String(),
    "source": pl.String(),
    "patient": pl.String(),
    "group": pl.Int64(),
    "split": pl.String(),
    "image_file": pl.String(),
    "mask_files": pl.List(pl.String()),
    "sha256": pl.String(),
    "width": pl.Int64(),
    "height": pl.Int64(),
    "scale": pl.Float64(),
    "left": pl.Int64(),
    "top": pl.Int64(),
    "inner_width": pl.Int64(),
    "inner_height": pl.Int64(),
    "mask_area": pl.Float64(),
    "lesions": pl.Int64(),
    "overlay_colour": pl.Boolean(),
    "overlay_text": pl.Boolean(),
    "overlay_calipers": pl.Boolean(),
    "birads": pl.String(),
    "class_conflict": pl.Boolean(),
    "scanner": pl.String(),
}
"""``mask_area`` is a share of the native image, ``lesions`` the largest label; file names begin with the source's.

Folders of earlier versions have no ``scanner``; opened, it is null.
"""

SCAN_COLUMNS: dict[str, pl.DataType] = {"laterality": pl.String(), "spacing_x": pl.Float64(), "spacing_y": pl.Float64()}
"""Further columns of tables with DICOM images: `busigen.data.images.scan_row`, null for other images."""
ALL_COLUMNS = {**COLUMNS, **SCAN_COLUMNS}


def unfinished(folder: Path) -> bool:
    """Whether a `busigen prepare` into a folder was killed, or is at work, and has never finished there."""
    return not (folder / INFO).exists() and bool(leftovers(folder, WRITTEN))


def split_hash(sha256: Iterable[str], splits: Iterable[str]) -> str:
    """Fingerprint of who is in which split: hex sha256 over the sorted (image hash, split) pairs."""
    lines = sorted(f"{digest} {split}\n" for digest, split in zip(sha256, splits, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


_PREPARE = "Run 'busigen prepare' into a new folder."
_LARGEST_TABLE = 4 << 30  # Bytes of a table whose hash is looked at; a row has some hundred.


class PreparedRecord(Record):
    """Content of ``prepared.json``, as far as it is used."""

    seed: Annotated[int, Strict()]
    images: Whole
    split_hash: Text
    files: dict[Text, Text]


@dataclass(frozen=True, eq=False)
class Prepared:
    """A prepared folder: a table of `COLUMNS`, and arrays ``(N, 256, 256)``, memory-mapped read-only; a row per image.

    ``info`` is the content of ``prepared.json``. ``masks`` are 0 outside lesions and k on the k-th; ``overlays`` is
    where the scanner probably painted; ``clean`` are ``images`` with all ``suspects``, overlays included, painted over.
    """

    folder: Path
    info: dict[str, Any]
    table: pl.DataFrame
    images: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    overlays: NDArray[np.bool_]
    clean: NDArray[np.uint8]
    suspects: NDArray[np.bool_]

    @classmethod
    def open(cls, folder: Path, *, check: bool = False) -> Prepared:
        """Open a prepared folder.

        The table is always checked against its hash, the arrays for shape and type; with ``check``, which reads every
        byte, also against theirs. An InputError says that it is no prepared folder, or one of another schema version,
        an IntegrityError that a file is missing, damaged or not the one that was written.
        """
        folder = Path(folder)
        if unfinished(folder):
            raise InputError(f"{folder}: `busigen prepare` was not finished.", fix="Give the same command again.")
        info, _ = read_given(folder / INFO, "prepared folder", schemas=(SCHEMA_VERSION,), fix=_PREPARE)
        checked(PreparedRecord, info, folder / INFO, fix=_PREPARE)
        table = _read_table(folder, info)
        arrays = {}
        for name, file in ARRAYS.items():
            arrays[name] = _map_array(folder / file, DTYPES[name], table.height)
            if check:
                _check_hash(folder, info, file)
        return cls(folder, info, table, **arrays)

    @property
    def split_hash(self) -> str:
        """See `split_hash`."""
        return str(self.info["split_hash"])

    def __len__(self) -> int:
        return self.table.height


def _map_array(path: Path, dtype: np.dtype[Any], rows: int) -> NDArray[Any]:
    expected = (rows, RESOLUTION, RESOLUTION)
    try:
        with looking(path), open_file(path) as file:
            if npy.read_magic(file) != (1, 0):
                raise ValueError("it is no array of this kind")
            if npy.read_array_header_1_0(file) != (expected, False, dtype):
                raise IntegrityError(f"{path} is not {dtype} {expected}.", fix=_PREPARE)
            array = np.memmap(file, dtype, "r", file.tell(), expected)
            if file.seek(0, os.SEEK_END) != array.offset + array.nbytes:
                raise ValueError("it is longer than its header says")
            return array
    except (OSError, ValueError, EOFError, SyntaxError) as error:
        raise IntegrityError(f"{path} is missing or damaged: {error}.", fix=_PREPARE) from error


def _check_hash(folder: Path, info: dict[str, Any], name: str, *, limit: int | None = None) -> None:
    path = folder / name
    try:
        found = sha256_of(path, limit=limit)
    except OSError as error:
        raise IntegrityError(f"{path} cannot be read: {error.strerror}.", fix=_PREPARE) from error
    if found != info["files"].get(name):
        raise IntegrityError(f"{path} is not the file that was prepared: its sha256 is {found[:12]}....", fix=_PREPARE)


def _read_table(folder: Path, info: dict[str, Any]) -> pl.DataFrame:
    path = folder / TABLE
    _check_hash(folder, info, TABLE, limit=_LARGEST_TABLE)
    try:
        refuse_costly(path, info["images"], lists=True)
        # An open file, because polars takes a path for a pattern.
        with open_file(path) as file:
            table = pl.read_parquet(file)
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        raise IntegrityError(f"{path} is damaged.", fix=_PREPARE) from error
    if "scanner" not in table.columns:
        table = table.insert_column(len(COLUMNS) - 1, pl.lit(None, pl.String()).alias("scanner"))
    if dict(table.schema) not in (COLUMNS, ALL_COLUMNS) or table.height != info["images"]:
        raise IntegrityError(f"{path} has other columns or rows than {INFO} says.", fix=_PREPARE)
    if split_hash(table["sha256"], table["split"]) != info["split_hash"]:
        raise IntegrityError(f"{path} and {INFO} disagree about the splits.", fix=_PREPARE)
    return table
