"""The factory as a process of its own, with a source that costs nothing, and the signals that end it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GUARD_SECONDS = 600.0
"""Seconds after which a test gives up waiting; a machine with much else to do may need minutes."""


def command(out: Path, count: int, shard_size: int, *more: object) -> list[str]:
    """``more``: seed, seconds per sample, log."""
    return [sys.executable, "-m", "tests.harness.noise_source", *map(str, (out, count, shard_size, *more))]


def listening() -> None:
    """To be called in the child: a test run in a shell's background inherits that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Hold:
    """A place in a run where its source waits until the test lets it go on, so that no test has to hit a moment.

    Args:
        folder: for the files through which run and test speak; outside of the dataset.
        index: of the first sample that is not handed over before ``release``.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self._file = folder / "hold"
        self.environment = {**os.environ, _HOLD: f"{index}:{self._file}"}

    def reached(self) -> list[int]:
        """Processes that wait, or have waited."""
        return [int(path.suffix[1:]) for path in self._file.parent.glob(f"{self._file.name}.*")]

    def release(self) -> None:
        self._file.touch()


_HOLD = "BUSIGEN_TEST_HOLD"


def wait_at_hold(index: int) -> None:
    """To be called by a source before it hands a sample over."""
    first, _, name = os.environ.get(_HOLD, "").partition(":")
    if not name or index < int(first):
        return
    file, deadline = Path(name), time.monotonic() + GUARD_SECONDS
    file.with_suffix(f".{os.getpid()}").touch()
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)


def started(out: Path, count: int, shard_size: int, *more: object, hold: Hold | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(out, count, shard_size, *more),
        cwd=ROOT,
        env=hold and hold.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )


def wait_for(process: subprocess.Popen[str], seen: Callable[[], Any]) -> None:
    """Wait until ``seen`` is true; fail if the process ends before."""
    deadline = time.monotonic() + GUARD_SECONDS
    while not seen():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, "nothing came"
        time.sleep(0.01)


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines of stderr up to the first one that holds ``text``."""
    lines = []
    assert process.stderr is not None
    for line in process.stderr:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came: {lines}")


def events_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]
