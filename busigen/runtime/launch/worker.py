"""What a worker does, wherever it runs: it opens a source of its own and makes one shard after the other.

It hands over their bytes, and only the process that started it writes to the dataset: a worker may be lost any time.
"""

from __future__ import annotations

import hashlib
import queue
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError
from busigen.runtime.atomic import atomic_file, output_errors, write_json
from busigen.runtime.claim import run_record
from busigen.runtime.layout import FIRST_SCHEMA_VERSION, SHARD_FOLDER, Plan, shard_path
from busigen.runtime.progress import Progress
from busigen.runtime.sample import Drawn, Source
from busigen.runtime.shards import ShardRecord, write_shard

SourceMaker = Callable[[Progress], Source]
"""Opens a worker's source. It is sent to the worker, so it has to be picklable; paths in it have to hold there."""


@dataclass(frozen=True)
class Packed:
    """A shard as bytes.

    Attributes:
        record: of the shard.
        files: content of its tar and its table, by their names in the dataset.
        stages: seconds that the worker has spent in each stage's engine so far.
    """

    record: ShardRecord
    files: Mapping[str, bytes]
    stages: Mapping[str, float] = field(default_factory=dict)

    def put(self, folder: Path) -> None:
        """Write the shard into the dataset, its record last.

        Raises:
            OSError: the disk refused.
            IntegrityError: the bytes are not those that the worker wrote.
        """
        record = folder / shard_path(self.record.number, "json")
        record.unlink(missing_ok=True)
        for file in (self.record.tar, self.record.parquet):
            content = self.files[file.file]
            if hashlib.sha256(content).hexdigest() != file.sha256:
                raise IntegrityError(
                    f"{file.file} came damaged from its worker.", fix="Check memory and network, then run again."
                )
            with atomic_file(folder / file.file) as target:
                target.write(content)
        write_json(record, {"schema_version": FIRST_SCHEMA_VERSION, **asdict(self.record)})


@dataclass(frozen=True)
class Identity:
    """What a worker says of its source: all that :class:`busigen.runtime.sample.Source` tells without drawing.

    Attributes:
        fingerprint, options, row_types: as a source tells them.
        record: the run record that this worker would write.
    """

    fingerprint: dict[str, Any]
    options: Mapping[str, str | None]
    row_types: Mapping[str, type]
    record: dict[str, Any]


class Described:
    """A source that is elsewhere: it says what it is and cannot draw."""

    def __init__(self, identity: Identity) -> None:
        self.identity = identity

    def fingerprint(self) -> dict[str, Any]:
        """See :class:`busigen.runtime.sample.Source`."""
        return self.identity.fingerprint

    def options(self) -> Mapping[str, str | None]:
        """See :class:`busigen.runtime.sample.Source`."""
        return self.identity.options

    def row_types(self) -> Mapping[str, type]:
        """See :class:`busigen.runtime.sample.Source`."""
        return self.identity.row_types

    def draw(self, seed: int, indices: Any, done: Callable[[int], None]) -> Drawn:
        """Not here.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("the source is in the workers")


def record_of(source: Source) -> dict[str, Any]:
    """What a run with this source would record of it, and of this process's versions."""
    return run_record(source, Plan(count=1, seed=0, shard_size=1))


class Worker:
    """Makes shards of one source.

    Args:
        make: opens the source.
        scratch: existing folder for shards that are being made; None for the system's.

    Raises:
        BusigenError: the source cannot be opened.
    """

    def __init__(self, make: SourceMaker, scratch: Path | None = None) -> None:
        self._progress, self._scratch = Progress(), scratch
        self._source = make(self._progress)

    def identity(self) -> Identity:
        """What the source is."""
        source = self._source
        return Identity(source.fingerprint(), source.options(), source.row_types(), record_of(source))

    def steps(self, plan: Plan, number: int) -> Iterator[int | Packed]:
        """Make a shard: numbers of samples as they are accepted, then the shard.

        Raises:
            BusigenError: whatever the source raises, or the machine has no room for one shard.
        """
        told: queue.SimpleQueue[int | Packed | BaseException] = queue.SimpleQueue()

        def make() -> None:
            try:
                told.put(self._pack(number, self._source.draw(plan.seed, plan.indices(number), told.put)))
            except BaseException as error:
                told.put(error)

        threading.Thread(target=make, name="shard", daemon=True).start()
        while not isinstance(step := told.get(), Packed):
            if isinstance(step, BaseException):
                raise step
            yield step
        yield step

    def _pack(self, number: int, drawn: Drawn) -> Packed:
        with tempfile.TemporaryDirectory(prefix="busigen-", dir=self._scratch) as name, output_errors(Path(name)):
            folder = Path(name)
            (folder / SHARD_FOLDER).mkdir()
            record = write_shard(folder, number, drawn, self._source.row_types())
            files = {file.file: (folder / file.file).read_bytes() for file in (record.tar, record.parquet)}
        return Packed(record, files, dict(self._progress.stage_seconds))
