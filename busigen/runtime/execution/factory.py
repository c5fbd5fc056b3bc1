"""The dataset factory: draws shard after shard, writes each one whole, continues where a killed run stopped."""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
from polars import selectors

from busigen.errors import UsageError
from busigen.registry import SHARD_SIZE
from busigen.runtime.dataset.finalize import dataset_info
from busigen.runtime.dataset.format import MANIFEST_FILE, RUN_FILE, Plan, SampleBatch, Source, batches_of
from busigen.runtime.dataset.shards import ShardRecord, read_columns, schema_of, write_shard
from busigen.runtime.execution.estimate import ShardJob, require_room
from busigen.runtime.execution.signals import Stopping
from busigen.runtime.output.base import LocalOutput, Output
from busigen.runtime.output.ownership import run_record
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import turn
from busigen.runtime.storage.url import Address
from busigen.text import counted, duration, shell_word, unproven_line


def part_of(plan: Plan, indices: range | None = None, task: tuple[int, int] | None = None) -> Plan | None:
    """The part of a dataset that one of several commands makes in the dataset's folder; None for all of it.

    It is cut from the samples of these ``indices``, of whole shards: with ``task`` ``(K, N)`` the K-th of N parts of
    about equal size, K from 1.
    """
    part, whole = plan, plan.span
    if indices is not None:
        inside = whole.start <= indices.start and indices.stop <= whole.stop
        ends_whole = indices.stop % plan.shard_size == 0 or indices.stop == whole.stop
        if not inside or indices.start % plan.shard_size or not ends_whole:
            raise UsageError(
                f"--index-range is {indices.start}:{indices.stop}, which is not made of whole shards of the dataset.",
                fix=f"Both numbers have to be multiples of --shard-size ({plan.shard_size}); the second one may also "
                f"be --count ({whole.stop}), and none may be larger.",
            )
        part = plan.part(range(indices.start // plan.shard_size, -(-indices.stop // plan.shard_size)))
    if task is not None:
        position, tasks = task
        if tasks > part.shards:
            problem = f"--array-task {position}/{tasks}: there are only {part.shards} shards to make."
            raise UsageError(problem, fix=f"Use at most {part.shards} tasks, or a smaller --shard-size.")
        start, stop = (part.shards * border // tasks for border in (position - 1, position))
        part = part.part(part.numbers[start:stop])
    return part if indices is not None or task is not None else None


def parse_range(text: str) -> range:
    """Read ``first:end``, whose end is not part of it; a ``UsageError`` where it is none, or holds nothing."""
    # More digits than an index can have would only make Python refuse to read them.
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
    indices = range(int(found[1]), int(found[2])) if found else range(0)
    if not indices:
        problem = f"--index-range is {text!r}."
        raise UsageError(problem, fix="Give --index-range as first:end, such as 0:500 for the samples 0 to 499.")
    return indices


def parse_task(text: str) -> tuple[int, int]:
    """Read ``K/N``; a ``UsageError`` where it is none."""
    found = re.fullmatch(r"(\d{1,18})/(\d{1,18})", text, re.ASCII)
    position, tasks = (int(found[1]), int(found[2])) if found else (0, 0)
    if not 1 <= position <= tasks:
        raise UsageError(f"--array-task is {text!r}.", fix="Give --array-task as K/N with K from 1 to N, such as 1/8.")
    return position, tasks


def planned(
    count: int | None, index_range: str | None, array_task: str | None, *, seed: int, shard_size: int
) -> tuple[Plan, Plan | None]:
    """What the options ask for: the dataset in the folder, and the part of it that this command makes."""
    # With a count, the range is the part of this command; without it, the dataset.
    task = parse_task(array_task) if array_task is not None else None
    indices = parse_range(index_range) if index_range is not None else None
    if count is not None:
        plan = Plan(count=count, seed=seed, shard_size=shard_size)
    elif indices is not None:
        plan = Plan(count=len(indices), seed=seed, shard_size=shard_size, first=indices.start)
        indices = None
    else:
        problem = "neither --count nor --index-range is given."
        raise UsageError(problem, fix="Give --count, such as --count 1000; see `busigen generate --help`.")
    return plan, part_of(plan, indices, task)


_DEALT = {"asked_birads": ("BI-RADS asked for", "of"), "lesions": ("lesions an image", "with")}


@dataclass(frozen=True)
class GenerateReport:
    """What a call to ``generate`` did. Of a task that did not complete the dataset, it reports on the task's part."""

    folder: Path | Address
    samples: int
    shards: int
    written: int  # shards that this call wrote; the others were complete before
    classes: dict[str, int]  # samples of each
    rejected: dict[str, int]  # refused draws per reason
    size: int  # bytes of all shards
    seconds: float  # wall-clock time of this call
    already_complete: bool  # the dataset was finished before, and nothing was done
    missing: int = 0  # shards of other tasks that the dataset still lacks; the last of these tasks completes it
    dealt: dict[str, dict[str, int]] = field(default_factory=dict)  # samples by value, of a `_DEALT` column with any

    def lines(self, given: Sequence[str] = ()) -> Iterator[str]:
        """The lines of ``busigen generate``; ``given`` is what `busigen verify` is to be given beside the folder."""

        def counts(numbers: dict[str, int]) -> str:
            return ", ".join(f"{name} {number}" for name, number in numbers.items())

        samples = f"{counted(self.samples, 'sample')} ({counts(self.classes)})"
        if self.already_complete:
            yield f"{self.folder} is complete already: {samples}."
            return
        yield (
            f"{samples} in {self.folder}: {counted(self.shards, 'shard')}, {self.size / 1e6:.1f} MB; "
            f"{counted(self.written, 'shard')} written in {self.seconds:.1f} s"
        )
        for name, numbers in self.dealt.items():
            title, between = _DEALT[name]
            yield f"  {title}: {', '.join(f'{number} {between} {value}' for value, number in numbers.items())}"
        if self.missing:
            yield (
                f"  this task's part is complete; still to come from others: {counted(self.missing, 'shard')}; "
                "the last of them completes the dataset"
            )
        if self.rejected:
            refused = sum(self.rejected.values())
            share = refused / (refused + self.samples)
            yield f"  draws refused by the gates: {share:.1%} ({counts(dict(sorted(self.rejected.items())))})"
        if not self.missing:
            command = " ".join(("busigen verify", shell_word(self.folder), *given))
            yield f"  look at {self.folder / 'preview.png'}; check with: {command}"


def generate(
    source: Source,
    out: Path | Output,
    *,
    count: int,
    seed: int,
    shard_size: int = SHARD_SIZE,
    first: int = 0,
    part: Plan | None = None,
    make: Callable[[Source, ShardJob], None] | None = None,
    progress: Progress | None = None,
    stop: Stopping | None = None,
) -> GenerateReport:
    """Make the dataset of ``count`` accepted samples in ``out``, or finish one that the same call began earlier.

    Samples, shards and every hashed file depend on the source's fingerprint and the `Plan` alone, not on where earlier
    runs were stopped. Another count is refused like any other difference: it would change a last, short shard. ``part``
    is what this call makes of the dataset, beside others that make theirs in the same folder; None makes all, and the
    call that finds all shards there completes the dataset. ``make`` makes the shards; None does so in this process.

    Raises:
        OutputError: the place is foreign, in use, of another run, too small, not writable or not reached.
        GenerationInterrupted: ``stop``, which is asked after each shard, says so, or on Ctrl-C.
        BusigenError: whatever the source raises; complete shards are kept.
    """
    started = time.monotonic()
    progress, stop = progress or Progress(), stop or Stopping()
    plan = Plan(count=count, seed=seed, shard_size=shard_size, first=first)
    mine = part or plan
    output = out if isinstance(out, Output) else LocalOutput(out)
    schema_of(source.row_types())
    refuse_small_disk(output, plan)
    record = run_record(source, plan)
    if "unproven" in record:
        progress.note(f"unproven: {unproven_line(record['unproven'])}")
    with output.acquire(record, part) as run:
        with output_errors(output.folder):
            job = ShardJob(output, mine, output.sound(mine), progress, stop)
        kept = len(job.records)
        existing, missing, finished = _complete(source, job, run, plan, part, make or draw_missing)
        info = dataset_info(run, existing, {})
    report = GenerateReport(
        folder=output.name,
        samples=info["samples"],
        shards=len(existing),
        written=mine.shards - kept,
        classes=info["classes"],
        rejected=info["rejected"],
        size=sum(record.tar.size + record.parquet.size for record in existing),
        seconds=time.monotonic() - started,
        already_complete=finished,
        missing=missing,
        dealt={} if missing else _dealt(output.folder / MANIFEST_FILE, plan.count),
    )
    progress.event(
        "finished",
        samples=report.samples,
        shards=report.shards,
        shards_written=report.written,
        classes=report.classes,
        rejected=report.rejected,
        bytes=report.size,
        seconds=round(report.seconds, 3),
        already_complete=report.already_complete,
        shards_missing=report.missing,
    )
    return report


def _dealt(manifest: Path, rows: int) -> dict[str, dict[str, int]]:
    """How many samples got each value of what was asked for in shares; nothing where the manifest is not here."""
    if not manifest.is_file():
        return {}
    table = read_columns(manifest, rows, [selectors.by_name(*_DEALT, require_all=False)], pl.lit(True))
    counts = {one.name: one.drop_nulls().cast(pl.String).value_counts().sort(one.name).rows() for one in table}
    return {name: dict(rows) for name, rows in counts.items() if rows}


def _complete(
    source: Source,
    job: ShardJob,
    run: dict[str, Any],
    plan: Plan,
    part: Plan | None,
    make: Callable[[Source, ShardJob], None],
) -> tuple[list[ShardRecord], int, bool]:
    """Make the missing shards and, once all are there, the files that describe the whole dataset."""
    # Returns the dataset's records, or the job's if others are missing; how many are; whether it was complete before.
    output, records = job.output, job.records

    def alone() -> AbstractContextManager[None]:
        return turn(output.folder) if part else nullcontext()

    def found() -> list[ShardRecord]:
        complete = output.complete(plan) if part else records
        return [complete[number] for number in sorted(complete)]

    finished = False
    with output_errors(output.folder):
        if len(records) == job.plan.shards:
            existing = found()
            finished = len(existing) == plan.shards and output.is_finished(run, existing)
    try:
        if not finished:
            if part is None or len(records) < part.shards:
                with output_errors(output.folder), alone():
                    output.unfinish()
            try:
                make(source, job)
            finally:
                job.progress.stop()
            if len(records) < job.plan.shards:
                raise KeyboardInterrupt
        # A run that was asked to stop in its last shard is complete but for this, which takes moments.
        with output.aborting(), output_errors(output.folder), alone():
            existing = found()
            if missing := plan.shards - len(existing):
                existing = [records[number] for number in sorted(records)]
            # Two tasks may end at once.
            elif not output.is_finished(run, existing):
                output.finish(run, existing)
    except KeyboardInterrupt:
        complete = output.complete(job.plan).values()
        lost = max(0, job.progress.done - sum(record.count for record in complete))
        loss = f"; lost with the unfinished shard: {counted(lost, 'sample')} drawn by then" if lost else ""
        raise job.stop.interruption(
            f"with {len(complete)} of {counted(job.plan.shards, 'shard')} complete in {output.name}{loss}"
        ) from None
    return existing, missing, finished


def refuse_small_disk(output: Output, plan: Plan) -> None:
    """Refuse a new run that its disk cannot hold before anything is read or written; one to continue is asked later."""
    with output_errors(output.folder):
        new = not (output.folder / RUN_FILE).exists()
    if new:
        require_room(output, plan, {})


def draw_missing(source: Source, job: ShardJob) -> None:
    """Draw and write the shards that are missing until asked to stop."""
    plan, progress, types = job.plan, job.progress, source.row_types()
    opened: deque[int] = deque()
    pending: Future[ShardRecord] | None = None
    before = sum(record.count for record in job.records.values())

    def requests() -> Iterator[range]:
        for number in job.missing():
            if job.stop.requested:
                return
            opened.append(number)
            yield plan.indices(number)

    def write(number: int, batch: SampleBatch) -> ShardRecord:
        record = write_shard(job.output.folder, number, batch, types)
        job.keep(record)
        return record

    def settle() -> None:
        if pending is not None:
            with job.disk_errors():
                record = pending.result()
            job.add(record)

    def advance(samples: int) -> None:
        progress.advance(samples)
        job.advanced()

    def open_shard() -> str:
        if not opened:
            return "before the first shard" if pending is None else "the shard that is being written"
        count = len(plan.indices(opened[0]))
        # Samples of later shards may have been drawn ahead, and are counted as well.
        accepted = min(progress.done - before, count)
        left = f", about {duration((count - accepted) / progress.rate)} left" if progress.rate else ""
        return f"the open shard ({accepted} of {counted(count, 'sample')} drawn so far{left})"

    # One shard is written while the next one is drawn, so the accelerator does not wait for PNG and disk. Leaving the
    # block waits for the writer: a shard that was drawn is not thrown away because the next draw failed.
    with (
        ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer,
        job.running(open_shard),
        closing(batches_of(source, plan.seed, requests(), advance, lambda: job.stop.requested)) as stream,
    ):
        for batch in stream:
            indices = plan.indices(opened[0])
            if [sample.index for sample in batch.samples] != list(indices):
                raise ValueError(f"the source was asked for {indices} and answered with other indices")
            progress.rejected(len(batch.rejections))
            job.generated()
            settle()
            pending = writer.submit(write, opened[0], batch)
            before += len(batch.samples)
            opened.popleft()
        settle()
