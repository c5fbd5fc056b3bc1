"""A run's shards to be made, and what they will take: time by the pace so far, disk space by what is measured."""

from __future__ import annotations

import errno
import shutil
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from busigen.errors import OutputError
from busigen.runtime.dataset.format import Plan, shard_path
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.execution.signals import Stopping
from busigen.runtime.output.base import Output, Records
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import existing, output_errors
from busigen.text import counted, disk_size, duration

BYTES_PER_SAMPLE = 80_000
"""Bytes on disk per sample until a shard has been measured. In shards of ten or more, no sample takes more: 66 kB of a
grey image that does not compress, 8 kB of such a mask, 4 kB of tar headers and padding, 2 kB of rows."""

FINISH_BYTES = 4_000_000  # of files besides shards and manifest, at most: the preview of 32 tiles, 256 x 256 in colour
LARGE_BYTES = 1_000_000_000  # a run that may need more says so before its first sample; its time is known later
BATCHES_SECONDS = 120.0  # after which the samples drawn so far have to do as a measure of the pace, without a shard
_LEAST_GAPS = 2


@dataclass(frozen=True)
class Space:
    """Disk space that a plan's missing samples need."""

    samples: int  # that are missing
    per_sample: float  # bytes, without the manifest's row
    needed: int  # bytes: the missing samples, every sample's row once more for the manifest, ``FINISH_BYTES``
    measured: bool  # whether ``per_sample`` comes from this run's shards

    @classmethod
    def of(cls, plan: Plan, records: Records) -> Space:
        """Measure by the records of the shards that exist."""
        done = sum(record.count for record in records.values())
        samples = plan.count - done
        if not done:
            return cls(samples, BYTES_PER_SAMPLE, samples * BYTES_PER_SAMPLE + FINISH_BYTES, measured=False)
        rows = sum(record.parquet.size for record in records.values())
        shards = rows + sum(record.tar.size for record in records.values())
        needed = round((samples * shards + plan.count * rows) / done) + FINISH_BYTES
        return cls(samples, shards / done, needed, measured=True)

    def refusal(self, problem: str, elsewhere: str) -> OutputError:
        """The error where a disk has less than is needed; ``elsewhere`` is what to choose instead."""
        basis = "measured" if self.measured else "the most one can take, none is measured yet"
        return OutputError(
            f"{problem}, but the remaining {counted(self.samples, 'sample')} need about {disk_size(self.needed)} "
            f"({disk_size(self.per_sample)} per sample, {basis}).",
            fix=f"Free some space, then run the same command again: complete shards are kept. Or choose {elsewhere}.",
        )


@dataclass(frozen=True)
class Forecast:
    """What is left of a run."""

    space: Space
    seconds: float
    free: int | None  # bytes, where the disk is known
    basis: str  # what the pace was measured on

    def __str__(self) -> str:
        size = f"{'' if self.space.measured else 'at most '}{disk_size(self.space.needed)}"
        room = "" if self.free is None else f" of {disk_size(self.free)} free"
        return (
            f"the remaining {counted(self.space.samples, 'sample')} will take about {duration(self.seconds)} and "
            f"{size}{room}, going by {self.basis}"
        )

    def fields(self) -> dict[str, Any]:
        """What the log says of it."""
        return {
            "samples": self.space.samples,
            "seconds": round(self.seconds, 1),
            "bytes": self.space.needed,
            "bytes_per_sample": round(self.space.per_sample),
            "free_bytes": self.free,
            "basis": self.basis,
        }


def free_space(out: Path) -> int:
    """Free bytes of the disk that ``out`` lies on, or would; an ``OutputError`` where there is none, as for /proc."""
    with output_errors(out):
        place = existing(out)
        disk = shutil.disk_usage(place)
    if not disk.total:
        raise OutputError(f"{out} would lie in {place}, which is on no disk.", fix="Choose another --out.")
    return disk.free


def require_room(output: Output, plan: Plan, records: Records) -> None:
    """Raise an ``OutputError`` if the disk has no room for the plan's samples; the output's folder need not exist."""
    space, free = Space.of(*output.held(plan, records)), free_space(output.folder)
    if space.samples and free < space.needed:
        raise space.refusal(f"{output.folder} has {disk_size(free)} free", output.elsewhere)


def pace_of(out: Path, records: Records) -> float | None:
    """Seconds per sample that the shards on disk took, by when their records were written; None for too few."""
    # The median over neighbouring shards: the pause between two runs is one gap among many.
    places = {number: out / shard_path(number, "json") for number in records}
    written = {number: place.stat().st_mtime for number, place in places.items() if place.exists()}
    # A clock that was set back gives gaps below zero.
    gaps = [
        (written[number + 1] - moment) / records[number + 1].count
        for number, moment in written.items()
        if written.get(number + 1, moment) > moment
    ]
    return statistics.median(gaps) if len(gaps) >= _LEAST_GAPS else None


class ShardJob:
    """Shards to be made, by this process or by a pool of workers; calls may come from any thread.

    It forecasts the run once, as soon as there is something to go by, and has the disk checked for room. ``records``
    are those of the shards that are complete; ``stop`` is asked before each shard whether to end here.
    """

    def __init__(
        self, output: Output, plan: Plan, records: dict[int, ShardRecord], progress: Progress, stop: Stopping
    ) -> None:
        self.output, self.plan, self.records, self.progress, self.stop = output, plan, records, progress, stop
        self._lock = threading.Lock()
        self._predicted = False
        self._started = self._generated = 0.0
        self._per_sample: float | None = None

    def missing(self) -> Iterator[int]:
        """Numbers of the shards to make."""
        return (number for number in self.plan.numbers if number not in self.records)

    @contextmanager
    def running(self, open_shards: Callable[[], str]) -> Iterator[None]:
        """Count while the block makes the shards; ``open_shards`` says what a first signal lets it finish."""
        plan, records, folder = self.plan, self.records, self.output.folder
        with self.output.aborting(), self.stop.finishing(open_shards):
            done = sum(record.count for record in records.values())
            self.progress.start("generating", plan.count, done, shards=(len(records), plan.shards))
            require_room(self.output, plan, records)
            self._started = time.monotonic()
            with output_errors(folder):
                pace = pace_of(folder, records)
            space = Space.of(plan, records)
            if pace is not None:
                self._predict(pace, records, f"the pace of the {counted(len(records), 'shard')} that are there")
            elif self.output.holds_all and space.needed >= LARGE_BYTES:
                most = "about" if space.measured else "at most"
                self.progress.note(
                    f"{counted(space.samples, 'sample')} will take {most} {disk_size(space.needed)} of "
                    f"{disk_size(free_space(folder))} free; how long it takes is told once a shard is there"
                )
            yield

    @contextmanager
    def disk_errors(self) -> Iterator[None]:
        """Like ``output_errors``; for a disk that became full all the same, the error says how much is needed."""
        out, elsewhere = self.output.folder, self.output.elsewhere
        with output_errors(out):
            try:
                yield
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                full = f"Cannot write to {out}: No space left on device. {disk_size(free_space(out))} is free"
                raise Space.of(*self.output.held(self.plan, self.records)).refusal(full, elsewhere) from error

    def advanced(self) -> None:
        """Samples were drawn; before a large first shard is complete, these have to do."""
        if not self._predicted and self.progress.rate and time.monotonic() - self._started >= BATCHES_SECONDS:
            self._predict(1 / self.progress.rate, dict(self.records), "the first batches")

    def generated(self) -> None:
        """A shard was drawn, whole: its samples have been through all stages, unlike those of the first batches."""
        if self._per_sample is None and self.progress.rate:
            self._per_sample, self._generated = 1 / self.progress.rate, time.monotonic()

    def keep(self, record: ShardRecord) -> None:
        """Hand over a shard that was written to the output's folder."""
        self.output.keep(record)
        self.progress.shard_written(record)
        if self._per_sample is not None and not self._predicted:
            # Shards are drawn and written at the same time, so the slower of the two sets the pace.
            pace = max(self._per_sample, (time.monotonic() - self._generated) / record.count)
            self._predict(pace, {**self.records, record.number: record}, "the first shard of this run")

    def add(self, record: ShardRecord) -> None:
        """Count a shard that was kept as complete; see that there is room for the others."""
        self.records[record.number] = record.counted()
        require_room(self.output, self.plan, self.records)

    def _predict(self, pace: float, records: Records, basis: str) -> None:
        with self._lock:
            if self._predicted:
                return
            self._predicted = True
        space = Space.of(self.plan, records)
        if space.samples:
            free = free_space(self.output.folder) if self.output.holds_all else None
            self.progress.predicted(Forecast(space, space.samples * pace, free, basis))
