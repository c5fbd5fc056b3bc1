"""The place that a dataset goes to: what a run needs of it, and the plain one, a folder."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError
from busigen.files import sha256_of
from busigen.runtime.dataset.finalize import finish, is_finished, unfinish
from busigen.runtime.dataset.format import Plan
from busigen.runtime.dataset.reader import recorded_shards
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.output.ownership import acquire_run, existing_run
from busigen.runtime.storage.url import Address

Records = Mapping[int, ShardRecord]
"""Shards' records by number."""

_HASHERS = min(8, os.cpu_count() or 1)


class Output(ABC):
    """The place that a dataset is written to. A run writes each shard to ``folder`` and hands it over with ``keep``.

    Attributes:
        folder: local folder where shards are written.
        name: what the user called the dataset's place.
        holds_all: whether the whole dataset lies on the disk of ``folder``.
        elsewhere: what to choose where that disk is too small.
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
        """Hold the place for this run; see :func:`busigen.runtime.output.ownership.acquire_run`."""

    @abstractmethod
    def sound(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that need not be made again, by number in order."""

    @abstractmethod
    def complete(self, plan: Plan) -> dict[int, ShardRecord]:
        """The plan's shards that are complete now, by number in order."""

    @abstractmethod
    def keep(self, record: ShardRecord) -> None:
        """Take a shard that was written to ``folder``; it is safe when this returns."""

    @abstractmethod
    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """Whether the files that describe the whole dataset are there; see :mod:`busigen.runtime.dataset.finalize`."""

    @abstractmethod
    def unfinish(self) -> None:
        """Take back the claim that the dataset is complete."""

    @abstractmethod
    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """Write the files that describe the whole dataset, ``dataset.json`` last."""

    def abort(self) -> None:  # noqa: B027 -- nothing to do where nobody waits
        """Let nobody wait: the run is to end at once."""

    def held(self, plan: Plan, records: Records) -> tuple[Plan, Records]:
        """What of a plan, and of its complete shards, takes room in ``folder`` at a time."""
        return plan, records

    @contextmanager
    def aborting(self) -> Iterator[None]:
        """Abort where the block is left by Ctrl-C, before anybody waits for what is still under way."""
        try:
            yield
        except KeyboardInterrupt:
            self.abort()
            raise


class LocalOutput(Output):
    """A dataset in the folder that it is written in, which need not exist."""

    def __init__(self, folder: Path) -> None:
        self.folder = self.name = folder

    def stored_run(self) -> dict[str, Any] | None:
        """See :class:`Output`."""
        return existing_run(self.folder)

    def acquire(self, run: Mapping[str, Any], part: Plan | None) -> AbstractContextManager[dict[str, Any]]:
        """See :class:`Output`."""
        return acquire_run(self.folder, run, part)

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
        """A complete shard's record, without its refused draws."""
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

    def is_finished(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
        """See :class:`Output`."""
        return is_finished(self.folder, run, records)

    def unfinish(self) -> None:
        """See :class:`Output`."""
        unfinish(self.folder)

    def finish(self, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> None:
        """See :class:`Output`."""
        finish(self.folder, run, records)


def is_complete(record: ShardRecord, plan: Plan, sizes: Mapping[str, int]) -> bool:
    """Whether a record is that of the plan's shard, and its files have the recorded sizes; ``sizes`` are by name."""
    indices = plan.indices(record.number)
    fits = (record.first, record.count) == (indices.start, len(indices))
    return fits and all(sizes.get(file.file) == file.size for file in (record.tar, record.parquet))
