"""What makes a set of complete shards a dataset: manifest, preview, card, Croissant, and dataset.json last."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from busigen.errors import IntegrityError
from busigen.foreign import open_file
from busigen.records import read_json
from busigen.runtime.atomic import atomic_file, atomic_path, write_json
from busigen.runtime.card import croissant, readme
from busigen.runtime.dataset import Dataset, plan_of
from busigen.runtime.layout import (
    CARD_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    FINISHED_FILES,
    MANIFEST_FILE,
    PREVIEW_FILE,
    RUN_FILE,
)
from busigen.runtime.preview import contact_sheet, pick_evenly
from busigen.runtime.sample import Sample
from busigen.runtime.shards import FileRecord, ShardRecord
from busigen.runtime.tables import read_table, write_joined

_ROW_GROUP = 1 << 12
"""Rows that are gathered before they are written: 65,536 took 73 MB for a manifest of 100,000, these take 14 MB, for
a file that is 3 % larger."""
_MEND = "Run `busigen verify --repair`, or the same `busigen generate` command again: both make it anew."
_DERIVED = ("samples", "classes", "rejected", "files", "shards")


class Bringer(Protocol):
    """Has files of the dataset in its folder while a block runs, where they are not there anyway."""

    def files(self, records: Sequence[FileRecord]) -> AbstractContextManager[None]:
        """Have these files there.

        Raises:
            BusigenError: one of them cannot be had, or differs from its record.
        """
        ...

    def tables(self, records: Sequence[ShardRecord]) -> Iterator[pl.DataFrame]:
        """The shards' rows, one shard's after the other's.

        Raises:
            BusigenError: one of them cannot be had, or differs from its record.
        """
        ...


class InPlace:
    """A bringer that has nothing to do: the files are in the folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, records: Sequence[FileRecord]) -> AbstractContextManager[None]:
        """See :class:`Bringer`."""
        return nullcontext()

    def tables(self, records: Sequence[ShardRecord]) -> Iterator[pl.DataFrame]:
        """See :class:`Bringer`."""
        for record in records:
            path = self.folder / record.parquet.file
            try:
                yield read_table(path, record.count)
            except pl.exceptions.PolarsError as error:
                raise IntegrityError(f"{path} cannot be read as a table: {error}.", fix=_MEND) from error


def finish(
    folder: Path, run: Mapping[str, Any], records: Sequence[ShardRecord], bringer: Bringer | None = None
) -> None:
    """Write every file that describes the whole dataset, ``dataset.json`` last.

    Args:
        folder: the dataset.
        run: its run record.
        records: every shard's record, in order.
        bringer: brings the shards' files; None where they are all in ``folder``.

    Raises:
        OSError: the disk refused.
        IntegrityError: a shard was damaged since it was written.
    """
    bringer = bringer or InPlace(folder)
    write_manifest(folder, records, bringer)
    files = {MANIFEST_FILE: FileRecord.of(folder, MANIFEST_FILE)}
    info = dataset_info(run, records, files)
    dataset = Dataset(folder=folder, info=info, plan=plan_of(info, folder / RUN_FILE))

    sheet = contact_sheet(_shown(dataset, records, bringer))
    with atomic_file(folder / PREVIEW_FILE) as file:
        # Pillow's default of 6 takes three times as long, for a larger file: noticed after a short run.
        sheet.save(file, "PNG", compress_level=3)
    with atomic_file(folder / CARD_FILE) as file:
        file.write(readme(info).encode())
    write_json(folder / CROISSANT_FILE, croissant(info))
    write_json(folder / DATASET_FILE, info)


def unfinish(folder: Path) -> None:
    """Take back the claim that the dataset is complete before anything in it is made again."""
    (folder / DATASET_FILE).unlink(missing_ok=True)


def is_finished(folder: Path, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
    """Whether every top-level file is there, and ``dataset.json`` is what closes this very run and its manifest."""
    try:
        info = read_json(folder / DATASET_FILE, shards=len(records))
        wanted = dataset_info(run, records, {MANIFEST_FILE: FileRecord.of(folder, MANIFEST_FILE)})
    except (FileNotFoundError, ValueError):
        return False
    return bool(info == wanted) and all((folder / name).is_file() for name in FINISHED_FILES)


def write_manifest(folder: Path, records: Sequence[ShardRecord], bringer: Bringer | None = None) -> None:
    """Join the shards' rows into one table in index order, streaming: a large dataset's rows need not fit in memory."""
    rows = (bringer or InPlace(folder)).tables(records)
    with atomic_path(folder / MANIFEST_FILE) as path:
        write_joined(path, rows, row_group_size=_ROW_GROUP)


def _shown(dataset: Dataset, records: Sequence[ShardRecord], bringer: Bringer) -> list[Sample]:
    """The samples of the preview."""
    with open_file(dataset.folder / MANIFEST_FILE) as file:
        picked = pick_evenly(pl.read_parquet(file, columns=["index", "class"]))
    found = []
    for record in records:
        inside = [index for index in picked if record.first <= index < record.first + record.count]
        if inside:
            with bringer.files([record.tar]):
                found += dataset.samples(inside)
    return found


def dataset_info(
    run: Mapping[str, Any], records: Sequence[ShardRecord], files: Mapping[str, FileRecord]
) -> dict[str, Any]:
    """Content of ``dataset.json``: the run record and all that follows from the shards. It holds no time of day.

    Args:
        run: content of ``run.json``.
        records: every shard's record, in order.
        files: records of further files, by name.
    """
    return {
        **run,
        "samples": sum(record.count for record in records),
        "classes": _sum(record.classes for record in records),
        "rejected": _sum(record.rejected for record in records),
        "files": {name: asdict(record) for name, record in sorted(files.items())},
        "shards": [
            {
                "number": record.number,
                "first": record.first,
                "count": record.count,
                "tar": asdict(record.tar),
                "parquet": asdict(record.parquet),
            }
            for record in records
        ],
    }


def run_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The run record inside ``dataset.json``: all but what :func:`dataset_info` adds."""
    return {name: value for name, value in info.items() if name not in _DERIVED}


def _sum(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return dict(sorted(total.items()))
