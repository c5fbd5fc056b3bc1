"""Merged datasets: joining finished ones without changing a byte of their shards, and the parts that some consist of.

What would have to be renumbered, several seeds or ranges with a gap, becomes a collection: it keeps its parts as they
were made, in ``parts/000`` and so on, beside a table of all rows and a ``dataset.json``.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import InputError, IntegrityError, UsageError
from busigen.files import atomic_file, atomic_path, sha256_of, write_json
from busigen.foreign import ForeignFileError, names_in, open_file
from busigen.records import MAX_BYTES, Many, Record, read_checked
from busigen.runtime.dataset.card import collection_card
from busigen.runtime.dataset.croissant import collection_croissant
from busigen.runtime.dataset.finalize import dataset_info, finish, run_of
from busigen.runtime.dataset.format import (
    CARD_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    MANIFEST_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    SHARD_FOLDER,
    Plan,
    differences,
    key_of,
    shard_path,
)
from busigen.runtime.dataset.reader import Dataset, link_refused, read_object
from busigen.runtime.dataset.run_record import SourceRecord
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, read_table, write_joined
from busigen.runtime.output.ownership import shown_changes
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import atomic_folder, output_errors
from busigen.text import counted, disk_size, shell_word

PARTS_FOLDER = "parts"
COLLECTION_FILES = (MANIFEST_FILE, CARD_FILE, DATASET_FILE)  # what a collection holds at least, beside its parts

Sources = list[dict[str, Any]]  # what a dataset was merged from, in order: folder, plan, versions, sha256 of its record

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

    def lines(self) -> Iterator[str]:
        """The lines of ``busigen merge``."""
        shape = "as one run would have made it" if self.parts == 1 else f"in {counted(self.parts, 'part')}"
        yield f"{counted(self.samples, 'sample')} in {self.folder}, {shape}; {disk_size(self.size)} of shards"
        if self.copied:
            yield "  shards were copied: this file system cannot link them"
        yield f"  check with: busigen verify {shell_word(self.folder)}"


def merge(out: Path, folders: Sequence[Path], *, progress: Progress | None = None) -> MergeReport:
    """Join finished datasets of one bundle, which stay as they are; merged ones are taken apart first.

    Ranges of one seed that follow one another become one dataset with the bytes of a single run. Everything else stays
    in parts. Shards are linked where the file system allows it, and copied otherwise; each is checked against its
    recorded hash. ``out``, which must not exist or be empty, appears by a rename, whole. ``progress`` counts shards.

    Raises:
        InputError: one is no finished dataset, differs in what decides its samples, or has samples of another one.
        IntegrityError: one is damaged.
        OutputError: ``out`` is not empty, or cannot be written.
    """
    progress = progress or Progress()
    if len(folders) < 2:
        raise UsageError("fewer than two datasets are given.", fix="Give two or more to merge.")
    datasets: list[Dataset] = []
    origin: dict[Path, Sources] = {}
    for folder in folders:
        parts = open_parts(folder)
        datasets += parts
        recorded = recorded_sources(folder) or [_source_of(part) for part in parts]
        origin.update(zip((part.folder for part in parts), recorded, strict=True))
    datasets.sort(key=lambda one: (one.plan.seed, one.plan.first))
    _refuse_misfits(datasets)
    runs = [[datasets[0]]]  # by what one run each would have made
    for one, two in pairwise(datasets):
        # A short last shard would have to be filled up, which changes its bytes.
        alike = one.plan.shard_size == two.plan.shard_size and not one.plan.span.stop % one.plan.shard_size
        if one.plan.seed == two.plan.seed and two.plan.first == one.plan.span.stop and alike:
            runs[-1].append(two)
        else:
            runs.append([two])
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


def _records(dataset: Dataset) -> list[ShardRecord]:
    """Every shard's record, of a dataset whose plan, records, ``run.json`` and ``dataset.json`` agree, or an error."""
    if (run := read_object(dataset.folder / RUN_FILE)) is None or differences(run, run_of(dataset.info)):
        raise _damaged(dataset, RUN_FILE)
    with _reading(dataset):
        records = [record.counted() for record in dataset.shards()]
        manifest = FileRecord.of(dataset.folder, MANIFEST_FILE)
    for record in records:
        indices = dataset.plan.indices(record.number)
        if (record.first, record.count) != (indices.start, len(indices)):
            raise _damaged(dataset, shard_path(record.number, "json"))
    if changed := differences(dataset.info, dataset_info(run, records, {MANIFEST_FILE: manifest})):
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
                copied |= _link_or_copy(dataset, target, file.file, file.size)
                if sha256_of(target / file.file) != file.sha256:
                    raise _damaged(dataset, file.file)
            name = shard_path(record.number, "json")
            copied |= _link_or_copy(dataset, target, name, MAX_BYTES)
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


def _link_or_copy(dataset: Dataset, target: Path, name: str, limit: int) -> bool:
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


class _Part(Record):
    sources: Many[SourceRecord]


class _Collection(Record):
    parts: Many[_Part]


def part_name(number: int) -> str:
    """A part's folder in its collection, with forward slashes."""
    return f"{PARTS_FOLDER}/{number:03d}"


def parts_of(folder: Path) -> list[Path]:
    """The folders of a collection's parts, in order; empty for others; an InputError for a link or a newer schema."""
    parts = folder / PARTS_FOLDER
    if places := [parts / name for name in names_in(parts) if name.isdecimal() and (parts / name).is_dir()]:
        for path in (parts, *places):
            if path.is_symlink():
                raise link_refused(path)
        read_object(folder / DATASET_FILE)  # For its schema alone.
    return sorted(places, key=lambda path: int(path.name))


def open_parts(folder: Path) -> list[Dataset]:
    """The datasets of a folder: a collection's parts, or the one that it is; raises what :meth:`Dataset.open` does."""
    return [Dataset.open(place) for place in parts_of(folder) or [folder]]


def write_collection(folder: Path, sources: Sequence[Sources] | None = None) -> None:
    """Write a collection's own files, ``dataset.json`` last; without ``sources``, they are taken from the parts."""
    parts = open_parts(folder)
    with atomic_path(folder / MANIFEST_FILE) as path:
        write_joined(path, collection_rows(parts))
    info = collection_info(folder, parts, sources or [_source_of(part) for part in parts])
    with atomic_file(folder / CARD_FILE) as file:
        file.write(collection_card(info, f"{PARTS_FOLDER}/*/{SHARD_FOLDER}/*.tar").encode())
    described = {part["folder"]: opened.info for part, opened in zip(info["parts"], parts, strict=True)}
    write_json(folder / CROISSANT_FILE, collection_croissant(info, described))
    write_json(folder / DATASET_FILE, info)


def collection_rows(parts: Sequence[Dataset]) -> Iterator[pl.DataFrame]:
    """Each part's rows, as the collection's manifest holds them."""
    for number, part in enumerate(parts):
        yield part.manifest().select(pl.lit(part_name(number)).alias("part"), pl.all())


def collection_info(folder: Path, parts: Sequence[Dataset], sources: Sequence[Sources]) -> dict[str, Any]:
    """Content of a collection's ``dataset.json``, of its opened parts and where each of them came from."""
    classes, rejected = Counter[str](), Counter[str]()
    for part in parts:
        classes.update(part.info["classes"])
        rejected.update(part.info["rejected"])
    return {
        "schema_version": SCHEMA_VERSION,
        **{name: parts[0].info.get(name) for name in ("busigen", "columns", "fingerprint")},
        "samples": sum(part.plan.count for part in parts),
        "classes": dict(sorted(classes.items())),
        "rejected": dict(sorted(rejected.items())),
        "files": {MANIFEST_FILE: asdict(FileRecord.of(folder, MANIFEST_FILE))},
        "parts": [
            {
                "folder": part_name(number),
                "config": part.info["config"],
                "samples": part.plan.count,
                "dataset_sha256": sha256_of(part.folder / DATASET_FILE),
                "sources": list(origin),
            }
            for number, (part, origin) in enumerate(zip(parts, sources, strict=True))
        ],
    }


def recorded_sources(folder: Path) -> list[Sources] | None:
    """The sources of each part, as the collection's ``dataset.json`` lists them; None if it cannot be read."""
    try:
        info = read_checked(_Collection, folder / DATASET_FILE, fix="", root=folder)
    except (OSError, IntegrityError):
        return None
    found = [part["sources"] for part in info["parts"]]
    return found if len(found) == len(parts_of(folder)) else None


def find_sample(folder: Path, key: str) -> tuple[Path, str]:
    """The part of a dataset, merged or not, that holds a sample, and its key there; a UsageError if not exactly one.

    ``key`` is ``000/000000012``, with or without ``parts/`` before it; or the key alone where one part has it.
    """
    if not (places := parts_of(folder)):
        return folder, key
    name, _, rest = key.removeprefix(f"{PARTS_FOLDER}/").rpartition("/")
    if name:
        chosen = [place for place in places if place.name == name]
    else:
        index = int(rest) if rest.isascii() and rest.isdecimal() and len(rest) <= 18 else -1
        chosen = [part.folder for part in open_parts(folder) if index in part.plan.span]
    if len(chosen) != 1:
        names = [place.name for place in chosen or places]
        problem = "is in several parts" if chosen else "is in no part"
        raise UsageError(
            f"sample {key!r} {problem} of {folder}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}.",
            fix=f"Name part and key, such as {names[0]}/{key_of(int(rest)) if chosen else key_of(0)}.",
        )
    return chosen[0], rest


def _source_of(dataset: Dataset) -> Sources:
    sources = dataset.info.get("sources")
    if isinstance(sources, list):
        return sources
    return [
        {
            "folder": dataset.folder.resolve().name,
            "config": dataset.info["config"],
            "dataset_sha256": sha256_of(dataset.folder / DATASET_FILE),
            "options": dataset.info.get("options", {}),
            "versions": dataset.info.get("versions", {}),
        }
    ]
