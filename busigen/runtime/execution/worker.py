"""What a worker does, wherever it runs: it opens a source of its own and makes the shards that it is handed.

It hands over their bytes, and only the process that started it writes to the dataset: a worker may be lost any time.
"""

from __future__ import annotations

import hashlib
import queue
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError
from busigen.files import atomic_file, write_json
from busigen.runtime.dataset.format import (
    FIRST_SCHEMA_VERSION,
    SHARD_FOLDER,
    Plan,
    SampleBatch,
    Source,
    batches_of,
    shard_path,
)
from busigen.runtime.dataset.shards import ShardRecord, write_shard
from busigen.runtime.output.ownership import run_record
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors

SourceMaker = Callable[[Progress], Source]
"""Opens a worker's source. It is sent to the worker, so it has to be picklable; paths in it have to hold there."""

Order = tuple[Plan, int]  # a shard to make: the plan, the same for all shards, and the shard's number


class RemoteSourceInfo:
    """What a source is, without the source: it can be sent, and cannot draw. ``record`` is its process's run record."""

    def __init__(self, source: Source) -> None:
        self._fingerprint, self._options = source.fingerprint(), source.options()
        self._row_types = source.row_types()
        self.record = record_of(source)

    def fingerprint(self) -> dict[str, Any]:
        """The source's."""
        return self._fingerprint

    def options(self) -> Mapping[str, str | None]:
        """The source's."""
        return self._options

    def row_types(self) -> Mapping[str, type]:
        """The source's."""
        return self._row_types

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        """Not here."""
        raise NotImplementedError("the source is in the workers")


def record_of(source: Source) -> dict[str, Any]:
    """What a run with this source would record of it, and of this process's versions."""
    return run_record(source, Plan(count=1, seed=0, shard_size=1))


@dataclass(frozen=True)
class ShardStarted:
    """A shard is being drawn, so that another one may wait for its turn."""

    number: int


@dataclass(frozen=True)
class ShardDone:
    """A shard as bytes: its record, its files by their names in the dataset, the worker's seconds by stage so far."""

    record: ShardRecord
    files: Mapping[str, bytes]
    stages: Mapping[str, float] = field(default_factory=dict)

    def put(self, folder: Path) -> None:
        """Write the shard into the dataset, its record last; an ``IntegrityError`` if its bytes were damaged."""
        record = folder / shard_path(self.record.number, "json")
        record.unlink(missing_ok=True)
        for file in (self.record.tar, self.record.parquet):
            content = self.files[file.file]
            if hashlib.sha256(content).hexdigest() != file.sha256:
                problem = f"{file.file} came damaged from its worker."
                raise IntegrityError(problem, fix="Check memory and network, then run again.")
            with atomic_file(folder / file.file) as target:
                target.write(content)
        write_json(record, {"schema_version": FIRST_SCHEMA_VERSION, **asdict(self.record)})


@dataclass(frozen=True)
class WorkerStopped:
    """A worker that was asked to end has done so; what it had drawn ahead is dropped."""


WorkerMessage = int | ShardStarted | ShardDone | WorkerStopped
"""What a worker sends: samples that were accepted, of whichever shard; a shard begun; a shard made; its end."""


class Worker:
    """Makes shards of the source that ``make`` opens, in ``scratch``; draws ahead if it can, so that batches fill."""

    def __init__(self, make: SourceMaker, scratch: Path | None = None) -> None:
        self._progress, self._scratch = Progress(), scratch
        self._source = make(self._progress)
        self._orders: queue.SimpleQueue[Order | None] = queue.SimpleQueue()
        self._messages: queue.SimpleQueue[WorkerMessage | BaseException] = queue.SimpleQueue()
        self._opened: deque[int] = deque()
        self._ending = threading.Event()

    def source_info(self) -> RemoteSourceInfo:
        """What the source is."""
        return RemoteSourceInfo(self._source)

    def order(self, order: Order | None) -> None:
        """Have a shard made once those before it leave room; None: finish the oldest one that was begun, then end."""
        if order is None:
            self._ending.set()
        self._orders.put(order)

    def messages(self) -> Iterator[WorkerMessage]:
        """Make what is ordered, until asked to end; raises whatever the source does. To be called once."""
        threading.Thread(target=self._work, name="shards", daemon=True).start()
        while not isinstance(message := self._messages.get(), WorkerStopped):
            if isinstance(message, BaseException):
                raise message
            yield message
        yield message

    def _work(self) -> None:
        try:
            if (order := self._orders.get()) is not None:
                self._make(*order)
            self._messages.put(WorkerStopped())
        except BaseException as error:
            self._messages.put(error)

    def _make(self, plan: Plan, first: int) -> None:
        requests = self._requests(plan, first)
        stream = batches_of(self._source, plan.seed, requests, self._messages.put, self._ending.is_set)
        pending: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer, closing(stream):
            for batch in stream:
                # One shard is packed while the next ones are drawn; no more than one waits for that.
                if pending is not None:
                    pending.result()
                pending = writer.submit(self._pack, self._opened.popleft(), batch)

    def _requests(self, plan: Plan, number: int) -> Iterator[range]:
        """The indices of one shard after the other; an empty range where none waits but some are unfinished."""
        while not self._ending.is_set():
            self._opened.append(number)
            self._messages.put(ShardStarted(number))
            yield plan.indices(number)
            while True:
                try:
                    order = self._orders.get(block=not self._opened)
                except queue.Empty:
                    order = None
                if order is not None:
                    break
                if self._ending.is_set():
                    return
                yield range(0)
            plan, number = order

    def _pack(self, number: int, batch: SampleBatch) -> None:
        try:
            with tempfile.TemporaryDirectory(prefix="busigen-", dir=self._scratch) as name, output_errors(Path(name)):
                folder = Path(name)
                (folder / SHARD_FOLDER).mkdir()
                record = write_shard(folder, number, batch, self._source.row_types())
                files = {file.file: (folder / file.file).read_bytes() for file in (record.tar, record.parquet)}
            self._messages.put(ShardDone(record, files, dict(self._progress.stage_seconds())))
        except BaseException as error:
            # The next shard may be far off, and so may be who asks for this one's outcome.
            self._messages.put(error)
