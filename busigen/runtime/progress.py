"""Progress of a long run: the count, and what shows it: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
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

LINE_SECONDS = 10.0  # seconds between two lines where no terminal shows a bar
NOW_SECONDS = 60.0  # seconds that the rate of "now" looks back: a few batches of a slow machine
LONG_SECONDS = 60.0  # a run that will take longer than this shows its forecast; the others are over before it is read


class Observer:
    """Shows or logs a count: at its start, every ``LINE_SECONDS``, and at its end. Calls may come from any thread."""

    def __init__(self, console: Terminal | None = None) -> None:
        self._console = console
        self._last = float("-inf")
        self._reported: object = None

    def report(self, progress: Progress) -> None:
        """Say how far the count is."""

    def note(self, text: str) -> None:
        """Say something in a line of its own, where there is a console."""
        if self._console:
            self._console.print(text)

    def event(self, event: str, **fields: Any) -> None:
        """Something happened that only a log has a use for."""

    def started(self, progress: Progress) -> None:
        """A count begins; :meth:`changed` follows."""
        self._last = float("-inf")

    def changed(self, progress: Progress) -> None:
        """A number has changed."""
        if time.monotonic() - self._last >= LINE_SECONDS:
            self._report(progress)

    def ended(self, progress: Progress) -> None:
        """The count is over, or a new one is about to begin; may be called without a start, and twice."""
        if self._reported != progress.state:
            self._report(progress)

    def _report(self, progress: Progress) -> None:
        # Before the first start there is nothing to count, and of an empty folder there never is.
        if progress.total:
            self._last, self._reported = time.monotonic(), progress.state
            self.report(progress)


class Progress:
    """Counts samples for its observers, from any thread; as a context manager, it takes a bar down whatever happens."""

    _recent: deque[tuple[float, int]]
    _advanced: float
    _longest_wait: float

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers
        self._lock = threading.Lock()
        # Set by whoever knows the seconds that each stage has spent in the engine.
        self.stage_seconds: Callable[[], Mapping[str, float]] = dict
        self._begin("", 0, 0)
        self.unit = "sample"
        self.shards_done = self.shards = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def start(
        self, what: str, total: int, done: int = 0, *, unit: str = "sample", shards: tuple[int, int] = (0, 0)
    ) -> None:
        """Begin to count to ``total``; the ``done`` samples exist already and do not count towards the rate.

        ``what`` stands before the count, ``unit`` names one; ``shards`` is how many exist and how many there will be.
        """
        with self._lock:
            for observer in self._observers:
                observer.ended(self)
            self._begin(what, total, done)
            self.unit = unit
            self.shards_done, self.shards = shards
            for observer in self._observers:
                observer.started(self)
            self._changed()

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
            self._changed()

    def counter(self, what: str, unit: str) -> Callable[[int, int], None]:
        """What is called with how many are done and how many there are, from 1 on, one more each time."""

        def report(done: int, total: int) -> None:
            if done == 1:
                self.start(what, total, unit=unit)
            self.advance(1)

        return report

    def rejected(self, draws: int) -> None:
        """Add draws that the quality gates refused."""
        with self._lock:
            self.refused += draws
            self._changed()

    def shard_written(self, record: ShardRecord) -> None:
        """A shard is complete on disk."""
        with self._lock:
            self.shards_done += 1
            self._changed()
        self.event(
            "shard_written",
            number=record.number,
            file=record.tar.file,
            samples=record.count,
            bytes=record.tar.size + record.parquet.size,
            sha256=record.tar.sha256,
            shards_done=self.shards_done,
            shards=self.shards,
        )

    def predicted(self, forecast: Forecast) -> None:
        """What the rest of the run will take is known; shown where it is long."""
        self.event("predicted", **forecast.fields())
        if forecast.seconds >= LONG_SECONDS:
            self.note(str(forecast))

    def event(self, event: str, **fields: Any) -> None:
        """Log something that happened; ``docs/progress.md`` lists events and their fields."""
        for observer in self._observers:
            observer.event(event, **fields)

    def note(self, text: str) -> None:
        """Say something in a line of its own."""
        for observer in self._observers:
            observer.note(f"{self.what}: {text}" if self.what else text)

    def stop(self) -> None:
        """Show the last state and release the terminal; may be called twice."""
        with self._lock:
            for observer in self._observers:
                observer.ended(self)

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
    def stage_shares(self) -> dict[str, float]:
        """Share of each stage in the engine's time, 0 to 1, the largest first; empty where nobody measures."""
        seconds = self.stage_seconds()
        total = sum(seconds.values())
        return {stage: spent / total for stage, spent in seconds.items()} if total else {}

    @property
    def acceptance(self) -> float | None:
        """Share of draws that were accepted, 0 to 1; None before any was refused."""
        fresh = self.done - self._resumed
        return fresh / (fresh + self.refused) if self.refused else None

    @property
    def left(self) -> float | None:
        """Seconds that remain, about, at least those of one more batch; None before the first and at the end."""
        if self.done <= self._resumed or self.done >= self.total:
            return None
        return max((self.total - self.done) / self.rate, self._longest_wait)

    @property
    def summary(self) -> str:
        """Shards, rates, acceptance and remaining time in words; empty before the first samples."""
        if self.done <= self._resumed:
            return ""
        accepted, left, now = self.acceptance, self.left, self.rate_now
        overall = self._pace(self.rate)
        parts = [f"{self.shards_done}/{self.shards} shards"] if self.shards else []
        parts += [overall] if now is None else [f"{self._pace(now)} now, {overall} overall"]
        parts += [f"{accepted:.1%} accepted"] if accepted is not None else []
        parts += [f"{duration(left)} left"] if left is not None else []
        return ", ".join(parts)

    @property
    def stages(self) -> str:
        """The engine's time by stage in words; empty where nobody measures."""
        shares = [f"{stage} {share:.0%}" for stage, share in self.stage_shares.items()]
        return f"engine time: {', '.join(shares)}" if shares else ""

    @property
    def state(self) -> tuple[object, ...]:
        """All that a report is about, apart from the time."""
        return self.what, self.done, self.refused, self.shards_done

    def _begin(self, what: str, total: int, done: int) -> None:
        self.what, self.total, self.done, self.refused = what, total, done, 0
        self._resumed = done
        self._started = self._advanced = time.monotonic()
        self._longest_wait = 0.0
        self._recent = deque([(self._started, done)])

    def _changed(self) -> None:
        for observer in self._observers:
            observer.changed(self)

    def _pace(self, rate: float) -> str:
        if rate <= 0:
            return f"no {self.unit}"
        return f"{rate:.1f} {self.unit}s/s" if rate >= 1 else f"{1 / rate:.1f} s per {self.unit}"


class Lines(Observer):
    """Plain lines."""

    def report(self, progress: Progress) -> None:
        """Print a line with all that is known."""
        line = ", ".join(filter(None, (f"{progress.what}: {progress.done}/{progress.total}", progress.summary)))
        self.note("; ".join(filter(None, (line, progress.stages))))


class _BarAndLine(RichProgress):
    below = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.below:
            yield Text(self.below, style="dim", no_wrap=True, overflow="ellipsis")


class Bar(Observer):
    """A bar with shards, rate, remaining time and acceptance rate, and below it the engine's time by stage."""

    def __init__(self, console: Terminal) -> None:
        super().__init__(console)
        self._bar = _BarAndLine(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[summary]}", markup=False),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, summary="")

    def started(self, progress: Progress) -> None:
        """Put up the bar."""
        what = shown(progress.what)
        self._bar.reset(self._task, total=progress.total, completed=progress.done, description=what, summary="")
        self._bar.start()

    def changed(self, progress: Progress) -> None:
        """Bring the bar up to date."""
        self._bar.below = progress.stages
        self._bar.update(self._task, completed=progress.done, summary=progress.summary)

    def ended(self, progress: Progress) -> None:
        """Take the bar down."""
        if self._bar.live.is_started:
            self._bar.stop()


def console_progress(*observers: Observer) -> Progress:
    """Progress on stderr, so that stdout stays free for results; ``observers`` hear of everything first."""
    console = Terminal(stderr=True)
    return Progress(*observers, Bar(console) if console.is_terminal else Lines(console))
