"""One writer at a time at a URL, where no operating system lends a lock that dies with its holder.

The lock is a file that its holder rewrites every few seconds. Who finds it watches it: one that changes is held, one
that stays as it is for long enough belongs to a process that is gone. A process that was killed leaves its staging
folder, with its mark. Whoever holds that folder, whose lock is the operating system's, knows at once that the mark is a
dead one's.

Where a pause or a network outlasts that time, two processes may both believe that they hold it, so a holder looks again
before everything that counts (:meth:`Lease.confirm`), and the one that no longer finds its own mark ends.
"""

from __future__ import annotations

import contextlib
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from busigen.errors import IntegrityError, OutputError
from busigen.files import json_bytes, write_json
from busigen.records import Record, Text, Whole, checked, parse_json, read_json
from busigen.runtime.storage.lock import LOCK_FILE
from busigen.runtime.storage.object_store import Store
from busigen.runtime.storage.retry import RetryPolicy
from busigen.text import duration

MARKS_FILE = f"{LOCK_FILE}-marks"
"""File in the staging folder with the marks of its processes, written before one of them is at the URL."""

_BRIEF = RetryPolicy(total=0.0, attempt=5.0)


@dataclass(frozen=True)
class Beat:
    """Times in seconds.

    Attributes:
        every: so often a holder rewrites the lock.
        dead: a lock that has not changed for so long is nobody's.
        settle: wait where the store cannot create a file exclusively, so that of two writers one sees the other.
    """

    every: float = 10.0
    dead: float = 60.0
    settle: float = 2.0


class _Held(Record):
    """Content of the lock."""

    mark: Text
    holder: Text
    beat: Whole


class Lease:
    """Holds a URL for this process while its block runs.

    Args:
        store: the place.
        staging: folder that this process holds, with an operating system's lock.
        notify: called with a line where others have to be waited for.
        beat: times.

    Raises:
        OutputError: another process holds it, on entering; or the store cannot be used.
    """

    def __init__(self, store: Store, staging: Path, notify: Callable[[str], None], beat: Beat | None = None) -> None:
        self._store, self._staging, self._notify, self._beat = store, staging, notify, beat or Beat()
        self._mark = secrets.token_hex(8)
        self._count = 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        known = self._known_marks()
        write_json(self._staging / MARKS_FILE, [*known, self._mark])
        try:
            self._acquire(known)
            self.confirm()
            write_json(self._staging / MARKS_FILE, [self._mark])
        except BaseException:
            self._release()
            raise
        self._ended.clear()
        self._thread = threading.Thread(target=self._keep_beating, name="lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(2 * self._beat.settle)
        self._release()

    def confirm(self) -> None:
        """See that the lock is still this process's.

        Raises:
            OutputError: it is not.
        """
        held = self._read()
        if held is None or held.get("mark") != self._mark:
            who = f"taken over by {held['holder']}" if held else "removed"
            raise OutputError(
                f"{self._store.address}: the lock {LOCK_FILE} was {who} while this process could not be heard.",
                fix="Wait until nobody writes there, then run the same command again: what is complete is kept.",
            )

    def _acquire(self, known: list[str]) -> None:
        while not self._create():
            held = self._read()
            if held is None:
                continue
            if held.get("mark") not in known and not self._is_dead(held):
                continue
            self._write()
            # Another process may have come to the same conclusion.
            if held.get("mark") not in known:
                time.sleep(self._beat.settle)
            return

    def _create(self) -> bool:
        if not self._store.create(LOCK_FILE, self._content()):
            return False
        if self._store.create(LOCK_FILE, self._content()):
            # This store replaces what it should leave alone, so another process may have "created" it as well.
            time.sleep(self._beat.settle)
        return True

    def _is_dead(self, held: dict[str, Any]) -> bool:
        """Watch a lock: True once it has not changed for long enough, False where it is gone.

        Raises:
            OutputError: it changes, so somebody holds it.
        """
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
                raise OutputError(
                    f"{self._store.address} is being written by {now['holder']}.",
                    fix="Wait until it ends, stop it, or choose another --out.",
                )
        return True

    def _keep_beating(self) -> None:
        while not self._ended.wait(self._beat.every):
            # A store that is out of reach is a matter of whoever does the work; so is a lock that was taken over.
            with contextlib.suppress(Exception, KeyboardInterrupt):
                held = self._read(_BRIEF)
                if held is not None and held.get("mark") == self._mark and not self._ended.is_set():
                    self._write()

    def _release(self) -> None:
        """Remove the lock, if it is there and this process's; a store that cannot be reached keeps it."""
        self._store.caller.resume()
        with contextlib.suppress(Exception, KeyboardInterrupt):
            held = self._read(_BRIEF)
            if held is not None and held.get("mark") == self._mark:
                self._store.remove(LOCK_FILE, _BRIEF)
            (self._staging / MARKS_FILE).unlink()

    def _known_marks(self) -> list[str]:
        try:
            marks = read_json(self._staging / MARKS_FILE)
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

    def _write(self) -> None:
        self._store.write(LOCK_FILE, self._content())

    def _content(self) -> bytes:
        self._count += 1
        holder = f"process {os.getpid()} on {platform.node()}"
        return json_bytes({"mark": self._mark, "holder": holder, "beat": self._count})
