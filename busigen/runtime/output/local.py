"""Making a folder this run's own, or proving that it already is."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import polars as pl

import busigen
from busigen.errors import IntegrityError, OutputError
from busigen.files import is_temporary, leftovers, make_folder, sha256_of, write_json
from busigen.records import checked, read_json
from busigen.runtime.backends.bundle import unproven
from busigen.runtime.dataset.finalize import finish, is_finished, unfinish
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    FIELDS,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    changed_options,
    decided,
    differences,
)
from busigen.runtime.dataset.reader import RunRecord, link_refused, links, read_object, recorded_shards, refuse_newer
from busigen.runtime.dataset.sample import Source
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive, forget_tasks, is_lock, joined, living, turn
from busigen.runtime.storage.url import Address
from busigen.text import counted

_SHOWN = 3
_NOT_COMPARED = {"engine_batches": None, "options": None, "versions": None, "sources": None, "unproven": None}


def run_record(source: Source, plan: Plan) -> dict[str, Any]:
    """What ``run.json`` holds: all that decides which samples exist, and the versions that decide their bytes."""
    fingerprint = dict(source.fingerprint())
    batches = fingerprint.pop("engine_batches", None)
    missing = unproven(fingerprint) if "checkpoint" in fingerprint else []
    record = {
        "schema_version": plan.schema_version,
        "busigen": busigen.__version__,
        "config": plan.config(),
        "columns": {name: kind.__name__ for name, kind in source.row_types().items()},
        "fingerprint": fingerprint,
        # Told, not compared: older records do not say it. Batches are compared as part of the engines' version.
        **({"engine_batches": batches} if batches else {}),
        **({"unproven": missing} if missing else {}),
        # Told, not compared: a folder may be renamed, and another Pillow may pack the same pixels into other bytes, but
        # they stay the same samples.
        "options": source.options(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "polars": pl.__version__,
        },
    }
    # Through JSON, so that a tuple equals the list that comes back from the file.
    normal: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return normal


@contextmanager
def acquire_run(out: Path, run: Mapping[str, Any], part: Plan | None = None) -> Iterator[dict[str, Any]]:
    """Hold ``out`` for this run until the block ends; create it or continue it.

    Args:
        out: the dataset's folder.
        run: what this run would record.
        part: hold the shards of this plan alone, beside tasks that hold others; None holds the whole folder.

    Yields:
        The run record that stands in the folder: ``run`` itself, or that of the run which is continued.

    Raises:
        InputError: the dataset there is newer than this busigen.
        OutputError: the folder holds something else, belongs to another run or process, or cannot be written.
    """
    with output_errors(out):
        # Before anything is made or removed: the folder may be somebody else's.
        existing_run(out)
        read_object(out / DATASET_FILE)  # For its schema alone: what is newer is not made again.
        make_folder(out / SHARD_FOLDER)
        lock = joined(out, part.numbers) if part else exclusive(out)
        lock.__enter__()
    try:
        with output_errors(out), turn(out) if part else nullcontext():
            # Again: another run may have begun here before the lock was held.
            existing = existing_run(out)
            if existing is not None:
                refuse_other(out, existing, run)
            # A temporary file may be that of another task, as long as there is one.
            if part is None or len(living(out)) == 1:
                for path in leftovers(out, WRITTEN) + leftovers(out / SHARD_FOLDER, WRITTEN):
                    path.unlink()
            if part is None:
                forget_tasks(out)
            if existing is None:
                existing = dict(run)
                write_json(out / RUN_FILE, existing)
        yield existing
    finally:
        lock.__exit__(None, None, None)


def existing_run(out: Path) -> dict[str, Any] | None:
    """The run record in a folder; None where a run could begin.

    Raises:
        InputError: the dataset is newer than this busigen.
        OutputError: the folder holds something else, or a link in a dataset's place.
    """
    with output_errors(out):
        _refuse_foreign_folder(out)
        return read_run_file(out / RUN_FILE)


def refuse_other_run(
    out: Path | Address, existing: Mapping[str, Any], source: Source, plan: Plan, healthy: Path
) -> None:
    """Refuse early what ``claimed`` would refuse once the healthy images are read; without them, nothing is certain.

    Args:
        out: the dataset's place.
        existing: the run record that is there.
        source: the source without its healthy images.
        plan: of the run.
        healthy: the folder that the healthy images will come from.

    Raises:
        OutputError: the run that is there differs in more than its healthy images can tell.
    """
    run = run_record(source, plan)
    run["options"]["--healthy"] = Path(os.path.realpath(healthy)).name
    before = decided(existing, "--healthy")
    run["fingerprint"]["healthy"] = before if before != run["fingerprint"]["healthy"] else None
    refuse_other(out, existing, run)


def _refuse_foreign_folder(out: Path) -> None:
    if not out.is_dir():
        if out.exists():
            raise OutputError(f"{out} is a file, not a folder.", fix="Choose another --out.")
        return
    if linked := links(out):
        raise link_refused(linked[0], OutputError)
    if (out / RUN_FILE).exists():
        return
    names = [p.name for p in out.iterdir() if p.name != SHARD_FOLDER]
    if (out / SHARD_FOLDER).is_dir():
        names += [f"{SHARD_FOLDER}/{p.name}" for p in (out / SHARD_FOLDER).iterdir()]
    refuse_foreign(out, names)


def refuse_foreign(out: Path | Address, names: Iterable[str]) -> None:
    """Refuse a place that holds files and no run record.

    Args:
        out: the place.
        names: of the files there, relative to it.

    Raises:
        OutputError: a file is none of those that a run which was killed before it could write ``run.json`` may leave.
    """
    foreign = sorted(
        (name for name in names if not is_lock(name) and not is_temporary(name, WRITTEN)),
        key=lambda name: ("/" in name, name),
    )
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        raise OutputError(
            f"{out} holds other files ({', '.join(foreign[:3])}{more}) and no {RUN_FILE}.",
            fix="Choose an --out that is empty or does not exist.",
        )


def read_run_file(path: Path) -> dict[str, Any] | None:
    """What a ``run.json`` holds; None if there is none.

    Raises:
        OutputError: it is damaged.
    """
    try:
        return checked_run(read_json(path, root=path.parent), path)
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise _unreadable(path, str(error)) from error


def checked_run(run: Any, path: Path | Address) -> dict[str, Any]:
    """A run record that was read from ``path``.

    Raises:
        InputError: it is newer than this busigen.
        OutputError: it is none.
    """
    if isinstance(run, dict):
        refuse_newer(run, path)
    try:
        checked(RunRecord, run, path, fix="")
    except IntegrityError as error:
        raise _unreadable(path, error.problem) from error
    found: dict[str, Any] = run
    return found


def refuse_other(out: Path | Address, existing: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Refuse to continue another run, with the difference.

    Args:
        out: the dataset's place.
        existing: the run record that is there.
        run: this run's.

    Raises:
        OutputError: they differ in something that decides which samples exist.
    """
    shown = shown_changes({**existing, **_NOT_COMPARED}, {**run, **_NOT_COMPARED}, existing, run)
    if not shown:
        return
    fix = "Choose another --out, or repeat the options that the folder was started with."
    if list(changed_options(existing, run)) == ["--count"]:
        fix += " For more samples, generate them with another --seed into another --out, and join both with "
        fix += "`busigen merge`."
    raise OutputError(f"{out} belongs to another run ({'; '.join(shown)}).", fix=fix)


def shown_changes(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    old_options: Mapping[str, Any] | None = None,
    new_options: Mapping[str, Any] | None = None,
) -> list[str]:
    """In what two run records differ, in words: by the options that decide it, else by some fields.

    Args:
        old: a record, or what counts of it.
        new: another one.
        old_options: the whole of it, for the names of folders; None for the same.
        new_options: likewise.
    """
    changed = differences(old, new)
    if not changed:
        return []
    options = changed_options(old_options or old, new_options or new)
    known = tuple(".".join(FIELDS[option]) for option in options)
    rest = [(name, old, new) for name, old, new in changed if not name.startswith(known)]
    shown = [f"{option}: {change}" for option, change in options.items()]
    # What follows from a changed option, such as another bundle's preset, is counted; alone it has to be shown.
    if not options:
        shown += [f"{name}: {_short(old)} -> {_short(new)}" for name, old, new in rest[:_SHOWN]]
        rest = rest[_SHOWN:]
    if rest:
        shown.append(f"and {counted(len(rest), 'more field')} of {RUN_FILE}")
    return shown


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _unreadable(path: Path | Address, why: str) -> OutputError:
    return OutputError(f"{path} is not a run record of busigen: {why.rstrip('.')}.", fix="Choose another --out.")


_HASHERS = min(8, os.cpu_count() or 1)


def complete_shard(folder: Path, plan: Plan, number: int) -> ShardRecord | None:
    """A shard's record if its three files are there with their recorded sizes, else None: it must be made (again).

    Without its refused draws, as it is meant to be kept.
    """
    try:
        record = ShardRecord.read(folder, number)
        sizes = {file.file: (folder / file.file).stat().st_size for file in (record.tar, record.parquet)}
    except (FileNotFoundError, IntegrityError):
        return None
    return record.counted() if is_complete(record, plan, sizes) else None


def is_complete(record: ShardRecord, plan: Plan, sizes: Mapping[str, int]) -> bool:
    """Whether a record is that of the plan's shard, and its files are there with the recorded sizes.

    Args:
        record: of the shard.
        plan: of the dataset.
        sizes: bytes of the files that are there, by their names.
    """
    indices = plan.indices(record.number)
    fits = (record.first, record.count) == (indices.start, len(indices))
    return fits and all(sizes.get(file.file) == file.size for file in (record.tar, record.parquet))


def complete_shards(folder: Path, plan: Plan) -> dict[int, ShardRecord]:
    """The plan's complete shards by their numbers, in order; their files have the recorded sizes."""
    found = ((number, complete_shard(folder, plan, number)) for number in _recorded(folder, plan))
    return {number: record for number, record in found if record}


def sound_shards(folder: Path, plan: Plan) -> dict[int, ShardRecord]:
    """The plan's shards whose files have their recorded content, by number; a damaged one is to be made again."""

    def sound(number: int) -> ShardRecord | None:
        record = complete_shard(folder, plan, number)
        whole = record and all(sha256_of(folder / file.file) == file.sha256 for file in (record.tar, record.parquet))
        return record if whole else None

    numbers = _recorded(folder, plan)
    with ThreadPoolExecutor(_HASHERS) as pool:
        return {number: record for number, record in zip(numbers, pool.map(sound, numbers), strict=True) if record}


def _recorded(folder: Path, plan: Plan) -> list[int]:
    """Numbers of the shards that have a record. Looking is cheaper than asking for each of ten million in turn."""
    return [number for number in recorded_shards(folder) if number in plan.numbers]


Records = Mapping[int, ShardRecord]


class LocalOutput:
    """A dataset in the folder that it is written in.

    Attributes:
        folder: where shards are written.
        name: what the user called the dataset's place.

    Args:
        folder: the dataset's folder; it need not exist.
    """

    name: Path | Address

    def __init__(self, folder: Path) -> None:
        self.folder = self.name = folder

    def stored_run(self) -> dict[str, Any] | None:
        """The run record that is there; None for a new dataset.

        Raises:
            OutputError: something else is there.
        """
        return existing_run(self.folder)

    def claimed(self, run: Mapping[str, Any], part: Plan | None) -> AbstractContextManager[dict[str, Any]]:
        """See :func:`busigen.runtime.output.local.acquire_run`."""
        return acquire_run(self.folder, run, part)

    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that need not be made again."""
        return sound_shards(self.folder, plan)

    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that are complete now."""
        return complete_shards(self.folder, plan)

    def keep(self, record: ShardRecord, kept: Callable[[ShardRecord], None]) -> None:
        """Take a shard that was written to ``folder``; ``kept`` is told once it is safe."""
        kept(record)

    def hurry(self) -> None:
        """Let nobody wait: the run is to end at once."""

    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """See :func:`busigen.runtime.dataset.finalize.is_finished`."""
        return is_finished(self.folder, run, records)

    def unfinish(self) -> None:
        """See :func:`busigen.runtime.dataset.finalize.unfinish`."""
        unfinish(self.folder)

    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """See :func:`busigen.runtime.dataset.finalize.finish`."""
        finish(self.folder, run, records)

    def held(self, plan: Plan, records: Records) -> tuple[Plan, Records]:
        """What of a plan, and of its complete shards, takes room in ``folder`` at a time."""
        return plan, records

    @property
    def holds_all(self) -> bool:
        """Whether the whole dataset lies on the disk of ``folder``."""
        return True

    @property
    def elsewhere(self) -> str:
        """What to choose where the disk of ``folder`` is too small."""
        return "another --out or a smaller --count"


@contextmanager
def aborting(destination: LocalOutput) -> Iterator[None]:
    """Have the shelf hurry where the block is left by Ctrl-C, before anybody waits for what it still does."""
    try:
        yield
    except KeyboardInterrupt:
        destination.hurry()
        raise


@dataclass(frozen=True)
class DatasetFinalizer:
    """Completes the dataset of a run.

    Attributes:
        destination: where its shards stand.
        run: its run record.
        plan: of the dataset.
        part: of this task; None if this process makes the whole dataset.
    """

    destination: LocalOutput
    run: Mapping[str, Any]
    plan: Plan
    part: Plan | None

    def is_done(self, records: Mapping[int, ShardRecord]) -> bool:
        """Whether nothing is left to do for this process, whose sound shards ``records`` are.

        A task has nothing left to do, too, where shards of other tasks are missing: one of those completes the dataset.
        """
        mine = self.part or self.plan
        if len(records) < mine.shards:
            return False
        everyone = self._all(records)
        return len(everyone) == self.plan.shards and self.destination.is_finished(self.run, list(everyone.values()))

    def reopen(self, records: Mapping[int, ShardRecord]) -> None:
        """Take back the claim that the dataset is complete, where shards of it are about to be made again."""
        if self.part is None or len(records) < self.part.shards:
            with self._alone():
                self.destination.unfinish()

    def close(self, records: Mapping[int, ShardRecord]) -> tuple[list[ShardRecord], int]:
        """Write the files that describe the whole dataset if all its shards are there; two tasks may end at once.

        Args:
            records: of this process's shards, all of them.

        Returns:
            The records of the dataset's shards, or of this process's if some are still missing; how many are.
        """
        with self._alone():
            everyone = self._all(records)
            if len(everyone) < self.plan.shards:
                return _in_order(records), self.plan.shards - len(everyone)
            found = list(everyone.values())
            if not self.destination.is_finished(self.run, found):
                self.destination.finish(self.run, found)
        return found, 0

    def _all(self, records: Mapping[int, ShardRecord]) -> dict[int, ShardRecord]:
        if self.part is None:
            return {record.number: record for record in _in_order(records)}
        return self.destination.complete(self.plan)

    def _alone(self) -> AbstractContextManager[None]:
        return turn(self.destination.folder) if self.part else nullcontext()


def _in_order(records: Mapping[int, ShardRecord]) -> list[ShardRecord]:
    return [records[number] for number in sorted(records)]
