"""A dataset at a URL: shards are written to a local staging folder, sent, and removed from it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from busigen.errors import IntegrityError, OutputError, UsageError
from busigen.files import is_temporary, json_bytes, leftovers, sha256_of, write_json
from busigen.records import BYTES_PER_SHARD, MAX_BYTES, parse_json, read_json
from busigen.runtime.dataset.finalize import FileProvider, dataset_info, finish
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    FINISHED_FILES,
    MANIFEST_FILE,
    OWN_FILE,
    RUN_FILE,
    SHARD_FOLDER,
    WRITTEN,
    Plan,
    record_number,
    shard_path,
)
from busigen.runtime.dataset.reader import recorded_shards, refuse_newer
from busigen.runtime.dataset.shards import FileRecord, ShardRecord
from busigen.runtime.output.base import LocalOutput, Output, Records, is_complete
from busigen.runtime.output.ownership import MARKS_FILE, Beat, Lease, checked_run, refuse_foreign, refuse_other
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import cache_folder, output_errors
from busigen.runtime.storage.lock import exclusive
from busigen.runtime.storage.object_store import RetryingCaller, RetryPolicy, Store
from busigen.runtime.storage.url import Address

_STAGED = 4  # shards in staging at most: one being written or sent, and what workers hand over meanwhile


class RemoteOutput(Output):
    """A dataset at a URL; its staging folder lies below ``staging``, or in this user's caches."""

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
        # The folder's name holds the machine's, since a home may be shared by several.
        digest = hashlib.sha256(address.url.encode()).hexdigest()[:16]
        machine = re.sub(r"[^A-Za-z0-9.-]+", "-", platform.node())[:64]
        # In the user's caches, since some systems empty other places.
        self.folder = (staging or cache_folder() / "spool") / f"busigen-{digest}-{machine}"
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
        """See :class:`Output`; a ``UsageError`` if the run is one of several tasks."""
        if part is not None:
            raise tasks_refused(self.address)
        self.stored_run()  # Not even a lock is left among files that are not ours.
        # Nobody's newer dataset is made again.
        if 0 < self._store.sizes.get(DATASET_FILE, 0) <= MAX_BYTES:
            with contextlib.suppress(ValueError):
                info = parse_json(self._store.read(DATASET_FILE) or b"", DATASET_FILE)
                if isinstance(info, dict):
                    refuse_newer(info, self.address / DATASET_FILE)
        with _staging_held(self.folder, self.address), self._lease.held():
            self._store.look()
            if (existing := self.stored_run()) is not None:
                refuse_other(self.address, existing, run)
            for name in [name for name in self._store.sizes if is_temporary(name, WRITTEN)]:
                self._store.remove(name)
            if existing is None:
                existing = dict(run)
                self._store.write(RUN_FILE, json_bytes(existing))
            with output_errors(self.folder):
                # The staging folder holds nothing but this run's: shards that a killed run left are kept if they are.
                staged = None
                with contextlib.suppress(OSError, ValueError):
                    staged = read_json(self.folder / RUN_FILE)
                if staged != json.loads(json.dumps(existing)):
                    _empty(self.folder / SHARD_FOLDER)
                (self.folder / SHARD_FOLDER).mkdir(exist_ok=True)
                write_json(self.folder / RUN_FILE, existing)
            yield existing

    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The shards whose record and files are at the URL; those that a killed run left in staging are sent first."""
        self._complete = self._recorded(plan)
        for number, record in LocalOutput(self.folder).sound(plan).items():
            if number not in self._complete:
                self.keep(record)
        _empty(self.folder / SHARD_FOLDER)
        return self.complete(plan)

    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """See :class:`Output`."""
        return dict(sorted(self._complete.items()))

    def keep(self, record: ShardRecord) -> None:
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

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """See :class:`Output`: a store that is out of reach is waited for no longer."""
        try:
            yield
        except KeyboardInterrupt:
            self._caller.aborted.set()
            raise

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
        names = [*(name for name in FINISHED_FILES if name not in (RUN_FILE, DATASET_FILE)), DATASET_FILE]
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
        numbers = {name: number for name in sorted(sizes) if (number := record_number(name)) is not None}
        wanted = [
            name
            for name, number in numbers.items()
            if number in plan.numbers and name == shard_path(number, "json") and sizes[name] <= MAX_BYTES
        ]
        found = {}
        for name, content in self._store.read_all(wanted):
            with contextlib.suppress(ValueError, IntegrityError):
                record = ShardRecord.of(parse_json(content, name), numbers[name], self.address / name)
                if is_complete(record, plan, sizes):
                    found[record.number] = record
        return found


@contextmanager
def _staging_held(staging: Path, address: Address) -> Iterator[None]:
    """Hold a staging folder until the block ends; it is removed unless the next run needs what it holds."""
    # That may be shards, and the mark by which the next run knows a lock at the URL that could not be removed.
    for path in (staging, staging / SHARD_FOLDER):
        if path.is_symlink():
            raise OutputError(f"{path} is a link.", fix="Remove it, or choose another --spool.")
    with output_errors(staging):
        (staging / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = exclusive(staging, address)
        lock.__enter__()
    try:
        with output_errors(staging):
            for path in leftovers(staging, WRITTEN) + leftovers(staging / SHARD_FOLDER, WRITTEN):
                path.unlink()
        yield
    finally:
        if not recorded_shards(staging) and not (staging / MARKS_FILE).exists():
            _empty(staging)
        lock.__exit__(None, None, None)
        # One that holds shards stays, and so does one that another process has begun to use.
        with contextlib.suppress(OSError):
            staging.rmdir()


def _empty(folder: Path) -> None:
    """Remove the files of this program from a staging folder; any others stay, and their folder with them."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.name == SHARD_FOLDER and not path.is_symlink():
                _empty(path)
                path.rmdir()
            elif OWN_FILE.fullmatch(path.name) or is_temporary(path.name, WRITTEN):
                path.unlink()


class _FromStore(FileProvider):
    def __init__(self, store: Store, folder: Path) -> None:
        self._store, self._folder = store, folder

    @contextmanager
    def files(self, records: Sequence[FileRecord]) -> Iterator[None]:
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
        for name, content in self._store.read_all(list(tables)):
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
