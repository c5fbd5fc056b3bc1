"""Joining finished datasets of one bundle into one, without changing a byte of their shards."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import polars as pl

from busigen.errors import InputError, IntegrityError, UsageError
from busigen.files import atomic_file, sha256_of, write_json
from busigen.foreign import ForeignFileError, open_file
from busigen.records import MAX_BYTES
from busigen.runtime.dataset.collection import Sources, open_with_sources, part_name, write_collection
from busigen.runtime.dataset.finalize import dataset_info, finish, run_of
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    Plan,
    differences,
    shard_path,
)
from busigen.runtime.dataset.reader import Dataset, read_object
from busigen.runtime.dataset.shards import FileRecord, ShardRecord
from busigen.runtime.dataset.untrusted import read_table
from busigen.runtime.output.ownership import shown_changes
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import atomic_folder, output_errors
from busigen.text import shell_word

_NOT_COMPARED = ("config", "engine_batches", "options", "schema_version", "sources", "unproven", "versions")
"""Fields of a run record in which datasets that are merged may differ."""


@dataclass(frozen=True)
class MergeReport:
    """What ``merge`` made."""

    folder: Path
    samples: int
    parts: int  # 1 where it is what one run would have made
    size: int  # bytes of its shards
    copied: bool  # whether a shard had to be copied because it could not be linked


def merge(out: Path, folders: Sequence[Path], *, progress: Progress | None = None) -> MergeReport:
    """Join datasets; they stay as they are.

    Ranges of one seed that follow one another become one dataset with the bytes of a single run. Everything else stays
    in parts (:mod:`busigen.runtime.dataset.collection`). Shards are linked where the file system allows it, and copied
    otherwise; each is checked against its recorded hash. ``out`` appears by a rename, whole.

    Args:
        out: the merged dataset; must not exist, or be empty.
        folders: finished datasets of one bundle; merged ones are taken apart first.
        progress: counts every shard.

    Raises:
        UsageError: there are fewer than two datasets.
        InputError: one is no finished dataset, differs in what decides its samples, or has samples of another one.
        IntegrityError: one is damaged.
        OutputError: ``out`` exists, or cannot be written.
    """
    progress = progress or Progress()
    if len(folders) < 2:
        raise UsageError("fewer than two datasets are given.", fix="Give two or more to merge.")
    opened = [pair for folder in folders for pair in open_with_sources(folder)]
    origin = {dataset.folder: sources for dataset, sources in opened}
    datasets = sorted((dataset for dataset, _ in opened), key=lambda one: (one.plan.seed, one.plan.first))
    _refuse_misfits(datasets)
    runs = _runs(datasets)
    records = {dataset.folder: _records(dataset) for dataset in datasets}
    try:
        with output_errors(out), atomic_folder(out) as place:
            progress.start("merging", sum(dataset.plan.shards for dataset in datasets), unit="shard")
            places = [place] if len(runs) == 1 else [place / part_name(number) for number in range(len(runs))]
            sources = [[source for one in run for source in origin[one.folder]] for run in runs]
            copied = [_join(*job, records, progress) for job in zip(runs, places, sources, strict=True)]
            if len(runs) > 1:
                write_collection(place, sources)
    finally:
        progress.stop()
    size = sum(shard[kind]["size"] for one in datasets for shard in one.info["shards"] for kind in ("tar", "parquet"))
    return MergeReport(out, sum(one.plan.count for one in datasets), len(runs), size, any(copied))


def _refuse_misfits(datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    compared = [
        {name: value for name, value in run_of(one.info).items() if name not in _NOT_COMPARED} for one in datasets
    ]
    for other, record in zip(datasets, compared, strict=True):
        if changes := shown_changes(compared[0], record):
            raise InputError(
                f"{first.folder} and {other.folder} are of different runs ({'; '.join(changes)}).",
                fix="Merge datasets that differ in nothing but seed and index range; the same bundle and busigen made "
                "them.",
            )
    for one, two in pairwise(datasets):
        if one.plan.seed == two.plan.seed and two.plan.first < one.plan.span.stop:
            last = min(one.plan.span.stop, two.plan.span.stop) - 1
            raise InputError(
                f"samples {two.plan.first} to {last} of seed {one.plan.seed} are in {one.folder} and in {two.folder}.",
                fix="Merge datasets with different seeds, or with index ranges that do not overlap.",
            )


def _runs(datasets: Sequence[Dataset]) -> list[list[Dataset]]:
    """The datasets, by what one run each would have made."""
    runs = [[datasets[0]]]
    for one, two in pairwise(datasets):
        # A short last shard would have to be filled up, which changes its bytes.
        alike = one.plan.shard_size == two.plan.shard_size and not one.plan.span.stop % one.plan.shard_size
        if one.plan.seed == two.plan.seed and two.plan.first == one.plan.span.stop and alike:
            runs[-1].append(two)
        else:
            runs.append([two])
    return runs


def _records(dataset: Dataset) -> list[ShardRecord]:
    """Every shard's record, of a dataset whose plan, records, ``run.json`` and ``dataset.json`` agree, or an error."""
    run = read_object(dataset.folder / RUN_FILE)
    if run is None or differences(run, run_of(dataset.info)):
        raise _damaged(dataset, RUN_FILE)
    with _reading(dataset):
        records = [record.counted() for record in dataset.shards()]
        manifest = FileRecord.of(dataset.folder, MANIFEST_FILE)
    for record in records:
        indices = dataset.plan.indices(record.number)
        if (record.first, record.count) != (indices.start, len(indices)):
            raise _damaged(dataset, shard_path(record.number, "json"))
    changed = differences(dataset.info, dataset_info(run, records, {MANIFEST_FILE: manifest}))
    if changed:
        named = ", ".join(dict.fromkeys(name.partition(".")[0] for name, _, _ in changed))
        path = dataset.folder / DATASET_FILE
        raise _broken(dataset, f"{path} differs from the shards' records or the manifest in: {named}.")
    return records


def _join(
    run: Sequence[Dataset],
    target: Path,
    sources: Sources,
    recorded: Mapping[Path, Sequence[ShardRecord]],
    progress: Progress,
) -> bool:
    """Make one dataset of those that one run would have made; returns whether a file had to be copied."""
    (target / SHARD_FOLDER).mkdir(parents=True)
    records, copied = [], False
    for dataset in run:
        for record in recorded[dataset.folder]:
            for file in (record.tar, record.parquet):
                copied |= _bring(dataset, target, file.file, file.size)
                if sha256_of(target / file.file) != file.sha256:
                    raise _damaged(dataset, file.file)
            name = shard_path(record.number, "json")
            copied |= _bring(dataset, target, name, MAX_BYTES)
            if ShardRecord.read(target, record.number).counted() != record:
                raise _damaged(dataset, name)
            records.append(record)
            progress.advance(1)
    made = run_of(run[0].info)
    if len(run) > 1:
        first, last = run[0].plan, run[-1].plan
        plan = Plan(last.span.stop - first.first, first.seed, first.shard_size, first.first)
        made |= {"schema_version": plan.schema_version, "config": plan.config(), "sources": sources}
    write_json(target / RUN_FILE, made)
    finish(target, made, records)
    (dataset, *more), manifest = run, target / MANIFEST_FILE
    # Another version of polars packs the same rows into other bytes.
    if not more and sha256_of(manifest) != dataset.info["files"][MANIFEST_FILE]["sha256"]:
        try:
            same = dataset.manifest().equals(read_table(manifest, dataset.plan.count))
        except (OSError, IntegrityError, pl.exceptions.PolarsError):
            same = False
        if not same:
            raise _damaged(dataset, MANIFEST_FILE)
    return copied


def _bring(dataset: Dataset, target: Path, name: str, limit: int) -> bool:
    """Link a regular file of at most ``limit`` bytes, or copy it; returns whether it was copied."""
    source, copied = dataset.folder / name, False
    with _reading(dataset):
        # Opened in any case, which refuses what is no file.
        read = open_file(source, limit=limit, root=dataset.folder)
    with read:
        try:
            os.link(source, target / name, follow_symlinks=False)
        except (OSError, NotImplementedError):
            # Another file system, or one without links.
            with atomic_file(target / name) as file:
                shutil.copyfileobj(read, file)
            copied = True
    # Of what is there now: whatever was linked is the file itself.
    found = (target / name).lstat()
    if not stat.S_ISREG(found.st_mode) or found.st_size > limit:
        raise _damaged(dataset, name)
    return copied


@contextmanager
def _reading(dataset: Dataset) -> Iterator[None]:
    """Tell what cannot be read of a dataset as a fault of that dataset, and not of what is written."""
    try:
        yield
    except FileNotFoundError as error:
        raise _broken(dataset, f"{error.filename} is missing.") from error
    except ForeignFileError as error:
        raise _broken(dataset, f"{error.filename} {error.strerror}.") from error
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}.", fix="Check its permissions.") from error


def _damaged(dataset: Dataset, name: str) -> IntegrityError:
    return _broken(dataset, f"{dataset.folder}: {name} is not what {dataset.folder.name}/{DATASET_FILE} records.")


def _broken(dataset: Dataset, problem: str) -> IntegrityError:
    return IntegrityError(problem, fix=f"Run `busigen verify --repair {shell_word(dataset.folder)}`, then merge again.")
