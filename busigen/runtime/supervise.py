"""What stands around a run of ``busigen generate``: progress for people, events for programs, signals."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from busigen.runtime.address import Address
from busigen.runtime.events import EventLog, LoggedProgress
from busigen.runtime.progress import Progress, console_progress
from busigen.runtime.stopping import Stopping


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
