"""The dataset factory: draws shard after shard, writes each one whole, continues where a killed run stopped."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from busigen.runtime.dataset.finalize import dataset_info
from busigen.runtime.dataset.format import DEFAULT_SHARD_SIZE, RUN_FILE, Plan
from busigen.runtime.dataset.sample import SampleBatch, Source, batches_of
from busigen.runtime.dataset.shards import ShardRecord, schema_of, write_shard
from busigen.runtime.execution.estimate import Estimator, explained_when_full, require_room
from busigen.runtime.execution.partition import Share
from busigen.runtime.execution.signals import GenerationInterrupted, Stopping
from busigen.runtime.output.base import DatasetFinalizer, Output, aborting
from busigen.runtime.output.local import LocalOutput
from busigen.runtime.output.ownership import run_record
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.url import Address
from busigen.text import counted, duration, unproven_line


@dataclass(frozen=True)
class GenerateReport:
    """What a call to ``generate`` did.

    Attributes:
        folder: the dataset, a folder or a URL.
        samples: samples in the dataset; of a task that did not complete it, samples of its part.
        shards: shards, likewise.
        written: shards that this call wrote; the others were complete before.
        classes: samples per class.
        rejected: refused draws per reason, over all these samples.
        size: bytes of all these shards.
        seconds: wall-clock time of this call.
        already_complete: the dataset was finished before, and nothing was done.
        missing: shards of other tasks that the dataset still lacks; the last of these tasks completes it.
    """

    folder: Path | Address
    samples: int
    shards: int
    written: int
    classes: dict[str, int]
    rejected: dict[str, int]
    size: int
    seconds: float
    already_complete: bool
    missing: int = 0


class ShardJob(NamedTuple):
    """Shards to be made, by :func:`draw_missing` with a source of this process, or by a pool of workers.

    Attributes:
        destination: where they go.
        plan: names them.
        records: of the shards that are complete; whoever makes others adds theirs.
        progress: counts every sample.
        stop: asked before each shard whether to end here.
    """

    destination: Output
    plan: Plan
    records: dict[int, ShardRecord]
    progress: Progress
    stop: Stopping


def generate(
    source: Source,
    out: Path | Output,
    *,
    count: int,
    seed: int,
    shard_size: int = DEFAULT_SHARD_SIZE,
    first: int = 0,
    share: Share | None = None,
    make: Callable[[Source, ShardJob], None] | None = None,
    progress: Progress | None = None,
    stop: Stopping | None = None,
) -> GenerateReport:
    """Make the dataset of ``count`` accepted samples in ``out``, or finish one that the same call began earlier.

    Samples, shards and every hashed file depend on the source's fingerprint and these arguments alone, not on where
    earlier runs were stopped. A folder keeps the count that it was started with: a larger one is refused like any other
    difference, because it would change a last, short shard that may have been used already.

    Args:
        source: where samples come from.
        out: the dataset's folder, created if it does not exist, or an output elsewhere.
        count: number of samples, 1 to 10^9.
        seed: 0 to 2^64 - 1.
        shard_size: samples per shard. A killed run loses the shard being written, the one being drawn, and what a
            source has drawn ahead of it.
        first: index of the first sample, a multiple of ``shard_size``.
        share: the part that this call makes, beside others that make theirs in the same folder; None makes all. The
            call that finds all shards there completes the dataset.
        make: who makes the shards; None for this process.
        progress: counts every sample; None shows nothing.
        stop: asked after each shard whether to end here; None never ends early.

    Raises:
        UsageError: a number is out of range.
        OutputError: the place is foreign, in use, of another run, too small, not writable or not reached.
        GenerationInterrupted: ``stop`` was asked to, or on Ctrl-C.
        BusigenError: whatever the source raises; complete shards are kept.
    """
    started = time.monotonic()
    progress, stop = progress or Progress(), stop or Stopping()
    plan = Plan(count=count, seed=seed, shard_size=shard_size, first=first)
    part = share.of(plan) if share else None
    mine = part or plan
    destination = out if isinstance(out, Output) else LocalOutput(out)
    schema_of(source.row_types())
    refuse_small_disk(destination, plan)
    record = run_record(source, plan)
    if "unproven" in record:
        progress.note(f"unproven: {unproven_line(record['unproven'])}")
    with destination.acquire(record, part) as run:
        closing = DatasetFinalizer(destination, run, plan, part)
        with output_errors(destination.folder):
            records = destination.sound(mine)
            kept, finished = len(records), closing.is_done(records)
        try:
            if not finished:
                with output_errors(destination.folder):
                    closing.reopen(records)
                (make or draw_missing)(source, ShardJob(destination, mine, records, progress, stop))
                if len(records) < mine.shards:
                    raise KeyboardInterrupt
            # A run that was asked to stop in its last shard is complete but for this, which takes moments.
            with aborting(destination), output_errors(destination.folder):
                existing, missing = closing.close(records)
        except KeyboardInterrupt:
            raise _interrupted(destination, mine, progress, stop) from None
        info = dataset_info(run, existing, {})
    report = GenerateReport(
        folder=destination.name,
        samples=info["samples"],
        shards=len(existing),
        written=mine.shards - kept,
        classes=info["classes"],
        rejected=info["rejected"],
        size=sum(record.tar.size + record.parquet.size for record in existing),
        seconds=time.monotonic() - started,
        already_complete=finished,
        missing=missing,
    )
    progress.finished(report)
    return report


def refuse_small_disk(destination: Output, plan: Plan) -> None:
    """Refuse a new run that its disk cannot hold, before anything is read or written; one to continue is asked later.

    Raises:
        OutputError: the disk has no room for the plan's samples.
    """
    with output_errors(destination.folder):
        new = not (destination.folder / RUN_FILE).exists()
    if new:
        require_room(destination.folder, *destination.held(plan, {}), destination.elsewhere)


def draw_missing(source: Source, job: ShardJob) -> None:
    """Draw and write the shards that the job's ``records`` lack until asked to stop, and add them to these."""
    destination, plan, records, progress, stop = job
    types = source.row_types()
    missing = (number for number in plan.numbers if number not in records)
    opened: deque[int] = deque()
    done = sum(record.count for record in records.values())
    estimator = Estimator(destination, plan, records, progress)
    pending: Future[ShardRecord] | None = None
    before = done

    def requests() -> Iterator[range]:
        for number in missing:
            if stop.requested:
                return
            opened.append(number)
            yield plan.indices(number)

    def write(number: int, generated: SampleBatch) -> ShardRecord:
        record = write_shard(destination.folder, number, generated, types)
        destination.keep(record, kept)
        return record

    def kept(record: ShardRecord) -> None:
        progress.shard_written(record)
        estimator.written(record)

    def settle() -> None:
        if pending is not None:
            with output_errors(destination.folder), explained_when_full(destination, plan, records):
                record = pending.result()
            records[record.number] = record.counted()
            estimator.check()

    def advance(samples: int) -> None:
        progress.advance(samples)
        estimator.advanced()

    def open_shard() -> str:
        if not opened:
            return "before the first shard" if pending is None else "the shard that is being written"
        count = len(plan.indices(opened[0]))
        # Samples of later shards may have been drawn ahead, and are counted as well.
        generated = min(progress.done - before, count)
        left = f", about {duration((count - generated) / progress.rate)} left" if progress.rate else ""
        return f"the open shard ({generated} of {counted(count, 'sample')} drawn so far{left})"

    try:
        # One shard is written while the next one is drawn, so the accelerator does not wait for PNG and disk. Leaving
        # the block waits for the writer: a shard that was drawn is not thrown away because the next draw failed.
        with (
            ThreadPoolExecutor(1, thread_name_prefix="shard-writer") as writer,
            aborting(destination),
            stop.finishing(open_shard),
        ):
            progress.start("generating", plan.count, done, shards=(len(records), plan.shards))
            estimator.begin()
            with closing(batches_of(source, plan.seed, requests(), advance, lambda: stop.requested)) as stream:
                for generated in stream:
                    _check_indices(generated, plan.indices(opened[0]))
                    progress.rejected(len(generated.rejections))
                    estimator.generated()
                    settle()
                    pending = writer.submit(write, opened[0], generated)
                    before += len(generated.samples)
                    opened.popleft()
            settle()
    finally:
        progress.stop()


def _check_indices(generated: SampleBatch, indices: range) -> None:
    if [sample.index for sample in generated.samples] != list(indices):
        raise ValueError(f"the source was asked for {indices} and answered with other indices")


def _interrupted(destination: Output, plan: Plan, progress: Progress, stop: Stopping) -> GenerationInterrupted:
    kept = [record.count for record in destination.complete(plan).values()]
    lost = max(0, progress.done - sum(kept))
    loss = f"; lost with the unfinished shard: {counted(lost, 'sample')} drawn by then" if lost else ""
    return stop.interruption(
        f"with {len(kept)} of {counted(plan.shards, 'shard')} complete in {destination.name}{loss}"
    )
