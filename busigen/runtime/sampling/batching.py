"""Draws between stages, and their batches: draws of one kind, from any shard, are worked on together."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import takewhile
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask, Window, edit_region, window_for
from busigen.registry import ATTRIBUTES, MAX_OUTLINES
from busigen.runtime.dataset.format import Rejection, Sample, SampleBatch
from busigen.runtime.sampling.conditions import measured
from busigen.runtime.sampling.inputs.healthy_images import Healthy
from busigen.runtime.sampling.several import numbered_row

BEGIN, OUTLINE, PAINT = range(3)  # the stages of a draw
CONCURRENT_BATCHES = 2  # while the engine computes for one, another is prepared or judged


class Kind(NamedTuple):
    """The kind of a draw, by which batches form: its next stage, and its class and window side where they matter."""

    stage: int
    label: str = ""
    side: int = 0


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """A draw that was not begun yet. ``position`` counts the samples in the order in which they were requested.

    ``group`` samples, from a multiple of it on, share their noise and are accepted or refused together.
    """

    index: int
    attempt: int
    position: int = 0
    group: int = 1

    @property
    def seeded(self) -> int:
        """The index that its noise is keyed by."""
        return self.index // self.group

    @property
    def part(self) -> int:
        """What its noise is keyed by beside index and attempt: 0 up to the end of a first lesion."""
        return 0

    @property
    def kind(self) -> Kind:
        """With which draws this one may share a batch."""
        return Kind(BEGIN)


@dataclass(frozen=True, kw_only=True)
class Draft(DrawRequest):
    """A draw that was begun; the stages fill its later fields one after the other."""

    label: str
    healthy: Healthy
    wanted: Mapping[str, float] = field(default_factory=dict)
    birads: str | None = None  # the category that is asked for
    given: Mapping[str, Any] = field(default_factory=dict)  # manifest fields of a mask that the user gave
    lesions: int = 1  # that the sample gets, one after the other
    most_lesions: int = 0  # that any sample of the run gets, where these are columns of their own
    earlier: tuple[Draft, ...] = ()  # the draft as it was when each of the lesions before this one was painted
    painted: NDArray[np.uint8] | None = None  # the image with these, unfiltered
    outlines: int = 0  # of this lesion that were refused before
    mask: Mask | None = None
    edit: Mask | None = None
    window: Window | None = None

    @property
    def kind(self) -> Kind:
        """With which draws this one may share a batch."""
        return Kind(PAINT, self.label, self.window.side) if self.window else Kind(OUTLINE, self.label)

    @property
    def part(self) -> int:
        """See `DrawRequest`."""
        return len(self.earlier) * MAX_OUTLINES + self.outlines

    @property
    def canvas(self) -> NDArray[np.uint8]:
        """What the lesion is painted into: the healthy image, or that with the sample's earlier lesions."""
        return self.healthy.pixels if self.painted is None else self.painted

    @property
    def all_lesions(self) -> tuple[Draft, ...]:
        """The draft at each of its lesions, this one included."""
        return (*self.earlier, self)

    def with_mask(self, mask: Mask, sides: Sequence[int]) -> Draft:
        """The draft with its lesion's mask, and the window, of one of these sides, in which that is painted."""
        edit = edit_region(mask, self.healthy.valid)
        return replace(self, mask=mask, edit=edit, window=window_for(edit, tuple(sides)))

    def refused(self, reason: str) -> Rejection:
        """What a quality gate makes of it."""
        return Rejection(self.index, self.attempt, self.label, reason)

    @property
    def row(self) -> dict[str, Any]:
        """The manifest fields of this lesion, of a draft that went through all stages."""
        assert self.mask is not None and self.edit is not None and self.window is not None
        found = measured(self.mask, self.healthy.valid)
        return {
            "window_top": self.window.top,
            "window_left": self.window.left,
            "window_side": self.window.side,
            "edit_pixels": int(self.edit.sum()),
            "area_share": found.pop("size"),
            **found,
            **{f"asked_{name}": self.wanted.get(name) for name in ATTRIBUTES},
        }

    def sample(self, image: NDArray[np.uint8]) -> Sample:
        """The accepted sample, of a draft all of whose lesions are painted."""
        rows = [draft.row for draft in self.all_lesions]
        masks = tuple(draft.mask for draft in self.all_lesions if draft.mask is not None)
        row = {
            **self.healthy.row,
            **rows[0],
            # No two edit regions meet.
            "edit_pixels": sum(row["edit_pixels"] for row in rows),
            "asked_birads": self.birads,
            **self.given,
            **numbered_row(self.most_lesions, masks, rows),
        }
        mask = np.logical_or.reduce(masks)
        return Sample(self.index, self.attempt, self.label, image, mask, row, self.healthy.tissue, masks)


Outcome = Draft | Sample | Rejection  # of a stage for one draw: on to the next stage, accepted or refused


class BatchScheduler:
    """Runs draws in batches of one kind each. It begins a part-filled batch only where no batch can be filled.

    One thread puts draws and takes the results; leaving the block waits for the batches that were begun. ``size`` is
    the number of draws that fill a batch of a kind; ``work`` gives a batch's outcomes, in order, in another thread.
    """

    def __init__(self, size: Callable[[Kind], int], work: Callable[[Sequence[DrawRequest]], Sequence[Outcome]]) -> None:
        self._size, self._work = size, work
        self._waiting: dict[Kind, list[DrawRequest]] = {}
        self._running: dict[Future[Sequence[Outcome]], Sequence[DrawRequest]] = {}
        self._pool = ThreadPoolExecutor(CONCURRENT_BATCHES, thread_name_prefix="stages")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def put(self, item: DrawRequest) -> None:
        """Add a draw, which waits until its batch is begun."""
        self._waiting.setdefault(item.kind, []).append(item)

    def keep(self, positions: Container[int]) -> None:
        """Drop the waiting draws of all other positions; those that are worked on already are finished all the same."""
        for items in self._waiting.values():
            items[:] = [item for item in items if item.position in positions]

    def finished(self) -> list[tuple[DrawRequest, Outcome]]:
        """Begin what can be begun, wait for a batch to end, and return its draws with outcomes, or raise."""
        while len(self._running) < CONCURRENT_BATCHES:
            if full := [kind for kind, items in self._waiting.items() if len(items) >= self._size(kind)]:
                # Draws near their end come first, because they hold memory.
                kind = max(full, key=lambda kind: kind.stage)
            elif not self._running and any(self._waiting.values()):
                # No result is outstanding that could fill a batch, and the oldest draw holds up the others.
                kind = min(
                    (kind for kind, items in self._waiting.items() if items),
                    key=lambda kind: min(item.position for item in self._waiting[kind]),
                )
            else:
                break
            items = sorted(self._waiting[kind], key=lambda item: item.position)
            batch, self._waiting[kind] = items[: self._size(kind)], items[self._size(kind) :]
            self._running[self._pool.submit(self._work, batch)] = batch
        done, _ = wait(self._running, return_when=FIRST_COMPLETED)
        batches = [(self._running.pop(future), future) for future in done]
        return [pair for items, future in batches for pair in zip(items, future.result(), strict=True)]


@dataclass(eq=False)
class _Request:
    """A request: its indices, and their samples and refused draws so far."""

    indices: list[int]
    samples: dict[int, Sample] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    def answer(self) -> SampleBatch:
        refused = sorted(self.rejections, key=lambda rejection: (rejection.index, rejection.attempt))
        return SampleBatch([self.samples[index] for index in self.indices], refused)


class _Together:
    """Holds the ends of a group's draws until all are there; where one is refused, so are the others."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: dict[int, list[tuple[DrawRequest, Outcome]]] = {}

    def ended(self, outcomes: Iterable[tuple[DrawRequest, Outcome]]) -> Iterator[tuple[DrawRequest, Outcome]]:
        for item, outcome in outcomes:
            if isinstance(outcome, Draft) or self._size == 1:
                yield item, outcome
                continue
            held = self._held.setdefault(item.index // self._size, [])
            held.append((item, outcome))
            if len(held) == self._size:
                del self._held[item.index // self._size]
                whole = all(isinstance(one, Sample) for _, one in held)
                yield from ((draw, one if whole else _with_group(one)) for draw, one in held)


def _with_group(outcome: Outcome) -> Outcome:
    """A refusal, for a sample too."""
    if isinstance(outcome, Sample):
        return Rejection(outcome.index, outcome.attempt, outcome.label, "another of its group refused")
    return outcome


def in_order(
    stages: BatchScheduler,
    requests: Iterable[Sequence[int]],
    *,
    window: int,
    done: Callable[[int], None],
    refused: Callable[[Rejection], None],
    stopping: Callable[[], bool],
    group: int = 1,
) -> Generator[SampleBatch, None, None]:
    """Yield each request's samples, in the requests' order; later ones are drawn ahead, so that batches fill.

    ``requests`` are indices; the next is read when its samples can be begun. An empty one says that there is none for
    now, while another is unanswered: the next is read when a batch has ended. ``window`` samples, from the oldest
    unfinished one on, may be begun, which bounds memory. ``done`` gets the number of newly accepted samples, and
    ``refused`` each refused draw; its error ends the stream. ``stopping``: whether to end with the oldest request. Of a
    ``group`` (see `DrawRequest`), all of which one request names and a window holds, all are refused where one is.
    """
    pending: deque[_Request] = deque()
    # The request of each unfinished sample, by the sample's position, the oldest first.
    owners: dict[int, _Request] = {}
    coming = _one_by_one(requests)
    together = _Together(group)
    position, stopped = 0, False
    while True:
        if stopping() and not stopped:
            stopped = True
            while len(pending) > 1:
                pending.pop()
            owners = {place: request for place, request in owners.items() if request in pending}
            stages.keep(owners)
            coming = _rest_of(pending[0] if pending else None, coming)
        while position - next(iter(owners), position) < window and (begun := next(coming, None)) is not None:
            request, index = begun
            if not pending or pending[-1] is not request:
                pending.append(request)
            owners[position] = request
            stages.put(DrawRequest(index=index, attempt=0, position=position, group=group))
            position += 1
        if not owners:
            return
        accepted = 0
        for item, outcome in together.ended(stages.finished()):
            if (owner := owners.get(item.position)) is None:
                continue
            if isinstance(outcome, Sample):
                owner.samples[outcome.index] = outcome
                del owners[item.position]
                accepted += 1
            elif isinstance(outcome, Rejection):
                owner.rejections.append(outcome)
                refused(outcome)
                stages.put(DrawRequest(index=item.index, attempt=item.attempt + 1, position=item.position, group=group))
            else:
                stages.put(outcome)
        if accepted:
            done(accepted)
        while pending and len(pending[0].samples) == len(pending[0].indices):
            yield pending.popleft().answer()


def of_whole_groups(
    requests: Iterable[Sequence[int]],
    group: int,
    answered: Callable[[Iterable[Sequence[int]]], Generator[SampleBatch, None, None]],
) -> Generator[SampleBatch, None, None]:
    """The answers to requests that may name parts of groups, which ``answered`` gets as whole ones."""
    waiting: deque[Sequence[int]] = deque()
    if group == 1:
        yield from answered(requests)
        return

    def whole() -> Iterator[Sequence[int]]:
        for indices in requests:
            waiting.extend([indices] if len(indices) else [])
            yield [first * group + k for first in sorted({index // group for index in indices}) for k in range(group)]

    with closing(answered(whole())) as batches:
        for batch in batches:
            wanted = waiting.popleft()
            samples = {sample.index: sample for sample in batch.samples}
            refused = set(wanted)
            yield SampleBatch(
                [samples[index] for index in wanted], [draw for draw in batch.rejections if draw.index in refused]
            )


def _one_by_one(requests: Iterable[Sequence[int]]) -> Iterator[tuple[_Request, int] | None]:
    """Each index with its request, one at a time; None for an empty request."""
    for indices in requests:
        request = _Request(list(indices))
        yield from ((request, index) for index in request.indices)
        if not request.indices:
            yield None


def _rest_of(
    request: _Request | None, coming: Iterator[tuple[_Request, int] | None]
) -> Iterator[tuple[_Request, int] | None]:
    return takewhile(lambda pair: pair is not None and pair[0] is request, coming)
