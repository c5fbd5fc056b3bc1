"""Shards: a WebDataset tar, a table of its rows, and the record that says both are complete; tables from anywhere."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image
from polars.io.plugins import register_io_source
from pydantic import ConfigDict

from busigen.errors import IntegrityError
from busigen.files import atomic_file, sha256_of, write_json
from busigen.foreign import looking, open_file, refuse_costly
from busigen.records import Many, Text, Whole, checked, read_json
from busigen.registry import NORMAL, RESOLUTION, SAMPLE_CLASSES
from busigen.runtime.dataset.format import (
    FIRST_SCHEMA_VERSION,
    SHARD_FOLDER,
    TISSUE_COLUMN,
    Rejection,
    Sample,
    SampleBatch,
    extra_pictures,
    key_of,
    lesion_slots,
    member_suffixes,
    picture_columns,
    shard_path,
)
from busigen.runtime.storage.url import Address

FIXED_COLUMNS: dict[str, type] = {
    "key": str,
    "index": int,
    "attempt": int,
    "class": str,
    "shard": str,
    "image_sha256": str,
    "mask_sha256": str,
    "lesion_pixels": int,
    "box_left": int,
    "box_top": int,
    "box_right": int,
    "box_bottom": int,
}  # of every manifest; boxes in pixels, right and bottom exclusive, None if empty; hashes of the PNG files

COLUMN_TYPES: dict[str, type] = {kind.__name__: kind for kind in (str, int, float, bool)}  # by the names in run.json
_POLARS_TYPES: dict[type, type[pl.DataType]] = {str: pl.String, int: pl.Int64, float: pl.Float64, bool: pl.Boolean}

# Speckle does not repeat itself, so run lengths alone give files of the same size in half the time.
_PNG_OPTIONS = {"compress_level": 6, "compress_type": zlib.Z_RLE}
# Pillow compresses without the interpreter's lock, so threads help; more of them take cores from the source. The same
# threads serve all shards: new ones would spread their buffers over more and more of the allocator's arenas.
_ENCODERS = ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="png-encoder")
_REMAKE = "Delete it and run `busigen generate` with the same options again: that shard is made anew."


@dataclass(frozen=True)
class FileRecord:
    """A file's name relative to the dataset, its sha256 and its size in bytes."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    file: Text
    sha256: Text
    size: Whole

    @classmethod
    def of(cls, folder: Path, file: str) -> FileRecord:
        """The record of an existing file, which is hashed."""
        path = folder / file
        return cls(file=file, sha256=sha256_of(path), size=path.stat().st_size)


@dataclass(frozen=True)
class ShardRecord:
    """Content of a shard's JSON file, whose presence means that the shard is complete."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    number: Whole
    first: Whole
    count: Whole
    classes: dict[Text, Whole]
    rejected: dict[Text, Whole]
    rejections: Many[Rejection]
    tar: FileRecord
    parquet: FileRecord

    @classmethod
    def read(cls, folder: Path, number: int) -> ShardRecord:
        """A shard's record; FileNotFoundError if it is not complete, IntegrityError if the file is not its record."""
        path = folder / shard_path(number, "json")
        try:
            fields = read_json(path, root=folder)
        except ValueError as error:
            raise _damaged(path) from error
        return cls.of(fields, number, path)

    @classmethod
    def of(cls, fields: Any, number: int, path: Path | Address) -> ShardRecord:
        """The record of a shard, from the JSON that was read from ``path``; an IntegrityError if it is none."""
        version = fields.pop("schema_version", None) if isinstance(fields, dict) else None
        record = checked(cls, fields, path, fix=_REMAKE)
        named = (record.number, record.tar.file, record.parquet.file)
        fits = version == FIRST_SCHEMA_VERSION and sum(record.classes.values()) == record.count
        if not fits or named != (number, shard_path(number, "tar"), shard_path(number, "parquet")):
            raise _damaged(path)
        return record

    def counted(self) -> ShardRecord:
        """This record without its refused draws, which would take megabytes where a run keeps those of all shards."""
        return replace(self, rejections=[])


def _damaged(path: Path | Address) -> IntegrityError:
    return IntegrityError(f"{path} is not the record of a shard in {SHARD_FOLDER}.", fix=_REMAKE)


def write_shard(folder: Path, number: int, batch: SampleBatch, types: Mapping[str, type]) -> ShardRecord:
    """Write one shard into the dataset ``folder``, its record last; equal samples give equal bytes.

    ``batch`` has the samples in index order with nothing missing; ``types`` are those of their rows' fields. A
    ValueError says that the source broke its contract: shapes, classes, order or fields.
    """
    _check_samples(batch.samples, types)
    record_path = folder / shard_path(number, "json")
    record_path.unlink(missing_ok=True)

    rows = _write_tar(folder, number, batch.samples, types)
    # Written to memory first, so that a full disk raises an OSError and not the Parquet writer's own error.
    table = io.BytesIO()
    write_table(pl.DataFrame(rows, schema=schema_of(types)), table)
    with atomic_file(folder / shard_path(number, "parquet")) as file:
        file.write(table.getbuffer())

    rejections = sorted(batch.rejections, key=lambda rejection: (rejection.index, rejection.attempt))
    record = ShardRecord(
        number=number,
        first=batch.samples[0].index,
        count=len(batch.samples),
        classes=_count_sorted(sample.label for sample in batch.samples),
        rejected=_count_sorted(rejection.reason for rejection in rejections),
        rejections=rejections,
        tar=FileRecord.of(folder, shard_path(number, "tar")),
        parquet=FileRecord.of(folder, shard_path(number, "parquet")),
    )
    write_json(record_path, {"schema_version": FIRST_SCHEMA_VERSION, **asdict(record)})
    return record


def schema_of(types: Mapping[str, type]) -> pl.Schema:
    """Table schema with further fields of these types; a ValueError for a fixed column's name or another type."""
    for name, kind in types.items():
        if name in FIXED_COLUMNS:
            raise ValueError(f"row field {name!r} has the name of a fixed column")
        if kind not in _POLARS_TYPES:
            raise ValueError(f"row field {name!r} must be str, int, float or bool, got {kind!r}")
    return pl.Schema({name: _POLARS_TYPES[kind] for name, kind in (FIXED_COLUMNS | dict(types)).items()})


def column_types(columns: Mapping[str, str]) -> dict[str, str]:
    """Type's name (``str``, ``int``, ``float`` or ``bool``) of every manifest column, by a record's ``columns``."""
    return {name: kind.__name__ for name, kind in FIXED_COLUMNS.items()} | dict(columns)


def recorded_schema(columns: Mapping[str, str]) -> pl.Schema:
    """Table schema of a run by the ``columns`` of its record; a ValueError as for :func:`schema_of`."""
    return schema_of({name: COLUMN_TYPES[kind] for name, kind in columns.items()})


def lesion_box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of a (256, 256) mask in pixels, right and bottom exclusive; None if it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _check_samples(samples: list[Sample], types: Mapping[str, type]) -> None:
    if not samples:
        raise ValueError("a shard needs at least one sample, got none")
    for index, sample in enumerate(samples, start=samples[0].index):
        if sample.index != index:
            raise ValueError(f"expected the sample of index {index}, got index {sample.index}")
        for name, array, dtype in (("image", sample.image, np.uint8), ("mask", sample.mask, np.bool_)):
            if array.shape != (RESOLUTION, RESOLUTION) or array.dtype != dtype:
                wanted = f"({RESOLUTION}, {RESOLUTION}) {np.dtype(dtype)}"
                raise ValueError(f"sample {index}: {name} must be {wanted}, got {array.shape} {array.dtype}")
        if sample.label not in SAMPLE_CLASSES:
            raise ValueError(f"sample {index}: label must be one of {SAMPLE_CLASSES}, got {sample.label!r}")
        if sample.label == NORMAL and sample.mask.any():
            raise ValueError(f"sample {index}: a normal one has no lesion, got a mask of {int(sample.mask.sum())}")
        if (sample.tissue is not None) != (TISSUE_COLUMN in types):
            raise ValueError(f"sample {index}: it has a map of tissues, or lacks one, unlike its source's others")
        if (slots := lesion_slots(types)) and len(sample.masks) > slots:
            raise ValueError(f"sample {index}: its source says {slots} lesions at most, got {len(sample.masks)}")
        if sample.row.keys() != types.keys() - picture_columns(types):
            raise ValueError(f"sample {index}: row must have fields {sorted(types)}, got {sorted(sample.row)}")


def _count_sorted(names: Iterable[str]) -> dict[str, int]:
    """Occurrences per name, sorted by name, so that equal counts give equal bytes."""
    return dict(sorted(Counter(names).items()))


def _write_tar(folder: Path, number: int, samples: list[Sample], types: Mapping[str, type]) -> list[dict[str, Any]]:
    tar_name = shard_path(number, "tar")
    rows = []
    with (
        atomic_file(folder / tar_name) as file,
        tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar,
    ):
        kinds = extra_pictures(types)
        suffixes = member_suffixes(kinds)
        encoded = _ENCODERS.map(lambda sample: _encode(sample, kinds), samples)
        for sample, pictures in zip(samples, encoded, strict=True):
            hashes = {
                f"{kind}_sha256": hashlib.sha256(content).hexdigest()
                for kind, content in zip(("image", "mask", *kinds), pictures, strict=True)
            }
            row = row_of(sample, types, {"shard": tar_name, **hashes})
            text = json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
            for suffix, content in zip(suffixes, (*pictures, text), strict=True):
                # A new TarInfo has mtime 0, uid and gid 0, mode 0644 and no owner names, so nothing of this machine.
                member = tarfile.TarInfo(f"{row['key']}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            rows.append(row)
    return rows


def row_of(sample: Sample, types: Mapping[str, type], files: Mapping[str, str]) -> dict[str, Any]:
    """A sample's row in the manifest; ``files`` are the columns about its files, ``types`` those of its own fields."""
    box = lesion_box(sample.mask) or (None, None, None, None)
    hashes = picture_columns(types)
    return {
        "key": key_of(sample.index),
        "index": sample.index,
        "attempt": sample.attempt,
        "class": sample.label,
        **files,
        "lesion_pixels": int(sample.mask.sum()),
        **dict(zip(("box_left", "box_top", "box_right", "box_bottom"), box, strict=True)),
        **{name: _scalar(sample, name, kind) for name, kind in types.items() if name not in hashes},
    }


def _encode(sample: Sample, kinds: Sequence[str]) -> list[bytes]:
    """A sample's image, mask and extra pictures of these kinds as PNGs: masks of 1 bit, others 8-bit grey; no metadata.

    Of a sample with fewer lesions than others, the masks that are left are empty: loaders want the same files of each.
    """
    slots = lesion_slots(f"{kind}_sha256" for kind in kinds)
    masks = [*sample.masks, *[np.zeros_like(sample.mask)] * (slots - len(sample.masks))] if slots else []
    pictures = [sample.image, sample.mask, *masks, *([] if sample.tissue is None else [sample.tissue])]
    files = [io.BytesIO() for _ in pictures]
    for pixels, file in zip(pictures, files, strict=True):
        Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG", **_PNG_OPTIONS)
    return [file.getvalue() for file in files]


def _scalar(sample: Sample, name: str, kind: type) -> str | int | float | bool | None:
    if (value := sample.row[name]) is None:
        return None
    plain: Any = value.item() if isinstance(value, np.generic) else value
    # A whole number may stand for a float, but 2.5 is no int and True is neither: a cast would hide the source's error.
    if kind is float and type(plain) is int:
        plain = float(plain)
    if type(plain) is not kind:
        raise ValueError(f"sample {sample.index}: {name} must be {kind.__name__} or None, got {value!r}")
    if isinstance(plain, float) and not math.isfinite(plain):
        raise ValueError(f"sample {sample.index}: {name} must be finite or None, got {value!r}")
    return cast("str | int | float | bool", plain)


def write_table(table: pl.DataFrame, file: io.BytesIO) -> None:
    """Write a table as Parquet, with all settings fixed that decide its bytes."""
    table.write_parquet(file, compression="zstd", compression_level=3, statistics=True, row_group_size=1 << 16)


def write_joined(path: Path, tables: Iterable[pl.DataFrame], *, row_group_size: int | None = None) -> None:
    """Write the rows of several tables, one at least, as one, in order; each is taken when it is written.

    ``row_group_size`` rows are gathered before they are written; None for polars' choice. A PolarsError says that a
    table has other columns than the first.
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


def read_table(path: Path, rows: int) -> pl.DataFrame:
    """A table that should have ``rows`` rows.

    A PolarsError says that it is none, or has other than ``rows`` rows or takes more room than they can need.
    """
    with _open_table(path, rows) as file:
        table = pl.read_parquet(file)
    if table.height != rows:
        raise pl.exceptions.ComputeError(f"it has {table.height} rows instead of {rows}")
    return table


def read_columns(path: Path, rows: int, columns: Sequence[pl.Expr], condition: pl.Expr) -> pl.DataFrame:
    """Some columns of the rows of a table that fulfil a condition, in order; raises as `read_table`."""
    with _open_table(path, rows) as file:
        return pl.scan_parquet(file).filter(condition).select(columns).collect()


def find_row(path: Path, rows: int, index: int) -> dict[str, Any]:
    """The row of an index in a table, most of which is not read; raises as `read_table`, or an IntegrityError."""
    with _open_table(path, rows) as file:
        found = pl.scan_parquet(file).filter(pl.col("index") == index).collect().to_dicts()
    if len(found) != 1:
        raise IntegrityError(f"{path} has {len(found)} rows of index {index}.")
    return found[0]


@contextmanager
def _open_table(path: Path, rows: int) -> Iterator[BinaryIO]:
    """An open table file, refused if it claims other than ``rows`` rows or more memory than they can need."""
    try:
        refuse_costly(path, rows)
    except ValueError as error:
        raise pl.exceptions.ComputeError(str(error)) from error
    # Open files, not paths: polars takes ``[``, ``*`` and ``?`` for a pattern, and refuses names that are no UTF-8.
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
