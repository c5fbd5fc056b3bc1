"""Which of a dataset's shards one command makes: all of them, or one task's part."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from busigen.errors import UsageError
from busigen.runtime.dataset.format import Plan

_RANGE = "Give --index-range as first:end, such as 0:500 for the samples 0 to 499."
_TASK = "Give --array-task as K/N with K from 1 to N, such as 1/8."


@dataclass(frozen=True)
class Share:
    """A part of a dataset that several tasks make in one folder.

    Attributes:
        indices: samples that the part is cut from; None for all of the dataset.
        task: ``(K, N)``: of these, the K-th of N parts of about equal size, K from 1; None for all of them.
    """

    indices: range | None = None
    task: tuple[int, int] | None = None

    def of(self, plan: Plan) -> Plan | None:
        """The part of a dataset's plan; None if it is the whole dataset, made by one command.

        Raises:
            UsageError: the range is not made of the dataset's shards, or there are more tasks than shards.
        """
        part = plan if self.indices is None else _cut(plan, self.indices)
        if self.task is not None:
            position, tasks = self.task
            if tasks > part.shards:
                raise UsageError(
                    f"--array-task {position}/{tasks}: there are only {part.shards} shards to make.",
                    fix=f"Use at most {part.shards} tasks, or a smaller --shard-size.",
                )
            start, stop = (part.shards * border // tasks for border in (position - 1, position))
            part = part.part(part.numbers[start:stop])
        return None if self == Share() else part


def parse_range(text: str) -> range:
    """Read ``first:end``; the end is not part of it.

    Raises:
        UsageError: it is none, or holds nothing.
    """
    # More digits than an index can have would only make Python refuse to read them.
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
    indices = range(int(found[1]), int(found[2])) if found else range(0)
    if not indices:
        raise UsageError(f"--index-range is {text!r}.", fix=_RANGE)
    return indices


def parse_task(text: str) -> tuple[int, int]:
    """Read ``K/N``.

    Raises:
        UsageError: it is no such thing.
    """
    found = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
    position, tasks = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= position <= tasks:
        raise UsageError(f"--array-task is {text!r}.", fix=_TASK)
    return position, tasks


def planned(
    count: int | None, index_range: str | None, array_task: str | None, *, seed: int, shard_size: int
) -> tuple[Plan, Share]:
    """What the options ask for: the dataset in the folder, and which part of it this command makes.

    ``count`` is how many samples the dataset has. With it, ``index_range`` is the part that this command makes; without
    it, the dataset is that range.

    Raises:
        UsageError: an option is missing, out of range, or no range of whole shards.
    """
    task = parse_task(array_task) if array_task is not None else None
    indices = parse_range(index_range) if index_range is not None else None
    if count is not None:
        share = Share(indices, task)
        plan = Plan(count=count, seed=seed, shard_size=shard_size)
    elif indices is not None:
        share = Share(None, task)
        plan = Plan(count=len(indices), seed=seed, shard_size=shard_size, first=indices.start)
    else:
        raise UsageError(
            "neither --count nor --index-range is given.",
            fix="Give --count, such as --count 1000; see `busigen generate --help`.",
        )
    share.of(plan)
    return plan, share


def describe_share(out: Path, part: Plan) -> str:
    """A part of a dataset in a message."""
    return f"the samples {part.span[0]} to {part.span[-1]} of {out}"


def _cut(plan: Plan, indices: range) -> Plan:
    inside = plan.span.start <= indices.start and indices.stop <= plan.span.stop
    ends_whole = indices.stop % plan.shard_size == 0 or indices.stop == plan.span.stop
    if not inside or indices.start % plan.shard_size or not ends_whole:
        raise UsageError(
            f"--index-range is {indices.start}:{indices.stop}, which is not made of whole shards of the dataset.",
            fix=f"Both numbers have to be multiples of --shard-size ({plan.shard_size}); the second one may also be "
            f"--count ({plan.span.stop}), and none may be larger.",
        )
    return plan.part(range(indices.start // plan.shard_size, -(-indices.stop // plan.shard_size)))
