"""Progress of a long run: a bar on a terminal, a plain line now and then in a log."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.console import RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from busigen.terminal import Terminal, shown
from busigen.text import duration

if TYPE_CHECKING:
    from busigen.runtime.dataset.shards import ShardRecord
    from busigen.runtime.execution.estimate import Forecast
    from busigen.runtime.execution.factory import GenerateReport

LINE_SECONDS = 10.0
"""Seconds between two lines where no terminal shows a bar."""

NOW_SECONDS = 60.0
"""Seconds that the rate of "now" looks back: a few batches of a slow machine."""

LONG_SECONDS = 60.0
"""A run that will take longer than this shows its forecast; the others are over before it is read."""


class Progress:
    """Counts samples; this base class shows nothing.

    Use as a context manager around ``start`` so that a bar is taken down whatever happens. Calls may come from any
    thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage_seconds: Callable[[], Mapping[str, float]] = dict
        self._advanced = self._longest_wait = 0.0
        self._begin("", 0, 0)
        self.unit = "sample"
        self.shards_done = self.shards = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self, what: str, total: int, done: int = 0, *, unit: str = "sample", shards: tuple[int, int] = (0, 0)
    ) -> None:
        """Begin to count: ``done`` of ``total`` samples exist already and do not count towards the rate.

        ``unit`` names one of what is counted; ``shards`` is how many exist and how many there will be, if it is shards
        that are written.
        """
        with self._lock:
            self._begin(what, total, done)
            self.unit = unit
            self.shards_done, self.shards = shards
            self._show()

    def advance(self, samples: int) -> None:
        """Add finished samples."""
        with self._lock:
            now = time.monotonic()
            self._longest_wait = max(self._longest_wait, now - self._advanced)
            self._advanced = now
            self.done += samples
            self._recent.append((now, self.done))
            # The oldest entry is where the look back begins, so it may lie outside by one.
            while len(self._recent) > 1 and self._recent[1][0] <= now - NOW_SECONDS:
                self._recent.popleft()
            self._show()

    def rejected(self, draws: int) -> None:
        """Add draws that the quality gates refused."""
        with self._lock:
            self.refused += draws
            self._show()

    def shard_written(self, record: ShardRecord) -> None:
        """A shard is complete on disk."""
        with self._lock:
            self.shards_done += 1
            self._show()

    def engine(self, stage_seconds: Callable[[], Mapping[str, float]]) -> None:
        """Name who knows the seconds that each stage has spent in the engine."""
        self._stage_seconds = stage_seconds

    def began(self, facts: Mapping[str, Any]) -> None:
        """A run begins; ``facts`` are its options."""

    def predicted(self, forecast: Forecast) -> None:
        """What the rest of the run will take is known; shown where it is long."""
        if forecast.seconds >= LONG_SECONDS:
            self.note(str(forecast))

    def finished(self, report: GenerateReport) -> None:
        """The run is complete."""

    def note(self, text: str) -> None:
        """Say something in a line of its own."""

    def stop(self) -> None:
        """Show the last state and release the terminal; may be called twice."""

    @property
    def rate(self) -> float:
        """Samples per second since the start."""
        return (self.done - self._resumed) / max(time.monotonic() - self._started, 1e-9)

    @property
    def rate_now(self) -> float | None:
        """Samples per second over the last ``NOW_SECONDS``; None while the run is younger."""
        since, done = self._recent[0]
        now = time.monotonic()
        return (self.done - done) / (now - since) if now - self._started >= NOW_SECONDS else None

    @property
    def stage_seconds(self) -> Mapping[str, float]:
        """Seconds that each stage has spent in the engine; empty where nobody measures."""
        return self._stage_seconds()

    @property
    def stage_shares(self) -> dict[str, float]:
        """Share of each stage in the engine's time, 0 to 1, the largest first; empty where nobody measures."""
        seconds = self.stage_seconds
        total = sum(seconds.values())
        return {stage: spent / total for stage, spent in seconds.items()} if total else {}

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
        self._recent = deque([(self._started, done)])

    def _show(self) -> None:
        """Called under the lock after every change."""

    def _noted(self, text: str) -> str:
        return f"{self.what}: {text}" if self.what else text

    def _summary(self) -> str:
        """Shards, rates, acceptance and remaining time; empty as long as there is nothing to tell."""
        if self.done <= self._resumed:
            return ""
        accepted, left, now = self.acceptance, self.left, self.rate_now
        parts = [f"{self.shards_done}/{self.shards} shards"] if self.shards else []
        parts += (
            [self._paced(self.rate)] if now is None else [f"{self._paced(now)} now, {self._paced(self.rate)} overall"]
        )
        parts += [f"{accepted:.1%} accepted"] if accepted is not None else []
        parts += [f"{duration(left)} left"] if left is not None else []
        return ", ".join(parts)

    def _paced(self, rate: float) -> str:
        if rate <= 0:
            return f"no {self.unit}"
        return f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s per {self.unit}"

    def _stages(self) -> str:
        """The engine's time by stage; empty where nobody measures."""
        shares = [f"{stage} {share:.0%}" for stage, share in self.stage_shares.items()]
        return f"engine time: {', '.join(shares)}" if shares else ""


class _Bar(RichProgress):
    """A bar and a line below it."""

    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim", no_wrap=True, overflow="ellipsis")


class BarProgress(Progress):
    """A bar with shards, rate, remaining time and acceptance rate, and below it the engine's time by stage."""

    def __init__(self, console: Terminal) -> None:
        self._bar = _Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, summary="")
        super().__init__()

    def start(
        self, what: str, total: int, done: int = 0, *, unit: str = "sample", shards: tuple[int, int] = (0, 0)
    ) -> None:
        """Begin to count and put up the bar."""
        super().start(what, total, done, unit=unit, shards=shards)
        self._bar.reset(self._task, total=total, completed=done, description=shown(what), summary="")
        self._bar.start()

    def stop(self) -> None:
        """Take the bar down."""
        self._bar.stop()

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self._bar.console.print(self._noted(text))

    def _show(self) -> None:
        self._bar.below = self._stages()
        self._bar.update(self._task, completed=self.done, summary=self._summary())


class LineProgress(Progress):
    """One line at the start, one every ``LINE_SECONDS``, one at the end."""

    def __init__(self, console: Terminal) -> None:
        self._console = console
        self._last = 0.0
        self._printed: tuple[int, int, int] | None = None
        super().__init__()

    def start(
        self, what: str, total: int, done: int = 0, *, unit: str = "sample", shards: tuple[int, int] = (0, 0)
    ) -> None:
        """Begin to count; what was counted before gets its last line."""
        self.stop()
        self._last = float("-inf")
        super().start(what, total, done, unit=unit, shards=shards)

    def stop(self) -> None:
        """Print the last state, unless it has been printed."""
        with self._lock:
            if self._printed != (self.done, self.refused, self.shards_done):
                self._print()

    def note(self, text: str) -> None:
        """Print a line."""
        self._console.print(self._noted(text))

    def _show(self) -> None:
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._print()

    def _print(self) -> None:
        # Before the first start there is nothing to count, and of an empty folder there never is.
        if not self.total:
            return
        self._last, self._printed = time.monotonic(), (self.done, self.refused, self.shards_done)
        summary, stages = self._summary(), self._stages()
        line = ", ".join(filter(None, (f"{self.what}: {self.done}/{self.total}", summary)))
        self._console.print("; ".join(filter(None, (line, stages))))


def console_progress() -> Progress:
    """Progress on stderr, so that stdout stays free for results: a bar on a terminal, else lines."""
    console = Terminal(stderr=True)
    return BarProgress(console) if console.is_terminal else LineProgress(console)
