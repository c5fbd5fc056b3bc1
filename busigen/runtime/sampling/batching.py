"""Scheduling of batches: draws of one kind, from any shard, are worked on together once they fill a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import takewhile
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from busigen.runtime.dataset.sample import Rejection, Sample, SampleBatch
from busigen.runtime.sampling.draft import Draft, DrawRequest

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")


class BatchScheduler(Generic[K, T, R]):
    """Runs items in batches of one kind each. It begins a part-filled batch only where no batch can be filled.

    A few batches are worked on at once, so that what one needs of the processor before and after its engine calls
    overlaps with the engine calls of another. One thread puts the items and takes the results. Leaving the block waits
    for the batches that were begun.

    Args:
        lanes: batches that are worked on at once.
        kind: gives an item's kind.
        size: gives the number of items that fill a batch of a kind.
        rank: gives a kind's rank; of two kinds that could fill a batch, the one of the higher rank comes first.
        age: gives an item's age; items of the lowest age come first.
        work: takes a batch and returns each item's result, in their order; it is called in a thread of its own.
    """

    def __init__(
        self,
        lanes: int,
        *,
        kind: Callable[[T], K],
        size: Callable[[K], int],
        rank: Callable[[K], int],
        age: Callable[[T], int],
        work: Callable[[Sequence[T]], Sequence[R]],
    ) -> None:
        self._lanes, self._kind, self._size, self._rank, self._age, self._work = lanes, kind, size, rank, age, work
        self._waiting: dict[K, list[T]] = {}
        self._running: dict[Future[Sequence[R]], Sequence[T]] = {}
        self._pool = ThreadPoolExecutor(lanes, thread_name_prefix="stages")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __bool__(self) -> bool:
        """Whether an item waits or is worked on."""
        return bool(self._running) or any(self._waiting.values())

    def put(self, item: T) -> None:
        """Add an item, which waits until its batch is begun."""
        self._waiting.setdefault(self._kind(item), []).append(item)

    def keep(self, ages: Container[int]) -> None:
        """Drop the waiting items of all other ages. Items that are worked on already are finished all the same."""
        for items in self._waiting.values():
            items[:] = [item for item in items if self._age(item) in ages]

    def finished(self) -> list[tuple[T, R]]:
        """Begin the batches that can be begun, wait for one to end, and return its items with their results.

        Raises:
            Exception: what ``work`` raised.
        """
        while len(self._running) < self._lanes:
            full = [kind for kind, items in self._waiting.items() if len(items) >= self._size(kind)]
            if full:
                self._begin(max(full, key=self._rank))
            elif not self._running and any(self._waiting.values()):
                # No result is outstanding that could fill a batch, and the oldest item holds up the others.
                self._begin(min(filter(self._waiting.get, self._waiting), key=self._oldest))
            else:
                break
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        batches = [(self._running.pop(future), future) for future in done]
        return [pair for items, future in batches for pair in zip(items, future.result(), strict=True)]

    def _oldest(self, kind: K) -> int:
        return min(map(self._age, self._waiting[kind]))

    def _begin(self, kind: K) -> None:
        items = sorted(self._waiting[kind], key=self._age)
        batch, self._waiting[kind] = items[: self._size(kind)], items[self._size(kind) :]
        self._running[self._pool.submit(self._work, batch)] = batch


Outcome = Draft | Sample | Rejection
"""Result of a stage for one draw: it goes on to the next stage, is accepted, or is refused."""


@dataclass(eq=False)
class _Request:
    """A request: its indices, and their samples and refused draws so far."""

    indices: list[int]
    samples: dict[int, Sample] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.samples) == len(self.indices)

    def generated(self) -> SampleBatch:
        refused = sorted(self.rejections, key=lambda rejection: (rejection.index, rejection.attempt))
        return SampleBatch([self.samples[index] for index in self.indices], refused)


def in_order(
    stages: BatchScheduler[Any, DrawRequest, Outcome],
    requests: Iterable[Sequence[int]],
    *,
    window: int,
    done: Callable[[int], None],
    refused: Callable[[Rejection], None],
    stopping: Callable[[], bool],
) -> Generator[SampleBatch, None, None]:
    """Yield each request's samples, in the requests' order; later ones are drawn ahead, so that batches fill.

    Args:
        stages: begins and continues draws; empty.
        requests: indices; the next request is read when its samples can be begun. An empty one says that there is none
            for now, which is allowed while another one is unanswered: the next is read when a batch has ended.
        window: samples that may be begun from the oldest unfinished one on, which bounds what is held in memory.
        done: called with the number of samples that were accepted since the last call.
        refused: called with each refused draw; an error that it raises ends the stream.
        stopping: returns whether to end with the oldest request that has been begun; later draws are dropped.
    """
    pending: deque[_Request] = deque()
    # The request of each unfinished sample, by the sample's position, the oldest first.
    owners: dict[int, _Request] = {}
    coming = _one_by_one(requests)
    position, stopped = 0, False
    while True:
        if stopping() and not stopped:
            stopped = True
            _forget_later_ones(pending, owners)
            stages.keep(owners)
            coming = _rest_of(pending, coming)
        while position - next(iter(owners), position) < window and (begun := next(coming, None)) is not None:
            request, index = begun
            if not pending or pending[-1] is not request:
                pending.append(request)
            owners[position] = request
            stages.put(DrawRequest(index=index, attempt=0, position=position))
            position += 1
        if not owners:
            return
        accepted = 0
        for item, outcome in stages.finished():
            owner = owners.get(item.position)
            if owner is None:
                continue
            if isinstance(outcome, Sample):
                owner.samples[outcome.index] = outcome
                del owners[item.position]
                accepted += 1
            elif isinstance(outcome, Rejection):
                owner.rejections.append(outcome)
                refused(outcome)
                stages.put(DrawRequest(index=item.index, attempt=item.attempt + 1, position=item.position))
            else:
                stages.put(outcome)
        if accepted:
            done(accepted)
        while pending and pending[0].complete:
            yield pending.popleft().generated()


def _forget_later_ones(pending: deque[_Request], owners: dict[int, _Request]) -> None:
    """Drop all requests but the oldest one, in place."""
    while len(pending) > 1:
        pending.pop()
    for place in [place for place, request in owners.items() if request not in pending]:
        del owners[place]


def _one_by_one(requests: Iterable[Sequence[int]]) -> Iterator[tuple[_Request, int] | None]:
    """Each index with its request, one at a time; None for an empty request."""
    for indices in requests:
        request = _Request(list(indices))
        yield from ((request, index) for index in request.indices)
        if not request.indices:
            yield None


def _rest_of(
    pending: deque[_Request], coming: Iterator[tuple[_Request, int] | None]
) -> Iterator[tuple[_Request, int] | None]:
    """The indices of the oldest request that were not begun yet."""
    last = pending[0] if pending else None
    return takewhile(lambda pair: pair is not None and pair[0] is last, coming)
