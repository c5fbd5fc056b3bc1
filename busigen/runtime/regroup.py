"""Batches that are full: items wait for company of their kind, whichever shard they belong to."""

from __future__ import annotations

from collections.abc import Callable, Container, Hashable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Generic, Self, TypeVar

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")
R = TypeVar("R")


class Regrouper(Generic[K, T, R]):
    """Works on items in batches of one kind each; a part-filled one is begun only where nothing else can be.

    A few batches are worked on at once, so that what one needs of the processor before and after its engine calls
    overlaps with the engine calls of another. Items come from one thread, the one that is handed the results. Leaving
    the block waits for the batches that were begun.

    Args:
        lanes: batches that are worked on at once.
        kind: an item's kind.
        size: items that fill a batch of a kind.
        rank: of two kinds that could fill a batch, the one of the higher rank comes first.
        age: of two items, the one with the lower comes first.
        work: called in a thread of its own with a batch; what becomes of each of its items, in their order.
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
        """Have an item wait for its batch."""
        self._waiting.setdefault(self._kind(item), []).append(item)

    def keep(self, ages: Container[int]) -> None:
        """Forget waiting items of other ages than these; those that are worked on come out all the same."""
        for items in self._waiting.values():
            items[:] = [item for item in items if self._age(item) in ages]

    def finished(self) -> list[tuple[T, R]]:
        """Begin what can be begun, wait for a batch to end, and hand over its items with what became of them.

        Raises:
            Exception: what ``work`` raised.
        """
        while len(self._running) < self._lanes:
            full = [kind for kind, items in self._waiting.items() if len(items) >= self._size(kind)]
            if full:
                self._begin(max(full, key=self._rank))
            elif not self._running and any(self._waiting.values()):
                # Nothing that could still arrive would fill a batch: the oldest item is what others wait for.
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
