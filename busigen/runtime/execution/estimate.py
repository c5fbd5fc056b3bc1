"""What a run will take, before it has: time by the pace so far, disk space by what its samples have measured."""

from __future__ import annotations

import errno
import shutil
import statistics
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from busigen.errors import OutputError
from busigen.runtime.dataset.format import Plan, shard_path
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.output.base import Output
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.text import counted, disk_size, duration

BYTES_PER_SAMPLE = 80_000
"""Disk space per sample until a shard has been measured, in bytes. In shards of ten or more, no sample takes more:
66 kB of a grey image that does not compress at all, 8 kB of such a mask, 4 kB of tar headers and padding, 2 kB of rows.
The shipped bundle's samples take 41 kB.
"""

FINISH_BYTES = 4_000_000
"""Disk space that the files besides shards and manifest take at most, in bytes: nearly all of it is the preview,
32 tiles of 65,536 pixels in colour. The shipped bundle's takes 1.1 MB.
"""

LARGE_BYTES = 1_000_000_000
"""A run that may need more disk space than this says so before its first sample; the time it takes is known later."""

BATCHES_SECONDS = 120.0
"""Seconds after which the samples drawn so far have to do as a measure of the pace, if no shard is complete by then."""

_LEAST_GAPS = 2

Records = Mapping[int, ShardRecord]


@dataclass(frozen=True)
class Space:
    """Disk space that a plan's missing samples need.

    Attributes:
        samples: that are missing.
        per_sample: bytes, without the manifest's row.
        needed: bytes in all: the missing samples, every sample's row once more for the manifest, ``FINISH_BYTES``.
        measured: whether ``per_sample`` comes from this run's shards rather than from ``BYTES_PER_SAMPLE``.
    """

    samples: int
    per_sample: float
    needed: int
    measured: bool

    @classmethod
    def of(cls, plan: Plan, records: Records) -> Space:
        """Measure by the records of the shards that exist."""
        done = sum(record.count for record in records.values())
        samples = plan.count - done
        if not done:
            return cls(samples, BYTES_PER_SAMPLE, samples * BYTES_PER_SAMPLE + FINISH_BYTES, measured=False)
        shards = sum(record.tar.size + record.parquet.size for record in records.values())
        rows = sum(record.parquet.size for record in records.values())
        needed = round((samples * shards + plan.count * rows) / done) + FINISH_BYTES
        return cls(samples, shards / done, needed, measured=True)

    @property
    def basis(self) -> str:
        """The figure that ``needed`` rests on, in words."""
        origin = "measured" if self.measured else "the most one can take, none is measured yet"
        return f"{disk_size(self.per_sample)} per sample, {origin}"


@dataclass(frozen=True)
class Forecast:
    """What is left of a run, as far as it is known.

    Attributes:
        space: that the samples which are still to come take.
        seconds: that they take.
        free: bytes that the output's disk has free now; None where they go elsewhere.
        basis: what the pace was measured on.
    """

    space: Space
    seconds: float
    free: int | None
    basis: str

    def __str__(self) -> str:
        size = f"{'' if self.space.measured else 'at most '}{disk_size(self.space.needed)}"
        room = "" if self.free is None else f" of {disk_size(self.free)} free"
        return (
            f"the remaining {counted(self.space.samples, 'sample')} will take about {duration(self.seconds)} and "
            f"{size}{room}, going by {self.basis}"
        )


def free_space(out: Path) -> int:
    """Free bytes of the disk that ``out`` lies on, or would.

    Raises:
        OutputError: the disk cannot be asked, or there is none: /proc and its like hold no files.
    """
    with output_errors(out):
        place = out.absolute()
        while not place.exists():
            place = place.parent
        disk = shutil.disk_usage(place)
    if not disk.total:
        raise OutputError(f"{out} would lie in {place}, which is on no disk.", fix="Choose another --out.")
    return disk.free


def require_room(out: Path, plan: Plan, records: Records, elsewhere: str = Output.elsewhere) -> None:
    """Refuse early what would fail hours later; nothing is written.

    Args:
        out: the dataset's folder, which need not exist.
        plan: of the run.
        records: of the shards that exist.
        elsewhere: what to choose where there is none.

    Raises:
        OutputError: the disk has no room for the samples that are still to come.
    """
    space, free = Space.of(plan, records), free_space(out)
    if space.samples and free < space.needed:
        raise _too_small(f"{out} has {disk_size(free)} free", space, elsewhere)


@contextmanager
def explained_when_full(destination: Output, plan: Plan, records: Records) -> Iterator[None]:
    """Have a disk that became full all the same say how much is needed.

    Raises:
        OutputError: the block found no space left.
    """
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        out = destination.folder
        full = f"Cannot write to {out}: No space left on device. {disk_size(free_space(out))} is free"
        raise _too_small(full, Space.of(*destination.held(plan, records)), destination.elsewhere) from error


def pace_of(out: Path, records: Records) -> float | None:
    """Seconds per sample that the shards on disk took, by when their records were written; None for too few.

    The median over neighbouring shards: the pause between two runs is one gap among many. Shards that are complete
    elsewhere tell nothing.
    """
    places = {number: out / shard_path(number, "json") for number in records}
    written = {number: place.stat().st_mtime for number, place in places.items() if place.exists()}
    gaps = [
        (written[number + 1] - written[number]) / records[number + 1].count
        for number in written
        if number + 1 in written
    ]
    # A clock that was set back gives gaps below zero.
    gaps = [gap for gap in gaps if gap > 0]
    return statistics.median(gaps) if len(gaps) >= _LEAST_GAPS else None


class Estimator:
    """Watches one run: forecasts it once, as soon as there is something to go by, and has the disk checked for room.

    Calls may come from any thread.

    Args:
        destination: where the shards go.
        plan: of the run.
        records: of the complete shards; the caller adds to them.
        progress: shows the forecast.
    """

    def __init__(self, destination: Output, plan: Plan, records: Records, progress: Progress) -> None:
        self.destination, self.plan, self.records, self.progress = destination, plan, records, progress
        self._lock = threading.Lock()
        self._reported = False
        self._started = time.monotonic()
        self._per_sample: float | None = None
        self._generated = 0.0

    def begin(self) -> None:
        """Check the disk before the first shard; a run that is continued has a pace already.

        Raises:
            OutputError: the disk has no room for the samples that are still to come.
        """
        self.check()
        self._started = time.monotonic()
        with output_errors(self.destination.folder):
            pace = pace_of(self.destination.folder, self.records)
        if pace is not None:
            self._tell(pace, self.records, f"the pace of the {counted(len(self.records), 'shard')} that are there")
        elif self.destination.holds_all:
            self._tell_size()

    def check(self) -> None:
        """See :func:`require_room`."""
        require_room(
            self.destination.folder, *self.destination.held(self.plan, self.records), self.destination.elsewhere
        )

    def advanced(self) -> None:
        """Samples were drawn; before a large first shard is complete, these have to do."""
        if not self._reported and self.progress.rate and time.monotonic() - self._started >= BATCHES_SECONDS:
            self._tell(1 / self.progress.rate, dict(self.records), "the first batches")

    def generated(self) -> None:
        """A shard was drawn, whole: its samples have been through all stages, unlike those of the first batches."""
        if self._per_sample is None and self.progress.rate:
            self._per_sample, self._generated = 1 / self.progress.rate, time.monotonic()

    def written(self, record: ShardRecord) -> None:
        """A shard is complete on disk; it need not be in ``records`` yet."""
        if self._per_sample is not None and not self._reported:
            # Shards are drawn and written at the same time, so the slower of the two sets the pace.
            pace = max(self._per_sample, (time.monotonic() - self._generated) / record.count)
            self._tell(pace, {**self.records, record.number: record}, "the first shard of this run")

    def _tell_size(self) -> None:
        """Say before the first sample what a large run may take of the disk: its pace is not known yet."""
        space = Space.of(self.plan, self.records)
        if space.needed >= LARGE_BYTES:
            most = "about" if space.measured else "at most"
            self.progress.note(
                f"{counted(space.samples, 'sample')} will take {most} {disk_size(space.needed)} of "
                f"{disk_size(free_space(self.destination.folder))} free; "
                "how long it takes is told once a shard is there"
            )

    def _tell(self, pace: float, records: Records, basis: str) -> None:
        with self._lock:
            if self._reported:
                return
            self._reported = True
        space = Space.of(self.plan, records)
        if space.samples:
            free = free_space(self.destination.folder) if self.destination.holds_all else None
            self.progress.predicted(Forecast(space, space.samples * pace, free, basis))


def _too_small(problem: str, space: Space, elsewhere: str) -> OutputError:
    return OutputError(
        f"{problem}, but the remaining {counted(space.samples, 'sample')} need about {disk_size(space.needed)} "
        f"({space.basis}).",
        fix=f"Free some space, then run the same command again: complete shards are kept. Or choose {elsewhere}.",
    )
