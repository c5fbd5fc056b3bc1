"""Ctrl-C and SIGTERM: the first one finishes the shard that is being drawn, the second one stops at once."""

from __future__ import annotations

import _thread
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn, Self

from busigen.errors import INTERRUPTED_EXIT_CODE, TERMINATED_EXIT_CODE, BusigenError

_SIGNALS = {
    signal.SIGINT: ("Ctrl-C", "Interrupted", INTERRUPTED_EXIT_CODE),
    signal.SIGTERM: ("SIGTERM", "Terminated", TERMINATED_EXIT_CODE),
}

_GRACE = 2.0  # seconds for the main thread to hear a second signal, and for the process to be gone afterwards
_ENDING = 10.0  # seconds for the main thread to end in good order after that: an attempt at a network takes five


class GenerationInterrupted(BusigenError):
    """The signal of number ``signal`` ended the run; every complete shard is kept. The exit code tells which it was."""

    exit_code = INTERRUPTED_EXIT_CODE

    def __init__(self, problem: str, *, fix: str = "", number: int = signal.SIGINT) -> None:
        self.signal = int(number)
        self.exit_code = _SIGNALS[signal.Signals(number)][2]
        super().__init__(problem, fix=fix)


class Stopping:
    """Listens for Ctrl-C and SIGTERM while its block runs; ``notify`` gets a line, in a thread of its own.

    Outside of ``finishing`` a signal raises ``KeyboardInterrupt`` in the main thread. Inside, the first one is only
    noted (``requested``), and each further one raises. An interrupt that leaves the block becomes a
    ``GenerationInterrupted``. A signal that the process was started to ignore stays ignored. The main thread may be
    inside an engine, which cannot be interrupted: the process is ended where it does not hear a second signal within
    two seconds, or does not end ten seconds later, and on a third one at once. Never entered, it never asks to stop.
    """

    def __init__(self, notify: Callable[[str], None] = lambda line: None) -> None:
        self.signal: int | None = None
        self._notify = notify
        self._work: Callable[[], str] | None = None
        self._received = self._own = 0
        self._raise = False
        self._former: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has asked the run to end."""
        return self.signal is not None

    def __enter__(self) -> Self:
        # Python allows handlers in the main thread only. Elsewhere, whoever owns that one decides when to stop.
        if threading.current_thread() is not threading.main_thread():
            return self
        # A Python handler runs between two bytecodes of the main thread, which may be minutes away inside an engine,
        # and several signals until then count as one. The wake-up socket hears of each at once.
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._former = {
            number: signal.signal(number, self._handle)
            for number in _SIGNALS
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler)
        }
        self._former_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if self._former:
            for number, handler in self._former.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._former_wakeup)
            self._writer.close()
            self._thread.join()
            self._reader.close()
            if self._received >= 2:
                threading.Thread(target=self._end_late, daemon=True).start()
        if kind is KeyboardInterrupt:
            raise self.interruption() from None

    @contextmanager
    def finishing(self, work: Callable[[], str]) -> Iterator[None]:
        """Let the block come to a good end after a first signal; ``work`` says, in another thread, what is finished."""
        self._work = work
        try:
            yield
        finally:
            self._work = None

    def interruption(self, state: str = "") -> GenerationInterrupted:
        """The error to end with; ``state`` is what is complete, such as ``with 3 of 8 shards complete in out``."""
        number = signal.Signals(self.signal or signal.SIGINT)
        said = f"{_SIGNALS[number][1]} {state}".strip()
        return GenerationInterrupted(f"{said}.", fix="Run the same command again to continue.", number=number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._raise:
            self._raise = False
            raise KeyboardInterrupt

    def _watch(self) -> None:
        while True:
            try:
                received = self._reader.recv(1)
            except TimeoutError:
                if self._raise or self._reader.gettimeout() == _ENDING:
                    self._end()
                self._reader.settimeout(_ENDING)
                continue
            number = next(iter(received), 0)
            if number == 0:  # The block has ended.
                return
            if number not in self._former:
                continue
            if self._own:
                self._own -= 1
                continue
            self._received += 1
            self.signal = self.signal or number
            work, name = self._work, _SIGNALS[signal.Signals(number)][0]
            if self._received == 1 and work is not None:
                self._notify(f"{name}: finishing {work()}. Once more to stop at once.")
            elif self._received <= 2:
                # Have the main thread raise, even where it waits for a lock or sleeps.
                self._raise = True
                self._own += 1
                if hasattr(signal, "pthread_kill"):
                    signal.pthread_kill(threading.main_thread().ident or 0, number)
                else:
                    _thread.interrupt_main(signal.Signals(number))
            else:
                self._end()
            if self._received >= 2:
                self._reader.settimeout(_GRACE)

    def _end(self) -> NoReturn:
        """End the process, whatever its other threads do; what is complete on disk is whole, as after any kill."""
        error = self.interruption("while work was under way; complete shards are kept")
        # From a thread of its own, because it may be standard error that nobody reads from. The bar hid the cursor.
        last = f"\r\x1b[?25h{error}\n" if sys.stderr.isatty() else f"{error}\n"
        words = threading.Thread(target=os.write, args=(2, last.encode(errors="replace")), daemon=True)
        words.start()
        words.join(_GRACE)
        os._exit(error.exit_code)

    def _end_late(self) -> None:
        """End a process that Python keeps for the sake of threads inside an engine, which it would wait for."""
        time.sleep(_GRACE)
        os._exit(self.interruption().exit_code)
