"""Samples in the order in which they are wanted, out of draws that pass the stages in any order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from busigen.runtime.drafts import Draft, Job
from busigen.runtime.regroup import Regrouper
from busigen.runtime.sample import Drawn, Rejection, Sample

Outcome = Draft | Sample | Rejection
"""What becomes of a draw in a stage: it goes on, is accepted, or is refused."""


@dataclass(eq=False)
class _Request:
    """Indices that were asked for together, and what they have got so far."""

    indices: list[int]
    samples: dict[int, Sample] = field(default_factory=dict)
    rejections: list[Rejection] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        return len(self.samples) == len(self.indices)

    def drawn(self) -> Drawn:
        refused = sorted(self.rejections, key=lambda rejection: (rejection.index, rejection.attempt))
        return Drawn([self.samples[index] for index in self.indices], refused)


def in_order(
    stages: Regrouper[Any, Job, Outcome],
    requests: Iterable[Sequence[int]],
    *,
    window: int,
    done: Callable[[int], None],
    refused: Callable[[Rejection], None],
    stopping: Callable[[], bool],
) -> Generator[Drawn, None, None]:
    """Answer requests in their order, drawing ahead of the oldest one so that batches fill across requests.

    Args:
        stages: begins and continues draws; empty.
        requests: indices; the next request is asked for when its samples can be begun. An empty one says that there is
            none for now, which is allowed as long as one is unanswered: it is asked again when a batch has ended.
        window: samples that may be begun from the oldest unfinished one on, which bounds what is held in memory.
        done: told how many more samples have been accepted.
        refused: told each refusal; what it raises ends the stream.
        stopping: whether to end with the oldest request that has been begun; what was drawn ahead of it is dropped.
    """
    pending: deque[_Request] = deque()
    # Whose request each unfinished sample is for, by its position, the oldest first.
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
            stages.put(Job(index=index, attempt=0, position=position))
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
                stages.put(Job(index=item.index, attempt=item.attempt + 1, position=item.position))
            else:
                stages.put(outcome)
        if accepted:
            done(accepted)
        while pending and pending[0].complete:
            yield pending.popleft().drawn()


def _forget_later_ones(pending: deque[_Request], owners: dict[int, _Request]) -> None:
    """Leave the oldest request alone."""
    while len(pending) > 1:
        pending.pop()
    for place in [place for place, request in owners.items() if request not in pending]:
        del owners[place]


def _one_by_one(requests: Iterable[Sequence[int]]) -> Iterator[tuple[_Request, int] | None]:
    """Every index with its request; None where there is none for now."""
    for indices in requests:
        request = _Request(list(indices))
        yield from ((request, index) for index in request.indices)
        if not request.indices:
            yield None


def _rest_of(
    pending: deque[_Request], coming: Iterator[tuple[_Request, int] | None]
) -> Iterator[tuple[_Request, int] | None]:
    """What is still to come of the oldest request."""
    last = pending[0] if pending else None
    return takewhile(lambda pair: pair is not None and pair[0] is last, coming)
