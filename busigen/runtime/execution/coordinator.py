"""Hands shards to the workers of a pool and writes what they make: a lost worker's shards go to another one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from typing import Protocol, Self

from busigen.errors import InputError, WorkerError
from busigen.runtime.dataset.format import Source, differences
from busigen.runtime.execution.estimate import ShardJob
from busigen.runtime.execution.worker import (
    Order,
    RemoteSourceInfo,
    ShardDone,
    ShardStarted,
    WorkerMessage,
    WorkerStopped,
    record_of,
)
from busigen.runtime.progress import Progress
from busigen.text import counted, describe

_POLL_SECONDS = 0.5  # seconds between two looks at whether to stop
MOST_LOSSES = 3  # workers that one shard, or the pool before it is ready, may lose: one more is no accident

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
        ...

    def events(self, timeout: float) -> list[Event]:
        """What has happened, in order for each worker; empty after so many seconds without a message."""
        ...


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
                    done = self._handle(event)
                    if done is None:
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
        drawn = sum(self._accepted[worker] for worker in busy)
        return f"{counted(len(busy), 'open shard')} ({counted(drawn, 'sample')} drawn so far)"

    def _stage_seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for stages in self._stages.values():
            total.update(stages)
        return dict(total.most_common())
