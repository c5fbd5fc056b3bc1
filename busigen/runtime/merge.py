"""Joining finished datasets of one bundle into one, without changing a byte of their shards."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from busigen.errors import InputError, IntegrityError, OutputError, UsageError
from busigen.runtime.atomic import atomic_file, output_errors, sha256_of, sync, write_json
from busigen.runtime.claim import shown_changes
from busigen.runtime.collection import (
    Sources,
    open_with_sources,
    part_name,
    write_collection,
)
from busigen.runtime.dataset import Dataset
from busigen.runtime.finish import finish, run_of
from busigen.runtime.layout import (
    FINISHED_FILES,
    LOCK_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    TEMPORARY_PREFIX,
    Plan,
    shard_path,
)
from busigen.runtime.lock import exclusive
from busigen.runtime.progress import Progress
from busigen.runtime.shards import ShardRecord
from busigen.runtime.wording import shell_word

_TOLD = ("config", "options", "schema_version", "sources", "versions")
"""Fields of a run record in which datasets that are merged may differ."""


@dataclass(frozen=True)
class MergeReport:
    """What ``merge`` made.

    Attributes:
        folder: the merged dataset.
        samples: in it.
        parts: 1 where it is what one run would have made, else the number of its parts.
        size: bytes of its shards.
        copied: whether a shard had to be copied because it could not be linked.
    """

    folder: Path
    samples: int
    parts: int
    size: int
    copied: bool


def merge(out: Path, folders: Sequence[Path], *, progress: Progress | None = None) -> MergeReport:
    """Join datasets; they stay as they are.

    Ranges of one seed that follow one another become one dataset with the bytes of a single run. Everything else stays
    in parts (:mod:`busigen.runtime.collection`). Shards are linked where the file system allows it, and copied
    otherwise; each is checked against its recorded hash. ``out`` appears by a rename, whole.

    Args:
        out: the merged dataset; must not exist, or be empty.
        folders: finished datasets of one bundle; merged ones are taken apart first.
        progress: told of every shard.

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
    try:
        with output_errors(out), _appearing(out) as place:
            progress.start("merging", sum(dataset.plan.shards for dataset in datasets), unit="shard")
            places = [place] if len(runs) == 1 else [place / part_name(number) for number in range(len(runs))]
            sources = [[source for one in run for source in origin[one.folder]] for run in runs]
            copied = [_join(*job, progress) for job in zip(runs, places, sources, strict=True)]
            if len(runs) > 1:
                write_collection(place, sources)
    finally:
        progress.stop()
    size = sum(shard[kind]["size"] for one in datasets for shard in one.info["shards"] for kind in ("tar", "parquet"))
    return MergeReport(out, sum(one.plan.count for one in datasets), len(runs), size, any(copied))


def _refuse_misfits(datasets: Sequence[Dataset]) -> None:
    first = datasets[0]
    for other in datasets[1:]:
        changes = shown_changes(_decisive(first), _decisive(other))
        if changes:
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


def _decisive(dataset: Dataset) -> dict[str, Any]:
    return {name: value for name, value in run_of(dataset.info).items() if name not in _TOLD}


def _runs(datasets: Sequence[Dataset]) -> list[list[Dataset]]:
    """The datasets, by what one run each would have made."""
    runs = [[datasets[0]]]
    for one, two in pairwise(datasets):
        follows = one.plan.seed == two.plan.seed and two.plan.first == one.plan.span.stop
        # A short last shard would have to be filled up, which changes its bytes.
        alike = one.plan.shard_size == two.plan.shard_size and not one.plan.span.stop % one.plan.shard_size
        if follows and alike:
            runs[-1].append(two)
        else:
            runs.append([two])
    return runs


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that becomes it in the end; what a killed merge left there is removed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists.", fix="Choose an OUT that does not exist or is empty; merge changes none.")
    # Of a fixed name, so that the next merge finds what this one leaves if it is killed.
    place = out.absolute().with_name(f"{TEMPORARY_PREFIX}merge-{out.absolute().name}")
    place.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(place):
            _empty(place)
            try:
                yield place
                sync(place)
                os.replace(place, out)
            except BaseException:
                _empty(place)
                raise
            (out / LOCK_FILE).unlink(missing_ok=True)
            sync(out.absolute().parent)
    finally:
        with contextlib.suppress(OSError):
            place.rmdir()


def _empty(place: Path) -> None:
    for path in place.iterdir() if place.is_dir() else ():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != LOCK_FILE:
            path.unlink()


def _join(run: Sequence[Dataset], target: Path, sources: Sources, progress: Progress) -> bool:
    """Make one dataset of those that one run would have made; tell whether a file had to be copied."""
    (target / SHARD_FOLDER).mkdir(parents=True)
    records, copied = [], False
    for dataset in run:
        for entry in dataset.info["shards"]:
            record = _listed(dataset, entry)
            for file in (record.tar, record.parquet):
                copied |= _bring(dataset.folder, target, file.file)
                if sha256_of(target / file.file) != file.sha256:
                    raise _damaged(dataset, file.file)
            copied |= _bring(dataset.folder, target, shard_path(record.number, "json"))
            records.append(record)
            progress.advance(1)
    sync(target / SHARD_FOLDER)
    if len(run) == 1:
        for name in FINISHED_FILES:
            copied |= _bring(run[0].folder, target, name)
        if sha256_of(target / MANIFEST_FILE) != run[0].info["files"][MANIFEST_FILE]["sha256"]:
            raise _damaged(run[0], MANIFEST_FILE)
        return copied
    first, last = run[0].plan, run[-1].plan
    plan = Plan(last.span.stop - first.first, first.seed, first.shard_size, first.first)
    made = {
        **run_of(run[0].info),
        "schema_version": plan.schema_version,
        "config": plan.config(),
        "sources": sources,
    }
    write_json(target / RUN_FILE, made)
    finish(target, made, records)
    return copied


def _listed(dataset: Dataset, entry: dict[str, Any]) -> ShardRecord:
    """A shard's record, if it is what ``dataset.json`` lists."""
    try:
        record = ShardRecord.read(dataset.folder, entry["number"])
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise _damaged(dataset, "a shard's record") from error
    if (entry.get("tar"), entry.get("parquet")) != (asdict(record.tar), asdict(record.parquet)):
        raise _damaged(dataset, shard_path(record.number, "json"))
    return record


def _bring(source: Path, target: Path, name: str) -> bool:
    """Link a file into the target, or copy it where that is not possible; tell whether it was copied."""
    try:
        os.link(source / name, target / name)
        return False
    except FileNotFoundError:
        raise IntegrityError(
            f"{source / name} is missing.", fix=f"Run `busigen verify --repair {shell_word(source)}`."
        ) from None
    except OSError:
        # Another file system, or one without links.
        with (source / name).open("rb") as read, atomic_file(target / name) as file:
            shutil.copyfileobj(read, file)
        return True


def _damaged(dataset: Dataset, name: str) -> IntegrityError:
    return IntegrityError(
        f"{dataset.folder}: {name} is not what {dataset.folder.name}/dataset.json records.",
        fix=f"Run `busigen verify --repair {shell_word(dataset.folder)}`, then merge again.",
    )
