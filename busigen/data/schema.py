"""What a prepared folder holds: file names, columns and the version of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import polars as pl

from busigen.foreign import open_file

SCHEMA_VERSION = 2
"""Raised whenever a column or an array changes meaning."""

INFO = "prepared.json"
TABLE = "table.parquet"
ARRAYS = {
    "images": "images.npy",
    "masks": "masks.npy",
    "overlays": "overlays.npy",
    "clean": "clean.npy",
    "suspects": "suspects.npy",
}
"""Array names and their files. The first three are what the audit measures on, the last two what training reads."""

PARTIAL = ".partial"
"""Ending of a file that is still being written."""

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
}
"""The table's columns. ``mask_area`` is a fraction of the native image; ``lesions`` is the largest value in the row's
label mask; file names begin with the source folder's name."""


def split_hash(sha256: Iterable[str], splits: Iterable[str]) -> str:
    """Fingerprint of who is in which split: hex sha256 over the sorted (image hash, split) pairs."""
    lines = sorted(f"{digest} {split}\n" for digest, split in zip(sha256, splits, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def file_sha256(path: Path, limit: int | None = None) -> str:
    """Hex sha256 of a file's bytes.

    Raises:
        OSError: It cannot be read, is no regular file, or has more than ``limit`` bytes.
    """
    with open_file(path, limit=limit) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
