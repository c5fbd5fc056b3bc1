"""Workers make shards of a source of their own, wherever they run; the coordinator hands shards out and writes them.

Workers hand over bytes, and only the process that started them writes to the dataset: one may be lost any time.
"""

from __future__ import annotations

import hashlib
import queue
import tempfile
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

from busigen.errors import InputError, IntegrityError, WorkerError
from busigen.files import atomic_file, write_json
from busigen.runtime.dataset.format import (
    FIRST_SCHEMA_VERSION,
    SHARD_FOLDER,
    Plan,
    SampleBatch,
    Source,
    batches_of,
    differences,
    shard_path,
)
from busigen.runtime.dataset.shards import ShardRecord, write_shard
from busigen.runtime.execution.estimate import ShardJob
from busigen.runtime.output.ownership import run_record
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.text import counted, describe

_POLL_SECONDS = 0.5  # seconds between two looks at whether to stop
MOST_LOSSES = 3  # workers that one shard, or the pool before it is ready, may lose: one more is no accident

SourceMaker = Callable[[Progress], Source]  # opens a worker's source; picklable, by paths that hold there

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


WorkerMessage = int | ShardStarted | ShardDone | WorkerStopped  # an int: samples that were accepted


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


Event = tuple[int, RemoteSourceInfo | WorkerMessage | Exception | str]
"""A worker's number, which is never given to another one, and what happened to it: it is ready for a first shard, it
sent a message, an error ended it, or it is lost, in words."""


class WorkerPool(Protocol):
    """Workers, as a context manager that starts and ends them; one that is lost is replaced by a new one."""

    where: str  # who they are, in words
    size: int  # how many they are, known once they are started

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def order(self, worker: int, order: Order | None) -> None:
        """Give a worker that is ready a shard; None: it is to finish the oldest one that it has begun, and end."""

    def events(self, timeout: float) -> list[Event]:
        """What has happened, in order for each worker; empty after so many seconds without a message."""


class Coordinator:
    """Has a pool of workers, which is entered, make shards, writes them, and gives a lost worker's to another one.

    A worker has those shards that it draws at the same time, and one that waits, so that it never runs dry; towards the
    end of the run, only its even share. One that has lost a worker is made alone, so that it is known which one it is.
    """

    def __init__(self, worker_pool: WorkerPool, progress: Progress) -> None:
        self._worker_pool, self._progress = worker_pool, progress
        # The shards that each worker has, the oldest first.
        self._claims: dict[int, deque[int]] = {}
        self._begun: set[int] = set()
        self._ending: set[int] = set()
        self._accepted: Counter[int] = Counter()
        self._losses: Counter[int | None] = Counter()
        self._todo: deque[int] = deque()
        self._stages: dict[int, Mapping[str, float]] = {}
        self._first: RemoteSourceInfo | None = None
        progress.stage_seconds = self._stage_seconds

    def source(self) -> Source:
        """What the workers draw from, once the first one is ready; raises if they are lost before or cannot open it."""
        self._progress.note(f"starting {self._worker_pool.where}")
        while self._first is None:
            for event in self._worker_pool.events(_POLL_SECONDS):
                self._handle(event)
        return self._first

    def make(self, source: Source, job: ShardJob) -> None:
        """Have the workers make the missing shards until asked to stop; raises if one loses too many."""
        self._todo = deque(job.missing())
        with job.running(self._open_shards):
            while any(self._claims.values()) or (self._todo and not job.stop.requested):
                if job.stop.requested:
                    for busy, claims in self._claims.items():
                        if claims and busy not in self._ending:
                            self._ending.add(busy)
                            self._worker_pool.order(busy, None)
                else:
                    while (worker := self._next()) is not None:
                        number = self._todo.popleft()
                        self._claims[worker].append(number)
                        self._worker_pool.order(worker, (job.plan, number))
                for event in self._worker_pool.events(_POLL_SECONDS):
                    if (done := self._handle(event)) is None:
                        job.advanced()
                        continue
                    job.generated()
                    with job.disk_errors():
                        done.put(job.output.folder)
                        job.keep(done.record)
                    job.add(done.record)

    def _next(self) -> int | None:
        """The worker that gets the next shard now; None if they have enough, or none is left."""
        if not self._todo or not self._claims:
            return None
        worker = min(self._claims, key=lambda worker: len(self._claims[worker]))
        if not self._claims[worker]:
            return worker
        if self._todo[0] in self._losses:
            return None
        left = len(self._todo) + sum(map(len, self._claims.values()))
        for worker, claims in self._claims.items():
            fair = (len(claims) + 1) * self._worker_pool.size <= left
            if fair and self._begun.issuperset(claims) and self._losses.keys().isdisjoint(claims):
                return worker
        return None

    def _handle(self, event: Event) -> ShardDone | None:
        """Note what happened; a shard that was made is handed back."""
        worker, message = event
        if isinstance(message, RemoteSourceInfo):
            self._add_worker(worker, message)
        elif isinstance(message, int):
            self._accepted[worker] += message
            self._progress.advance(message)
        elif isinstance(message, ShardStarted):
            self._begun.add(message.number)
        elif isinstance(message, ShardDone):
            number = message.record.number
            # Those that were reported before may be of shards that are drawn ahead, too.
            reported = min(self._accepted[worker], message.record.count)
            self._accepted[worker] -= reported
            self._progress.advance(message.record.count - reported)
            self._progress.rejected(len(message.record.rejections))
            self._stages[worker] = message.stages
            self._claims[worker].remove(number)
            self._begun.discard(number)
            self._losses.pop(number, None)
            return message
        elif isinstance(message, WorkerStopped):
            self._claims[worker].clear()
        elif isinstance(message, Exception):
            raise message
        else:
            self._lose(worker, message)
        return None

    def _add_worker(self, worker: int, source: RemoteSourceInfo) -> None:
        self._first = self._first or source
        # The first worker's source with the versions of this process, which are the ones that run.json will name.
        expected = record_of(self._first)
        if changed := [one for one in differences(expected, source.record) if not one[0].startswith("options.")]:
            named = "; ".join(f"{name}: {describe(one)} and {describe(other)}" for name, one, other in changed[:3])
            problem = f"worker {worker} would draw other samples, or write them in other bytes ({named})."
            raise InputError(problem, fix="Give all machines the same bundle, healthy images and versions.")
        self._losses.pop(None, None)
        self._claims[worker] = deque()

    def _lose(self, worker: int, how: str) -> None:
        claims = self._claims.pop(worker, deque())
        self._begun.difference_update(claims)
        self._todo.extendleft(reversed(claims))
        self._progress.advance(-self._accepted.pop(worker, 0))
        self._losses.update(claims or [None])
        what = f"shard{'s' if len(claims) > 1 else ''} {', '.join(map(str, claims))}" if claims else "no shard"
        self._progress.note(f"worker {worker} is lost ({how}), with {what}; another one takes its place")
        for shard, losses in self._losses.items():
            if losses > MOST_LOSSES:
                loser, when = ("the run", " before any was ready") if shard is None else (f"shard {shard}", "")
                raise WorkerError(
                    f"{loser} has lost {counted(losses, 'worker')}{when}, the last one so: {how}.",
                    fix="Look for what ends them, such as too little memory (use fewer --workers or a smaller "
                    "--batch-size), then run the same command again: complete shards are kept.",
                )

    def _open_shards(self) -> str:
        if not (busy := [worker for worker, claims in self._claims.items() if claims]):
            return "before the first shard"
        accepted = sum(self._accepted[worker] for worker in busy)
        return f"{counted(len(busy), 'open shard')} ({counted(accepted, 'sample')} drawn so far)"

    def _stage_seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for stages in self._stages.values():
            total.update(stages)
        return dict(total.most_common())
