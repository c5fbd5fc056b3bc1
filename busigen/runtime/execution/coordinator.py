"""Hands shards to the workers of a pool and writes what they make: a lost worker's shards go to another one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from busigen.errors import InputError, WorkerError
from busigen.runtime.dataset.format import Plan, differences
from busigen.runtime.dataset.sample import Source
from busigen.runtime.execution.estimate import Estimator, explained_when_full
from busigen.runtime.execution.factory import ShardJob
from busigen.runtime.execution.worker import (
    Identity,
    RemoteSourceInfo,
    ShardDone,
    ShardStarted,
    WorkerMessage,
    WorkerStopped,
    record_of,
)
from busigen.runtime.output.base import aborting
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.text import counted, describe

_POLL_SECONDS = 0.5
"""Seconds between two looks at whether to stop."""

MOST_LOSSES = 3
"""Workers that one shard, or the pool before it is ready, may lose: one more is no accident."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a worker, whose number is never given to another one.

    Attributes:
        worker: its number.
        message: it is ready for a first shard (``Identity``), something of its work (``WorkerMessage``), an error that
            ended it, or it is lost (``str`` says how).
    """

    worker: int
    message: Identity | WorkerMessage | Exception | str


class WorkerPool(Protocol):
    """Workers, as a context manager that starts them and ends them. A worker that is lost is replaced by a new one.

    Attributes:
        where: says who they are.
        size: number of workers, known once they are started.
    """

    where: str
    size: int

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def hand(self, worker: int, plan: Plan, number: int) -> None:
        """Give a worker that is ready a shard, to be made after those that it has."""
        ...

    def end(self, worker: int) -> None:
        """Have a worker finish the oldest shard that it has begun, and nothing else."""
        ...

    def events(self, timeout: float) -> list[Event]:
        """What has happened, in order for each worker; empty after so many seconds without a message."""
        ...


class Coordinator:
    """Has a pool of workers make shards, writes them, and gives a lost worker's to another one.

    A worker has those shards that it draws at the same time, and one that waits, so that it never runs dry; towards the
    end of the run, only its even share. One that has lost a worker is made alone, so that it is known which one it is.

    Args:
        worker_pool: entered already.
        progress: shows where the workers run.
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
        self._first: Identity | None = None
        progress.engine(self._stage_seconds)

    def source(self) -> Source:
        """What the workers draw from, as soon as the first one is ready.

        Raises:
            WorkerError: the workers are lost before they are ready.
            BusigenError: they cannot open their source.
            KeyboardInterrupt: on a signal.
        """
        self._progress.note(f"starting {self._worker_pool.where}")
        while self._first is None:
            for event in self._worker_pool.events(_POLL_SECONDS):
                self._common(event)
        return RemoteSourceInfo(self._first)

    def make(self, source: Source, job: ShardJob) -> None:
        """Have the workers make the shards that the job's ``records`` lack until asked to stop, and add them to these.

        Raises:
            WorkerError: a shard loses one worker after the other.
            BusigenError: whatever the workers' sources raise; complete shards are kept.
        """
        destination, plan, records, progress, stop = job
        self._todo = deque(number for number in plan.numbers if number not in records)
        estimator = Estimator(destination, plan, records, progress)
        done = sum(record.count for record in records.values())
        try:
            with aborting(destination), stop.finishing(self._open_shards):
                progress.start("generating", plan.count, done, shards=(len(records), plan.shards))
                estimator.begin()
                while any(self._claims.values()) or (self._todo and not stop.requested):
                    if stop.requested:
                        self._end()
                    else:
                        self._hand_out(plan)
                    for event in self._worker_pool.events(_POLL_SECONDS):
                        packed = self._common(event)
                        if packed is None:
                            estimator.advanced()
                            continue
                        estimator.generated()
                        with output_errors(destination.folder), explained_when_full(destination, plan, records):
                            packed.put(destination.folder)
                            destination.keep(packed.record, progress.shard_written)
                        records[packed.record.number] = packed.record.counted()
                        estimator.written(packed.record)
                        estimator.check()
        finally:
            progress.stop()

    def _hand_out(self, plan: Plan) -> None:
        while (worker := self._next()) is not None:
            number = self._todo.popleft()
            self._claims[worker].append(number)
            self._worker_pool.hand(worker, plan, number)

    def _next(self) -> int | None:
        """The worker that gets the next shard now; None if they have enough, or none is left."""
        if not self._todo or not self._claims:
            return None
        worker = min(self._claims, key=lambda worker: len(self._claims[worker]))
        if not self._claims[worker]:
            return worker
        if self._todo[0] in self._losses:
            return None
        return next((worker for worker, claims in self._claims.items() if self._may_have_more(claims)), None)

    def _may_have_more(self, claims: Collection[int]) -> bool:
        left = len(self._todo) + sum(map(len, self._claims.values()))
        fair = (len(claims) + 1) * self._worker_pool.size <= left
        return fair and self._begun.issuperset(claims) and self._losses.keys().isdisjoint(claims)

    def _end(self) -> None:
        for worker, claims in self._claims.items():
            if claims and worker not in self._ending:
                self._ending.add(worker)
                self._worker_pool.end(worker)

    def _common(self, event: Event) -> ShardDone | None:
        """Note what happened; a shard that was made is handed back."""
        worker, message = event.worker, event.message
        if isinstance(message, Identity):
            self._welcome(worker, message)
        elif isinstance(message, int):
            self._accepted[worker] += message
            self._progress.advance(message)
        elif isinstance(message, ShardStarted):
            self._begun.add(message.number)
        elif isinstance(message, ShardDone):
            self._take(worker, message)
            return message
        elif isinstance(message, WorkerStopped):
            self._claims[worker].clear()
        elif isinstance(message, Exception):
            raise message
        else:
            self._lose(worker, message)
        return None

    def _take(self, worker: int, packed: ShardDone) -> None:
        # Those that were reported before may be of shards that are drawn ahead, too.
        described = min(self._accepted[worker], packed.record.count)
        self._accepted[worker] -= described
        self._progress.advance(packed.record.count - described)
        self._progress.rejected(len(packed.record.rejections))
        self._stages[worker] = packed.stages
        self._claims[worker].remove(packed.record.number)
        self._begun.discard(packed.record.number)
        self._losses.pop(packed.record.number, None)

    def _welcome(self, worker: int, identity: Identity) -> None:
        self._first = self._first or identity
        # The first worker's source with the versions of this process, which are the ones that run.json will name.
        expected = record_of(RemoteSourceInfo(self._first))
        changed = [change for change in differences(expected, identity.record) if not change[0].startswith("options.")]
        if changed:
            named = "; ".join(f"{name}: {describe(one)} and {describe(other)}" for name, one, other in changed[:3])
            raise InputError(
                f"worker {worker} would draw other samples, or write them in other bytes ({named}).",
                fix="Give all machines the same bundle, healthy images and versions.",
            )
        self._losses.pop(None, None)
        self._claims[worker] = deque()

    def _lose(self, worker: int, how: str) -> None:
        claims = self._claims.pop(worker, deque())
        self._begun.difference_update(claims)
        self._todo.extendleft(reversed(claims))
        self._progress.advance(-self._accepted.pop(worker, 0))
        self._losses.update(claims or [None])
        what = _shards_in_words(claims) if claims else "no shard"
        self._progress.note(f"worker {worker} is lost ({how}), with {what}; another one takes its place")
        fatal = next((number for number, losses in self._losses.items() if losses > MOST_LOSSES), -1)
        if fatal != -1:
            about = f"shard {fatal} has lost" if fatal is not None else "the crew has lost, before any was ready,"
            raise WorkerError(
                f"{about} {counted(MOST_LOSSES + 1, 'worker')}, the last one so: {how}.",
                fix="Look for what ends them, such as too little memory (use fewer --workers or a smaller --batch-size)"
                ", then run the same command again: complete shards are kept.",
            )

    def _open_shards(self) -> str:
        busy = [worker for worker, claims in self._claims.items() if claims]
        if not busy:
            return "before the first shard"
        generated = sum(self._accepted[worker] for worker in busy)
        return f"{counted(len(busy), 'open shard')} ({counted(generated, 'sample')} drawn so far)"

    def _stage_seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for stages in self._stages.values():
            total.update(stages)
        return dict(total.most_common())


def _shards_in_words(numbers: Collection[int]) -> str:
    return f"shard{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
