"""A dataset at a URL: shards are written to a local staging folder, sent, and removed from it."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import IntegrityError, UsageError
from busigen.files import is_temporary, json_bytes, sha256_of
from busigen.records import BYTES_PER_SHARD, MAX_BYTES, parse_json
from busigen.runtime.dataset.finalize import FileProvider, dataset_info, finish
from busigen.runtime.dataset.format import (
    CARD_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    FINISHED_FILES,
    MANIFEST_FILE,
    PREVIEW_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    record_number,
    shard_path,
)
from busigen.runtime.dataset.reader import refuse_newer
from busigen.runtime.dataset.shards import FileRecord, ShardRecord
from busigen.runtime.output.base import Output, Records
from busigen.runtime.output.completed_shards import is_complete, sound_shards
from busigen.runtime.output.lease import Beat, Lease
from busigen.runtime.output.ownership import checked_run, refuse_foreign, refuse_other
from busigen.runtime.output.staging import bind_to_run, default_staging, empty, hold_staging, staging_folder
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.object_store import Store, in_groups
from busigen.runtime.storage.retry import RetryingCaller, RetryPolicy
from busigen.runtime.storage.url import Address

_STAGED = 4
"""Most shards in the staging folder at a time: one being written or sent, and what workers hand over meanwhile."""


class RemoteOutput(Output):
    """A dataset at a URL.

    Args:
        address: the URL.
        staging: folder below which its staging folder lies; None for this user's caches.
        progress: gets a line about what has to be waited for.
        retry: with a store that is out of reach; None for the usual one.
        beat: of its lock; None for the usual one.

    Raises:
        BusigenError: see :class:`busigen.runtime.storage.object_store.Store`.
    """

    holds_all = False
    elsewhere = "another --spool or a smaller --shard-size"

    def __init__(
        self,
        address: Address,
        staging: Path | None = None,
        *,
        progress: Progress | None = None,
        retry: RetryPolicy | None = None,
        beat: Beat | None = None,
    ) -> None:
        self.folder = staging_folder(address, staging or default_staging())
        self.name = self.address = address
        notify = (progress or Progress()).note
        self._caller = RetryingCaller(address, retry or RetryPolicy(), notify)
        self._store = Store(self._caller)
        self._lease = Lease(self._store, self.folder, notify, beat)
        self._complete: dict[int, ShardRecord] = {}

    def stored_run(self) -> dict[str, Any] | None:
        """See :class:`Output`."""
        size = self._store.sizes.get(RUN_FILE)
        content = None if size is None else self._store.read(RUN_FILE) if size <= MAX_BYTES else b""
        if content is None:
            refuse_foreign(self.address, self._store.sizes)
            return None
        place = self.address / RUN_FILE
        try:
            run = parse_json(content, place)
        except ValueError:
            run = None
        return checked_run(run, place)

    @contextmanager
    def acquire(self, run: Mapping[str, Any], part: Plan | None) -> Iterator[dict[str, Any]]:
        """Hold the URL for this run until the block ends; see :func:`busigen.runtime.output.ownership.acquire_run`.

        Raises:
            UsageError: the run is one of several tasks.
            OutputError: as for a folder.
        """
        if part is not None:
            raise tasks_refused(self.address)
        self.stored_run()  # Not even a lock is left among files that are not ours.
        self._refuse_newer()
        with hold_staging(self.folder, self.address), self._lease:
            self._store.look()
            existing = self.stored_run()
            if existing is not None:
                refuse_other(self.address, existing, run)
            for name in [name for name in self._store.sizes if is_temporary(name, WRITTEN)]:
                self._store.remove(name)
            if existing is None:
                existing = dict(run)
                self._store.write(RUN_FILE, json_bytes(existing))
            with output_errors(self.folder):
                bind_to_run(self.folder, existing)
            yield existing

    def _refuse_newer(self) -> None:
        """See that nobody's newer dataset is made again."""
        if 0 < self._store.sizes.get(DATASET_FILE, 0) <= MAX_BYTES:
            with contextlib.suppress(ValueError):
                info = parse_json(self._store.read(DATASET_FILE) or b"", DATASET_FILE)
                if isinstance(info, dict):
                    refuse_newer(info, self.address / DATASET_FILE)

    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards whose record is at the URL, and whose files are there with their recorded sizes.

        Shards that a killed run left in the staging folder are sent first.
        """
        self._complete = self._recorded(plan)
        for number, record in sound_shards(self.folder, plan).items():
            if number not in self._complete:
                self.keep(record, lambda record: None)
        empty(self.folder / SHARD_FOLDER)
        return self.complete(plan)

    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """See :class:`Output`."""
        return dict(sorted(self._complete.items()))

    def keep(self, record: ShardRecord, kept: Callable[[ShardRecord], None]) -> None:
        """Send a shard, its record last, and free the staging folder of it."""
        # Another run's shard may have other bytes, where its processors or versions differ.
        self._lease.confirm()
        name = shard_path(record.number, "json")
        if name in self._store.sizes:
            self._store.remove(name)
        files = [record.tar.file, record.parquet.file]
        for file in files:
            self._store.put(self.folder / file, file)
        self._lease.confirm()
        self._store.put(self.folder / name, name)
        self._complete[record.number] = record
        for file in [name, *files]:
            (self.folder / file).unlink()
        kept(record)

    def abort(self) -> None:
        """See :class:`Output`."""
        self._caller.abort()

    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """See :class:`Output`; the manifest is known by its size."""
        sizes = self._store.sizes
        if any(name not in sizes for name in FINISHED_FILES):
            return False
        if sizes[DATASET_FILE] > MAX_BYTES + BYTES_PER_SHARD * len(records):
            return False
        try:
            info = parse_json(self._store.read(DATASET_FILE) or b"", DATASET_FILE)
            manifest = FileRecord(**info["files"][MANIFEST_FILE])
        except (ValueError, KeyError, TypeError):
            return False
        wanted = dataset_info(run, records, {MANIFEST_FILE: manifest})
        return bool(info == wanted) and sizes[MANIFEST_FILE] == manifest.size

    def unfinish(self) -> None:
        """See :class:`Output`."""
        if DATASET_FILE in self._store.sizes:
            self._store.remove(DATASET_FILE)

    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """See :class:`Output`. The files are written in the staging folder and sent, ``dataset.json`` last."""
        provider = _FromStore(self._store, self.folder)
        # The signals that are to end this reach Python only where polars does not have the main thread.
        self._caller.in_thread(lambda: finish(self.folder, run, records, provider))
        names = (MANIFEST_FILE, PREVIEW_FILE, CARD_FILE, CROISSANT_FILE, DATASET_FILE)
        for name in names:
            if name == DATASET_FILE:
                self._lease.confirm()
            self._store.put(self.folder / name, name)
        for name in names:
            (self.folder / name).unlink()

    def held(self, plan: Plan, records: Records) -> tuple[Plan, Records]:
        """See :class:`Output`."""
        return replace(plan, count=min(plan.count, _STAGED * plan.shard_size)), {}

    def _recorded(self, plan: Plan) -> dict[int, ShardRecord]:
        sizes = self._store.sizes
        names = {name: number for name in sizes if (number := record_number(name)) is not None}
        wanted = [
            name
            for name, number in sorted(names.items())
            if number in plan.numbers and name == shard_path(number, "json") and sizes[name] <= MAX_BYTES
        ]
        found = {}
        for name, content in in_groups(self._store, wanted):
            try:
                record = ShardRecord.of(parse_json(content, name), names[name], self.address / name)
            except (ValueError, IntegrityError):
                continue
            if is_complete(record, plan, sizes):
                found[record.number] = record
        return found


class _FromStore(FileProvider):
    """Brings files of complete shards back; see :class:`busigen.runtime.dataset.finalize.FileProvider`."""

    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder

    @contextmanager
    def files(self, records: Sequence[FileRecord]) -> Iterator[None]:
        """Have these files in the folder while the block runs."""
        try:
            for record in records:
                path = self._folder / record.file
                try:
                    self._store.get(record.file, path)
                except FileNotFoundError:
                    raise self._other(record) from None
                if sha256_of(path) != record.sha256:
                    raise self._other(record)
            yield
        finally:
            for record in records:
                (self._folder / record.file).unlink(missing_ok=True)

    def tables(self, records: Sequence[ShardRecord]) -> Iterator[pl.DataFrame]:
        """The shards' rows, of which some tables' are held at a time."""
        tables = {record.parquet.file: record.parquet for record in records}
        for name, content in in_groups(self._store, list(tables)):
            if hashlib.sha256(content).hexdigest() != tables[name].sha256:
                raise self._other(tables[name])
            yield pl.read_parquet(io.BytesIO(content))

    def _other(self, record: FileRecord) -> IntegrityError:
        number = Path(record.file).stem
        return IntegrityError(
            f"{self._store.address / record.file} is not what the record of its shard says.",
            fix=f"Delete {self._store.address / f'shards/{number}.json'}, then run the same command again: that shard "
            "is made anew.",
        )


def tasks_refused(address: Address) -> UsageError:
    """The error where several tasks would share one URL."""
    return UsageError(
        f"--array-task, --launcher slurm and --index-range beside --count need one folder for all tasks, and {address} "
        "is a URL.",
        fix="Give every task an --index-range of its own without --count, and an --out URL of its own; or a shared "
        "folder, copied to the URL afterwards; or use --workers or --launcher ray.",
    )
