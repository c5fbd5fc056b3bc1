"""One writer at a time at a URL, where no operating system lends a lock that dies with its holder.

The lock is a file that its holder rewrites every few seconds. Who finds it watches it: one that changes is held, one
that stays as it is for long enough belongs to a process that is gone. A process that was killed leaves its staging
folder, with its mark: who holds that folder, by a lock of the operating system, knows at once that the mark is dead.

Where a pause or a network outlasts that time, two processes may both believe that they hold it, so a holder looks again
before everything that counts (:meth:`Lease.confirm`), and one that no longer finds its own mark ends.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError, OutputError
from busigen.files import json_bytes, write_json
from busigen.records import Record, Text, Whole, checked, parse_json, read_json
from busigen.runtime.storage.lock import LOCK_FILE, in_use
from busigen.runtime.storage.object_store import RetryPolicy, Store
from busigen.text import duration

MARKS_FILE = f"{LOCK_FILE}-marks"
"""File in the staging folder with the marks of its processes, written before one of them is at the URL."""

_BRIEF = RetryPolicy(total=0.0, attempt=5.0)


@dataclass(frozen=True)
class Beat:
    """Times of a lock, in seconds.

    Attributes:
        every: so often a holder rewrites it.
        dead: one that has not changed for so long is nobody's.
        settle: wait where the store cannot create a file exclusively, so that of two writers one sees the other.
    """

    every: float = 10.0
    dead: float = 60.0
    settle: float = 2.0


class _Held(Record):
    mark: Text
    holder: Text
    beat: Whole


class Lease:
    """The lock of a URL; ``staging`` is a folder that this process holds meanwhile, with an operating system's lock."""

    def __init__(self, store: Store, staging: Path, notify: Callable[[str], None], beat: Beat | None = None) -> None:
        self._store, self._marks, self._notify = store, staging / MARKS_FILE, notify
        self._beat = beat or Beat()
        self._mark = secrets.token_hex(8)
        self._count = 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold the URL for this process while the block runs; an ``OutputError`` if another one holds it."""
        known = self._known_marks()
        write_json(self._marks, [*known, self._mark])
        ended = threading.Event()
        thread = threading.Thread(target=self._keep_beating, args=(ended,), name="lease", daemon=True)
        try:
            self._acquire(known)
            self.confirm()
            write_json(self._marks, [self._mark])
            thread.start()
            yield
        finally:
            ended.set()
            if thread.ident is not None:
                thread.join(2 * self._beat.settle)
            self._release()

    def confirm(self) -> None:
        """Raise an ``OutputError`` unless the lock is still this process's."""
        held = self._read()
        if held is None or held["mark"] != self._mark:
            who = f"taken over by {held['holder']}" if held else "removed"
            raise OutputError(
                f"{self._store.address}: the lock {LOCK_FILE} was {who} while this process could not be heard.",
                fix="Wait until nobody writes there, then run the same command again: what is complete is kept.",
            )

    def _acquire(self, known: list[str]) -> None:
        while not self._store.create(LOCK_FILE, self._content()):
            held = self._read()
            if held is None:
                continue
            ours = held["mark"] in known
            if ours or self._is_dead(held):
                self._store.write(LOCK_FILE, self._content())
                if not ours:
                    # Another process may have come to the same conclusion.
                    time.sleep(self._beat.settle)
                return
        if self._store.create(LOCK_FILE, self._content()):
            # This store replaces what it should leave alone, so another process may have "created" it as well.
            time.sleep(self._beat.settle)

    def _is_dead(self, held: dict[str, Any]) -> bool:
        """Watch a lock: True once it has not changed for long enough, False where it is gone; raises if it changes."""
        self._notify(
            f"{self._store.address} was being written by {held['holder']}; "
            f"waiting up to {duration(self._beat.dead)} to see whether it still is"
        )
        deadline = time.monotonic() + self._beat.dead
        while time.monotonic() < deadline:
            time.sleep(min(self._beat.every / 4, self._beat.dead / 4))
            now = self._read()
            if now is None:
                return False
            if now != held:
                raise in_use(self._store.address, now["holder"])
        return True

    def _keep_beating(self, ended: threading.Event) -> None:
        while not ended.wait(self._beat.every):
            # A store that is out of reach is a matter of whoever does the work; so is a lock that was taken over.
            with contextlib.suppress(Exception, KeyboardInterrupt):
                held = self._read(_BRIEF)
                if held is not None and held["mark"] == self._mark and not ended.is_set():
                    self._store.write(LOCK_FILE, self._content())

    def _release(self) -> None:
        """Remove the lock, if it is there and this process's; a store that cannot be reached keeps it."""
        self._store.caller.aborted.clear()  # It is time to tidy up.
        with contextlib.suppress(Exception, KeyboardInterrupt):
            held = self._read(_BRIEF)
            if held is not None and held["mark"] == self._mark:
                self._store.remove(LOCK_FILE, _BRIEF)
            self._marks.unlink()

    def _known_marks(self) -> list[str]:
        try:
            marks = read_json(self._marks)
        except (OSError, ValueError):
            return []
        return [mark for mark in marks if isinstance(mark, str)] if isinstance(marks, list) else []

    def _read(self, retry: RetryPolicy | None = None) -> dict[str, Any] | None:
        content = self._store.read(LOCK_FILE, retry)
        if content is None:
            return None
        try:
            held = checked(_Held, parse_json(content, LOCK_FILE), LOCK_FILE, fix="")
            return {"mark": held.mark, "holder": held.holder[:200], "beat": held.beat}
        except (ValueError, IntegrityError):
            # Cut short by a kill, where a store writes in place.
            return {"mark": "", "holder": "another process", "beat": content.hex()[:200]}

    def _content(self) -> bytes:
        self._count += 1
        holder = f"process {os.getpid()} on {platform.node()}"
        return json_bytes({"mark": self._mark, "holder": holder, "beat": self._count})
