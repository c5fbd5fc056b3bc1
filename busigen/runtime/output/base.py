"""The place that a dataset goes to: what a run needs of it, and the plain one, a folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError, OutputError
from busigen.files import leftovers, make_folder, sha256_of, write_json
from busigen.records import read_json
from busigen.runtime.dataset.finalize import finish, is_finished
from busigen.runtime.dataset.format import DATASET_FILE, RUN_FILE, SHARD_FOLDER, WRITTEN, Plan
from busigen.runtime.dataset.reader import link_refused, links, read_object, recorded_shards
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.output.ownership import checked_run, refuse_foreign, refuse_other, unreadable_run
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive, forget_tasks, joined, living, turn
from busigen.runtime.storage.url import Address

Records = Mapping[int, ShardRecord]  # shards' records by number

_HASHERS = min(8, os.cpu_count() or 1)


class Output(ABC):
    """The place that a dataset is written to. A run writes each shard to ``folder`` and hands it over with ``keep``.

    ``name`` is what the user called the place; ``holds_all`` says whether the whole dataset lies on the disk of
    ``folder``, and ``elsewhere`` what to choose where that disk is too small.
    """

    folder: Path
    name: Path | Address
    holds_all = True
    elsewhere = "another --out or a smaller --count"

    @abstractmethod
    def stored_run(self) -> dict[str, Any] | None:
        """The run record that is there; None for a new dataset. An ``OutputError`` if something else is there."""

    @abstractmethod
    def acquire(self, run: Mapping[str, Any], part: Plan | None) -> AbstractContextManager[dict[str, Any]]:
        """Hold the place for this run until the block ends; create it, or continue the run whose record it then yields.

        ``part`` holds the shards of this plan alone, beside tasks that hold others. An OutputError says that the place
        holds something else, belongs to another run or process, or cannot be written; an InputError, that it is newer.
        """

    @abstractmethod
    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that need not be made again, by number in order."""

    @abstractmethod
    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that are complete now, by number in order."""

    @abstractmethod
    def keep(self, record: ShardRecord) -> None:
        """Take a shard that was written to ``folder``; it is safe when this returns."""

    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """Whether the files that describe the whole dataset are there; see :mod:`busigen.runtime.dataset.finalize`."""
        return is_finished(self.folder, run, records)

    def unfinish(self) -> None:
        """Take back the claim that the dataset is complete."""
        (self.folder / DATASET_FILE).unlink(missing_ok=True)

    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """Write the files that describe the whole dataset, ``dataset.json`` last."""
        finish(self.folder, run, records)

    def held(self, plan: Plan, records: Records) -> tuple[Plan, Records]:
        """What of a plan, and of its complete shards, takes room in ``folder`` at a time."""
        return plan, records

    def aborting(self) -> AbstractContextManager[None]:
        """A context that, left by Ctrl-C, ends what is still under way before anybody waits for it."""
        return nullcontext()


class LocalOutput(Output):
    """A dataset in the folder that it is written in, which need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.name = folder

    def stored_run(self) -> dict[str, Any] | None:
        """See :class:`Output`; a link in a dataset's place, or a damaged record, is something else."""
        out, path = self.folder, self.folder / RUN_FILE
        with output_errors(out):
            if out.is_dir():
                if linked := links(out):
                    raise link_refused(linked[0], OutputError)
                if not path.exists():
                    names = [p.name for p in out.iterdir() if p.name != SHARD_FOLDER]
                    if (out / SHARD_FOLDER).is_dir():
                        names += [f"{SHARD_FOLDER}/{p.name}" for p in (out / SHARD_FOLDER).iterdir()]
                    refuse_foreign(out, names)
            elif out.exists():
                raise OutputError(f"{out} is a file, not a folder.", fix="Choose another --out.")
            try:
                return checked_run(read_json(path, root=out), path)
            except FileNotFoundError:
                return None
            except ValueError as error:
                raise unreadable_run(path, str(error)) from error

    @contextmanager
    def acquire(self, run: Mapping[str, Any], part: Plan | None) -> Iterator[dict[str, Any]]:
        """See :class:`Output`."""
        out = self.folder
        with output_errors(out):
            # Before anything is made or removed: the folder may be somebody else's.
            self.stored_run()
            read_object(out / DATASET_FILE)  # For its schema alone: what is newer is not made again.
            make_folder(out / SHARD_FOLDER)
            lock = joined(out, part.numbers) if part else exclusive(out)
            lock.__enter__()
        try:
            with output_errors(out), turn(out) if part else nullcontext():
                # Again: another run may have begun here before the lock was held.
                if (existing := self.stored_run()) is not None:
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

    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards whose files have their recorded content."""
        with ThreadPoolExecutor(_HASHERS) as pool:
            found = pool.map(lambda number: self._read(plan, number, hashed=True), self._recorded(plan))
            return {record.number: record for record in found if record}

    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards whose files have their recorded sizes."""
        found = (self._read(plan, number) for number in self._recorded(plan))
        return {record.number: record for record in found if record}

    def _recorded(self, plan: Plan) -> list[int]:
        # Looking at what is there is cheaper than asking for each of ten million shards in turn.
        return [number for number in recorded_shards(self.folder) if number in plan.numbers]

    def _read(self, plan: Plan, number: int, *, hashed: bool = False) -> ShardRecord | None:
        try:
            record = ShardRecord.read(self.folder, number)
            files = {file: self.folder / file.file for file in (record.tar, record.parquet)}
            complete = is_complete(record, plan, {file.file: path.stat().st_size for file, path in files.items()})
        except (FileNotFoundError, IntegrityError):
            return None
        if complete and not (hashed and any(sha256_of(path) != file.sha256 for file, path in files.items())):
            return record.counted()
        return None

    def keep(self, record: ShardRecord) -> None:
        """A shard in ``folder`` is safe already."""


def is_complete(record: ShardRecord, plan: Plan, sizes: Mapping[str, int]) -> bool:
    """Whether a record is that of the plan's shard, and its files have the recorded sizes; ``sizes`` are by name."""
    indices = plan.indices(record.number)
    fits = (record.first, record.count) == (indices.start, len(indices))
    return fits and all(sizes.get(file.file) == file.size for file in (record.tar, record.parquet))
