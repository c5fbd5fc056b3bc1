"""Progress of a long run: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from busigen.runtime.wording import duration

LINE_SECONDS = 10.0
"""Seconds between two lines where no terminal shows a bar."""


class Progress:
    """Counts samples; this base class shows nothing.

    Use as a context manager around ``start`` so that a bar is taken down whatever happens. Calls may come from any
    thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._advanced = self._longest_wait = 0.0
        self._begin("", 0, 0)
        self.unit = "sample"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self, what: str, total: int, done: int = 0, *, unit: str = "sample") -> None:
        """Begin to count: ``done`` of ``total`` samples exist already and do not count towards the rate.

        ``unit`` names one of what is counted.
        """
        with self._lock:
            self._begin(what, total, done)
            self.unit = unit
            self._show()

    def advance(self, samples: int) -> None:
        """Add finished samples."""
        with self._lock:
            now = time.monotonic()
            self._longest_wait = max(self._longest_wait, now - self._advanced)
            self._advanced = now
            self.done += samples
            self._show()

    def rejected(self, draws: int) -> None:
        """Add draws that the quality gates refused."""
        with self._lock:
            self.refused += draws
            self._show()

    def stop(self) -> None:
        """Show the last state and release the terminal; may be called twice."""

    @property
    def rate(self) -> float:
        """Samples per second since the start."""
        return (self.done - self._resumed) / max(time.monotonic() - self._started, 1e-9)

    @property
    def acceptance(self) -> float | None:
        """Share of draws that were accepted, 0 to 1; None before any was refused."""
        fresh = self.done - self._resumed
        return fresh / (fresh + self.refused) if self.refused else None

    @property
    def left(self) -> float | None:
        """Seconds that remain, about; None before the first samples are done, and when all are.

        The rate is that of accepted samples, so it includes the draws that were refused. What is left takes one batch
        more at least, however few samples it is for: never less than the longest wait for a batch so far.
        """
        if self.done <= self._resumed or self.done >= self.total:
            return None
        return max((self.total - self.done) / self.rate, self._longest_wait)

    def _begin(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done, self.refused = what, total, done, 0
        self._resumed, self._started = done, time.monotonic()
        self._advanced, self._longest_wait = self._started, 0.0

    def _show(self) -> None:
        """Called under the lock after every change."""

    def _summary(self) -> str:
        """Rate, acceptance and remaining time; empty as long as there is nothing to tell."""
        if self.done <= self._resumed:
            return ""
        rate, accepted, left = self.rate, self.acceptance, self.left
        parts = [f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s per {self.unit}"]
        parts += [f"{accepted:.1%} accepted"] if accepted is not None else []
        parts += [f"{duration(left)} left"] if left is not None else []
        return ", ".join(parts)


class BarProgress(Progress):
    """A bar with rate, remaining time and acceptance rate."""

    def __init__(self, console: Console) -> None:
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}"),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, summary="")
        super().__init__()

    def start(self, what: str, total: int, done: int = 0, *, unit: str = "sample") -> None:
        """Begin to count and put up the bar."""
        super().start(what, total, done, unit=unit)
        self._bar.reset(self._task, total=total, completed=done, description=what, summary="")
        self._bar.start()

    def stop(self) -> None:
        """Take the bar down."""
        self._bar.stop()

    def _show(self) -> None:
        self._bar.update(self._task, completed=self.done, summary=self._summary())


class LineProgress(Progress):
    """One line at the start, one every ``LINE_SECONDS``, one at the end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = 0.0
        self._printed: tuple[int, int] | None = None
        super().__init__()

    def start(self, what: str, total: int, done: int = 0, *, unit: str = "sample") -> None:
        """Begin to count; what was counted before gets its last line."""
        self.stop()
        self._last = float("-inf")
        super().start(what, total, done, unit=unit)

    def stop(self) -> None:
        """Print the last state, unless it has been printed."""
        with self._lock:
            if self._printed != (self.done, self.refused):
                self._print()

    def _show(self) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._print()

    def _print(self) -> None:
        # Before the first start there is nothing to count, and of an empty folder there never is.
        if not self.total:
            return
        self._last, self._printed = time.monotonic(), (self.done, self.refused)
        summary = self._summary()
        line = f"{self.what}: {self.done}/{self.total}"
        self._console.print(f"{line}, {summary}" if summary else line, highlight=False, soft_wrap=True)


def console_progress() -> Progress:
    """Progress on stderr, so that stdout stays free for results: a bar on a terminal, else lines."""
    console = Console(file=sys.stderr)
    return BarProgress(console) if console.is_terminal else LineProgress(console)
