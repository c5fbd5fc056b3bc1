"""A crew of workers, and who hands them their shards: a lost worker's shard goes to another one."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, Self

from busigen.errors import InputError, WorkerError
from busigen.runtime.atomic import output_errors
from busigen.runtime.claim import differences
from busigen.runtime.foresight import Foresight, told_when_full
from busigen.runtime.launch.worker import Described, Identity, Packed, record_of
from busigen.runtime.layout import Plan
from busigen.runtime.progress import Progress
from busigen.runtime.replay import told
from busigen.runtime.sample import Source
from busigen.runtime.shards import ShardRecord
from busigen.runtime.shelf import Shelf, hurried
from busigen.runtime.stopping import Stopping
from busigen.runtime.wording import counted

_PATIENCE = 0.5
"""Seconds between two looks at whether to stop."""

MOST_LOSSES = 3
"""Workers that one shard, or the crew before it is ready, may lose: one more is no accident."""


@dataclass(frozen=True)
class Event:
    """Something that happened to a worker, whose number is never given to another one.

    Attributes:
        worker: its number.
        news: it is ready for a first shard (``Identity``), accepted so many samples (``int``), made its shard
            (``Packed``), could not because of an error, or is lost (``str`` says how).
    """

    worker: int
    news: Identity | int | Packed | Exception | str


class Crew(Protocol):
    """Workers, as a context manager that starts them and ends them. A worker that is lost is replaced by a new one."""

    where: str

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...

    def hand(self, worker: int, plan: Plan, number: int) -> None:
        """Give a worker that is ready, or has made its shard, another one."""
        ...

    def events(self, timeout: float) -> list[Event]:
        """What has happened, in order for each worker; empty after so many seconds without news."""
        ...


class Foreman:
    """Has a crew make shards, writes them, and gives a lost worker's to another one.

    Args:
        crew: entered already.
        progress: told who is at work.
    """

    def __init__(self, crew: Crew, progress: Progress) -> None:
        self._crew, self._progress = crew, progress
        self._idle: list[int] = []
        self._busy: dict[int, int] = {}
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
        self._progress.note(f"starting {self._crew.where}")
        while self._first is None:
            for event in self._crew.events(_PATIENCE):
                self._common(event)
        return Described(self._first)

    def make(
        self,
        source: Source,
        shelf: Shelf,
        plan: Plan,
        records: dict[int, ShardRecord],
        progress: Progress,
        stop: Stopping,
    ) -> None:
        """See :class:`busigen.runtime.factory.Maker`.

        Raises:
            WorkerError: a shard loses one worker after the other.
            BusigenError: whatever the workers' sources raise; complete shards are kept.
        """
        self._todo = deque(number for number in plan.numbers if number not in records)
        foresight = Foresight(shelf, plan, records, progress)
        done = sum(record.count for record in records.values())
        try:
            with hurried(shelf), stop.finishing(self._open_shards):
                progress.start("generating", plan.count, done, shards=(len(records), plan.shards))
                foresight.begin()
                while self._busy or (self._todo and not stop.requested):
                    while self._idle and self._todo and not stop.requested:
                        self._hand(self._idle.pop(0), plan)
                    for event in self._crew.events(_PATIENCE):
                        packed = self._common(event)
                        if packed is None:
                            foresight.advanced()
                            continue
                        foresight.drawn()
                        with output_errors(shelf.folder), told_when_full(shelf, plan, records):
                            packed.put(shelf.folder)
                            shelf.keep(packed.record, progress.shard_written)
                        records[packed.record.number] = packed.record
                        foresight.written(packed.record)
                        foresight.check()
        finally:
            progress.stop()

    def _hand(self, worker: int, plan: Plan) -> None:
        number = self._todo.popleft()
        self._busy[worker] = number
        self._accepted[worker] = 0
        self._crew.hand(worker, plan, number)

    def _common(self, event: Event) -> Packed | None:
        """Note what happened; a shard that was made is handed back."""
        worker, news = event.worker, event.news
        if isinstance(news, Identity):
            self._welcome(worker, news)
        elif isinstance(news, int):
            self._accepted[worker] += news
            self._progress.advance(news)
        elif isinstance(news, Packed):
            # What the samples of the shard do not cover was told before.
            self._progress.advance(news.record.count - self._accepted[worker])
            self._progress.rejected(len(news.record.rejections))
            self._stages[worker] = news.stages
            self._losses.pop(self._busy.pop(worker), None)
            self._idle.append(worker)
            return news
        elif isinstance(news, Exception):
            raise news
        else:
            self._lose(worker, news)
        return None

    def _welcome(self, worker: int, identity: Identity) -> None:
        self._first = self._first or identity
        # The first worker's source with the versions of this process, which are the ones that run.json will name.
        expected = record_of(Described(self._first))
        changed = [change for change in differences(expected, identity.record) if not change[0].startswith("options.")]
        if changed:
            named = "; ".join(f"{name}: {told(one)} and {told(other)}" for name, one, other in changed[:3])
            raise InputError(
                f"worker {worker} would draw other samples, or write them in other bytes ({named}).",
                fix="Give all machines the same bundle, healthy images and versions.",
            )
        self._losses.pop(None, None)
        self._idle.append(worker)

    def _lose(self, worker: int, how: str) -> None:
        number = self._busy.pop(worker, None)
        if worker in self._idle:
            self._idle.remove(worker)
        self._progress.advance(-self._accepted.pop(worker, 0) if number is not None else 0)
        if number is not None:
            self._todo.appendleft(number)
        self._losses[number] += 1
        what = f"shard {number}" if number is not None else "no shard yet"
        self._progress.note(f"worker {worker} is lost ({how}), with {what}; another one takes its place")
        if self._losses[number] > MOST_LOSSES:
            about = f"shard {number} has lost" if number is not None else "the crew has lost, before any was ready,"
            raise WorkerError(
                f"{about} {counted(MOST_LOSSES + 1, 'worker')}, the last one so: {how}.",
                fix="Look for what ends them, such as too little memory (use fewer --workers or a smaller --batch-size)"
                ", then run the same command again: complete shards are kept.",
            )

    def _open_shards(self) -> str:
        if not self._busy:
            return "before the first shard"
        drawn = sum(self._accepted[worker] for worker in self._busy)
        return f"{counted(len(self._busy), 'open shard')} ({counted(drawn, 'sample')} drawn)"

    def _stage_seconds(self) -> dict[str, float]:
        total: Counter[str] = Counter()
        for stages in self._stages.values():
            total.update(stages)
        return dict(total.most_common())
