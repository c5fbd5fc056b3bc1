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
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, Self

from busigen.errors import BusigenError, OutputError, UsageError
from busigen.runtime.execution.signals import GenerationInterrupted, Stopping
from busigen.runtime.progress import Observer, Progress, console_progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.url import Address
from busigen.text import printable, without_credentials

log = logging.getLogger("busigen.runtime")


class EventLog(Observer):
    """Writes events, each at once and whole; a context manager that logs its block's error; given up if unwritable."""

    def __init__(self, file: IO[str]) -> None:
        super().__init__()
        self._file: IO[str] | None = file
        self._lock = threading.Lock()
        self._started = time.monotonic()

    @classmethod
    def open(cls, target: str, *, out: Path | Address) -> EventLog:
        """Append to the file ``target``, outside of the dataset ``out``, or write to standard output for ``-``."""
        # A pipe will do if somebody reads from it, and so will a terminal; one that takes no more is not waited for.
        if target == "-":
            return cls(sys.stdout)
        path = Path(target)
        if isinstance(out, Path) and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(out)):
            raise UsageError(f"--log-json {path} lies in --out {out}.", fix="Choose a file outside of the dataset.")
        with output_errors(path):
            return cls(open(path, "a", encoding="utf-8", opener=_opened))

    def event(self, event: str, **fields: Any) -> None:
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
                with contextlib.suppress(OSError):
                    if self._file is sys.stdout:
                        # Python flushes it once more at exit, which would end a finished run with an error.
                        os.dup2(os.open(os.devnull, os.O_WRONLY), self._file.fileno())
                    else:
                        self._file.close()
                self._file = None
                log.warning("--log-json ends here, it cannot be written: %s", error.strerror or error)

    def report(self, progress: Progress) -> None:
        """Write how far the count is."""
        self.event(
            "progress",
            task=progress.what,
            unit=progress.unit,
            done=progress.done,
            total=progress.total,
            per_second=_rounded(progress.rate),
            per_second_now=_rounded(progress.rate_now),
            seconds_left=_rounded(progress.left, 1),
            rejected=progress.refused,
            acceptance=_rounded(progress.acceptance, 4),
            shards_done=progress.shards_done,
            shards=progress.shards,
            stages={stage: round(share, 4) for stage, share in progress.stage_shares.items()},
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, BusigenError):
            ended = {"message": error.problem, "fix": error.fix, "exit_code": error.exit_code}
            if isinstance(error, GenerationInterrupted):
                self.event("interrupted", signal=error.signal, **ended)
            else:
                self.event("failed", error=type(error).__name__, **ended)
        elif error is not None:
            self.event("failed", error=type(error).__name__, message=str(error), fix="", exit_code=1)
        if self._file is not None and self._file is not sys.stdout:
            self._file.close()


def _opened(path: str, flags: int) -> int:
    """Open a file to write to that may be a pipe or a device, without ever waiting for it."""
    try:
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0), 0o666)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        problem = f"--log-json {printable(path)} is a pipe that nobody reads from."
        raise OutputError(problem, fix="Start its reader first.") from error


def _rounded(value: float | None, digits: int = 3) -> float | None:
    return None if value is None else round(value, digits)


@contextmanager
def supervised(out: Path | Address, log_json: str | None) -> Iterator[tuple[Progress, Stopping]]:
    """Show, log and stop what the block runs; raises as `EventLog.open`, or a GenerationInterrupted."""
    with ExitStack() as stack:
        # Outermost, so that it hears of whatever error ends the run, an interruption included.
        logs = [stack.enter_context(EventLog.open(log_json, out=out))] if log_json else []
        progress = stack.enter_context(console_progress(*logs))
        yield progress, stack.enter_context(Stopping(progress.note))
