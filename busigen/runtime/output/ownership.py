"""Whose a dataset's place is: the run record that it holds, refusing what belongs to another run, a URL's lock.

At a URL no operating system lends a lock that dies with its holder. The lock there is a file that its holder rewrites
every few seconds: one that changes is held, one that stays as it is for long enough belongs to a process that is gone.
A killed process leaves its staging folder with its mark: who holds that folder, by a lock of the operating system,
knows at once that the mark is dead. Where a pause or a network outlasts that time, two processes may both believe that
they hold it, so a holder looks again before everything that counts (:meth:`Lease.confirm`).
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import polars as pl

import busigen
from busigen.errors import IntegrityError, OutputError
from busigen.files import is_temporary, json_bytes, write_json
from busigen.records import Record, Text, Whole, checked, parse_json, read_json
from busigen.runtime.backends.bundle import unproven
from busigen.runtime.dataset.format import FIELDS, RUN_FILE, WRITTEN, Plan, Source, changed_options, differences
from busigen.runtime.dataset.reader import refuse_newer
from busigen.runtime.dataset.run_record import RunRecord
from busigen.runtime.storage.lock import LOCK_FILE, in_use, is_lock
from busigen.runtime.storage.object_store import RetryPolicy, Store
from busigen.runtime.storage.url import Address
from busigen.text import counted, duration

MARKS_FILE = f"{LOCK_FILE}-marks"  # in the staging folder, with its processes' marks, written before one is at the URL
_BRIEF = RetryPolicy(total=0.0, attempt=5.0)
_SHOWN = 3
_NOT_COMPARED = {"engine_batches": None, "options": None, "versions": None, "sources": None, "unproven": None}


def run_record(source: Source, plan: Plan) -> dict[str, Any]:
    """What ``run.json`` holds: all that decides which samples exist, and the versions that decide their bytes."""
    fingerprint = dict(source.fingerprint())
    batches = fingerprint.pop("engine_batches", None)
    missing = unproven(fingerprint) if "checkpoint" in fingerprint else []
    record = {
        "schema_version": plan.schema_version,
        "busigen": busigen.__version__,
        "config": plan.config(),
        "columns": {name: kind.__name__ for name, kind in source.row_types().items()},
        "fingerprint": fingerprint,
        # Stored, not compared: older records do not say it.
        **({"engine_batches": batches} if batches else {}),
        **({"unproven": missing} if missing else {}),
        # Stored, not compared: a folder may be renamed, and another Pillow may pack the same pixels into other bytes,
        # but they stay the same samples.
        "options": source.options(),
        "versions": {
            "python": platform.python_version(),
            "numpy": np.__version__,
            "pillow": PIL.__version__,
            "polars": pl.__version__,
        },
    }
    # Through JSON, so that a tuple equals the list that comes back from the file.
    normal: dict[str, Any] = json.loads(json.dumps(record, allow_nan=False))
    return normal


def refuse_other_run(
    out: Path | Address, existing: Mapping[str, Any], source: Source, plan: Plan, folders: Mapping[str, Path]
) -> None:
    """Refuse early what would be refused once ``folders``, by their options, are read, whose files ``source`` lacks."""
    run = run_record(source, plan)
    run["columns"] = existing.get("columns")  # Some follow from what lies in the folders.
    for option, folder in folders.items():
        section, name = FIELDS[option]
        run["options"][option] = Path(os.path.realpath(folder)).name
        before = existing.get(section, {}).get(name)
        run[section][name] = before if before != run[section].get(name) else ""
    refuse_other(out, existing, run)


def refuse_foreign(out: Path | Address, names: Iterable[str]) -> None:
    """Refuse a place that holds files, of these names, and no run record."""
    # A run that was killed before it could write ``run.json`` may leave locks and temporary files.
    foreign = sorted(
        (name for name in names if not is_lock(name) and not is_temporary(name, WRITTEN)),
        key=lambda name: ("/" in name, name),
    )
    if foreign:
        more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
        problem = f"{out} holds other files ({', '.join(foreign[:3])}{more}) and no {RUN_FILE}."
        raise OutputError(problem, fix="Choose an --out that is empty or does not exist.")


def checked_run(run: Any, path: Path | Address) -> dict[str, Any]:
    """A run record that was read from ``path``; raises if it is newer than this busigen, or none."""
    if isinstance(run, dict):
        refuse_newer(run, path)
    try:
        checked(RunRecord, run, path, fix="")
    except IntegrityError as error:
        raise unreadable_run(path, error.problem) from error
    found: dict[str, Any] = run
    return found


def refuse_other(out: Path | Address, existing: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raise an ``OutputError`` if the records of two runs differ in what decides which samples exist."""
    options = changed_options(existing, run)
    if not (shown := shown_changes({**existing, **_NOT_COMPARED}, {**run, **_NOT_COMPARED}, options)):
        return
    fix = "Choose another --out, or repeat the options that the folder was started with."
    if list(options) == ["--count"]:
        fix += " For more samples, generate them with another --seed into another --out, and join both with "
        fix += "`busigen merge`."
    raise OutputError(f"{out} belongs to another run ({'; '.join(shown)}).", fix=fix)


def shown_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], options: Mapping[str, str] | None = None
) -> list[str]:
    """In what two run records, or parts of them, differ, in words: by the options that decide it, else by fields."""
    # The options are those of the whole records, which know the names of folders.
    if not (changed := differences(old, new)):
        return []
    options = changed_options(old, new) if options is None else options
    known = tuple(".".join(FIELDS[option]) for option in options)
    rest = [(name, old, new) for name, old, new in changed if not name.startswith(known)]
    shown = [f"{option}: {change}" for option, change in options.items()]
    # What follows from a changed option, such as another bundle's preset, is counted; alone it has to be shown.
    if not options:
        shown += [f"{name}: {_short(old)} -> {_short(new)}" for name, old, new in rest[:_SHOWN]]
        rest = rest[_SHOWN:]
    if rest:
        shown.append(f"and {counted(len(rest), 'more field')} of {RUN_FILE}")
    return shown


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unreadable_run(path: Path | Address, why: str) -> OutputError:
    """The error where a ``run.json`` is none."""
    return OutputError(f"{path} is not a run record of busigen: {why.rstrip('.')}.", fix="Choose another --out.")


@dataclass(frozen=True)
class Beat:
    """Times of a lock, in seconds."""

    every: float = 10.0  # so often a holder rewrites it
    dead: float = 60.0  # one that has not changed for so long is nobody's
    settle: float = 2.0  # wait where a store cannot create exclusively, so that of two writers one sees the other


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
        known: list[str] = []
        with contextlib.suppress(OSError, ValueError):
            marks = read_json(self._marks)
            known = [mark for mark in marks if isinstance(mark, str)] if isinstance(marks, list) else []
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
        if (held := self._read()) is None or held["mark"] != self._mark:
            who = f"taken over by {held['holder']}" if held else "removed"
            raise OutputError(
                f"{self._store.address}: the lock {LOCK_FILE} was {who} while this process could not be heard.",
                fix="Wait until nobody writes there, then run the same command again: what is complete is kept.",
            )

    def _acquire(self, known: list[str]) -> None:
        while not self._store.create(LOCK_FILE, self._content()):
            if (held := self._read()) is None:
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
            if (now := self._read()) is None:
                return False
            if now != held:
                raise in_use(self._store.address, now["holder"])
        return True

    def _keep_beating(self, ended: threading.Event) -> None:
        while not ended.wait(self._beat.every):
            # A store that is out of reach is a matter of whoever does the work; so is a lock that was taken over.
            with contextlib.suppress(Exception, KeyboardInterrupt):
                if (held := self._read(_BRIEF)) is not None and held["mark"] == self._mark and not ended.is_set():
                    self._store.write(LOCK_FILE, self._content())

    def _release(self) -> None:
        """Remove the lock, if it is there and this process's; a store that cannot be reached keeps it."""
        self._store.caller.aborted.clear()  # It is time to tidy up.
        with contextlib.suppress(Exception, KeyboardInterrupt):
            if (held := self._read(_BRIEF)) is not None and held["mark"] == self._mark:
                self._store.remove(LOCK_FILE, _BRIEF)
            self._marks.unlink()

    def _read(self, retry: RetryPolicy | None = None) -> dict[str, Any] | None:
        if (content := self._store.read(LOCK_FILE, retry)) is None:
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
