"""The log of a run for programs: one JSON object per line and event. ``docs/progress.md`` lists events and keys."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from busigen.errors import BusigenError, OutputError, UsageError
from busigen.runtime.execution.signals import GenerationInterrupted, Stopping
from busigen.runtime.progress import LINE_SECONDS, Progress, console_progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.url import Address
from busigen.text import printable, without_credentials

if TYPE_CHECKING:
    from busigen.runtime.dataset.shards import ShardRecord
    from busigen.runtime.execution.estimate import Forecast
    from busigen.runtime.execution.factory import GenerateReport


log = logging.getLogger("busigen.runtime")

STDOUT = "-"
"""What ``--log-json`` is given for standard output."""


class EventLog:
    """Writes events, each at once and whole. As a context manager it logs the error that ends its block, and closes.

    A log that can no longer be written is given up with one warning: it is no reason to end a run.

    Args:
        file: where to; closed at the end unless it is standard output.
    """

    def __init__(self, file: IO[str]) -> None:
        self._file: IO[str] | None = file
        self._lock = threading.Lock()
        self._started = time.monotonic()

    @classmethod
    def open(cls, target: str, *, out: Path | Address) -> EventLog:
        """Append to the file ``target``, or write to standard output for ``-``.

        A pipe will do if somebody reads from it, and so will a terminal; one that takes no more is not waited for.

        Raises:
            UsageError: the file lies in the dataset ``out``, which holds nothing but its own files.
            OutputError: the file cannot be written.
        """
        if target == STDOUT:
            return cls(sys.stdout)
        path = Path(target)
        if isinstance(out, Path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UsageError(f"--log-json {path} lies in --out {out}.", fix="Choose a file outside of the dataset.")
        with output_errors(path):
            return cls(open(path, "a", encoding="utf-8", opener=_opened))

    def emit(self, event: str, **fields: Any) -> None:
        """Write one event; its time and the seconds since the log was opened are added."""
        with self._lock:
            if self._file is None:
                return
            head = {
                "event": event,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "elapsed": round(time.monotonic() - self._started, 3),
            }
            # In ASCII: it may go to a terminal.
            line = without_credentials(json.dumps({**head, **fields}, allow_nan=False))
            try:
                self._file.write(f"{line}\n")
                self._file.flush()
            except OSError as error:
                self._give_up(self._file)
                log.warning("--log-json ends here, it cannot be written: %s", error.strerror or error)

    def _give_up(self, file: IO[str]) -> None:
        self._file = None
        with contextlib.suppress(OSError):
            if file is sys.stdout:
                # Python flushes it once more at exit, which would end a finished run with an error.
                os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())
            else:
                file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, GenerationInterrupted):
            self.emit("interrupted", signal=error.signal, **_reported(error))
        elif isinstance(error, BusigenError):
            self.emit("failed", error=type(error).__name__, **_reported(error))
        elif error is not None:
            self.emit("failed", error=type(error).__name__, message=str(error), fix="", exit_code=1)
        if self._file is not None and self._file is not sys.stdout:
            self._file.close()


class LoggedProgress(Progress):
    """Logs what happens and passes everything on to a progress that is shown to a person.

    Args:
        shown: for the person.
        events: for the programs.
    """

    def __init__(self, shown: Progress, events: EventLog) -> None:
        self.shown, self.events = shown, events
        self._last = float("-inf")
        self._logged: tuple[object, ...] | None = None
        super().__init__()

    def start(
        self, what: str, total: int, done: int = 0, *, unit: str = "sample", shards: tuple[int, int] = (0, 0)
    ) -> None:
        """See :class:`Progress`."""
        self._last = float("-inf")
        super().start(what, total, done, unit=unit, shards=shards)
        self.shown.start(what, total, done, unit=unit, shards=shards)

    def advance(self, samples: int) -> None:
        """See :class:`Progress`."""
        super().advance(samples)
        self.shown.advance(samples)

    def rejected(self, draws: int) -> None:
        """See :class:`Progress`."""
        super().rejected(draws)
        self.shown.rejected(draws)

    def shard_written(self, record: ShardRecord) -> None:
        """See :class:`Progress`."""
        super().shard_written(record)
        self.events.emit(
            "shard_written",
            number=record.number,
            file=record.tar.file,
            samples=record.count,
            bytes=record.tar.size + record.parquet.size,
            sha256=record.tar.sha256,
            shards_done=self.shards_done,
            shards=self.shards,
        )
        self.shown.shard_written(record)

    def engine(self, stage_seconds: Callable[[], Mapping[str, float]]) -> None:
        """See :class:`Progress`."""
        super().engine(stage_seconds)
        self.shown.engine(stage_seconds)

    def began(self, facts: Mapping[str, Any]) -> None:
        """See :class:`Progress`."""
        self.events.emit("started", **facts)
        self.shown.began(facts)

    def predicted(self, forecast: Forecast) -> None:
        """See :class:`Progress`."""
        self.events.emit(
            "predicted",
            samples=forecast.space.samples,
            seconds=round(forecast.seconds, 1),
            bytes=forecast.space.needed,
            bytes_per_sample=round(forecast.space.per_sample),
            free_bytes=forecast.free,
            basis=forecast.basis,
        )
        self.shown.predicted(forecast)

    def finished(self, report: GenerateReport) -> None:
        """See :class:`Progress`."""
        self.events.emit(
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
        self.shown.finished(report)

    def note(self, text: str) -> None:
        """See :class:`Progress`."""
        self.shown.note(text)

    def stop(self) -> None:
        """See :class:`Progress`."""
        with self._lock:
            if self.total and self._logged != self._state():
                self._emit()
        self.shown.stop()

    def _show(self) -> None:
        if self.total and time.monotonic() - self._last >= LINE_SECONDS:
            self._emit()

    def _state(self) -> tuple[object, ...]:
        return self.what, self.done, self.refused, self.shards_done

    def _emit(self) -> None:
        self._last, self._logged = time.monotonic(), self._state()
        self.events.emit(
            "progress",
            task=self.what,
            unit=self.unit,
            done=self.done,
            total=self.total,
            per_second=_rounded(self.rate),
            per_second_now=_rounded(self.rate_now),
            seconds_left=_rounded(self.left, 1),
            rejected=self.refused,
            acceptance=_rounded(self.acceptance, 4),
            shards_done=self.shards_done,
            shards=self.shards,
            stages={stage: round(share, 4) for stage, share in self.stage_shares.items()},
        )


def _opened(path: str, flags: int) -> int:
    """Open a file to write to that may be a pipe or a device, without ever waiting for it.

    Raises:
        OutputError: it is a pipe or a socket that nobody reads from.
        OSError: it cannot be opened.
    """
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise OutputError(
            f"--log-json {printable(path)} is a pipe that nobody reads from.", fix="Start its reader first."
        ) from error


def _reported(error: BusigenError) -> dict[str, Any]:
    return {"message": error.problem, "fix": error.fix, "exit_code": error.exit_code}


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


@contextmanager
def supervised(out: Path | Address, log_json: str | None) -> Iterator[tuple[Progress, Stopping]]:
    """Show, log and stop what the block runs.

    Args:
        out: the dataset's folder or URL.
        log_json: file to append events to, ``-`` for standard output, or None for no log.

    Raises:
        UsageError: the log lies in the dataset.
        OutputError: the log cannot be written.
        GenerationInterrupted: on Ctrl-C or SIGTERM.
    """
    with ExitStack() as stack:
        # Outermost, so that it hears of whatever error ends the run, an interruption included.
        events = stack.enter_context(EventLog.open(log_json, out=out)) if log_json else None
        progress = stack.enter_context(console_progress())
        if events:
            progress = stack.enter_context(LoggedProgress(progress, events))
        yield progress, stack.enter_context(Stopping(progress.note))
