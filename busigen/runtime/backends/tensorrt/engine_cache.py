"""The cache of engines: entries are found by all that they depend on, and used only if their hash is right.

An entry is ``<cache>/<kind>/<digest of its key>/content``, with key and content's sha256 in ``record.json``, which is
written last. The hashes are for damage, not against malice: an engine is code that anybody with the folder can replace.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from busigen.errors import IntegrityError, OutputError
from busigen.files import atomic_file, leftovers, write_json
from busigen.foreign import read_file
from busigen.records import Record, Text, read_checked
from busigen.runtime.storage.files import cache_folder, output_errors
from busigen.runtime.storage.lock import exclusive

CONTENT, RECORD = "content", "record.json"
_NAMES = re.compile(f"{re.escape(CONTENT)}|{re.escape(RECORD)}")
_MAX_CONTENT_BYTES = 8 << 30
_POLL = 0.2  # seconds between looks at an entry that another process is making

_log = logging.getLogger(__name__)

Key = Mapping[str, Any]  # all that an entry depends on, as JSON has it: texts, numbers, booleans, and lists of those


class _Record(Record):
    key: dict[Text, Any]
    sha256: Text


def default_folder() -> Path:
    """What ``BUSIGEN_CACHE`` names, else the folder for ``busigen`` where this system keeps caches."""
    named = os.environ.get("BUSIGEN_CACHE")
    return Path(named) if named else cache_folder()


class Cache:
    """A folder of entries that processes share; it need not exist yet, and by default is the user's."""

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or default_folder()

    def entry(self, kind: str, key: Key) -> Path:
        """The folder of an entry, whether or not it is there. Its name proves nothing."""
        text = json.dumps(key, sort_keys=True, separators=(",", ":"))
        return self.folder / kind / hashlib.sha256(text.encode()).hexdigest()[:32]

    def read(self, kind: str, key: Key) -> bytes | None:
        """An entry's content; None if there is none or, which is logged, it is not what its record says."""
        entry = self.entry(kind, key)
        try:
            record = read_checked(_Record, entry / RECORD, fix="")
            # Read once and used as read: what is hashed is what runs.
            content = read_file(entry / CONTENT, _MAX_CONTENT_BYTES)
        except FileNotFoundError:
            return None
        except (OSError, IntegrityError) as error:
            _log.warning("%s cannot be used and is made again: %s", entry, error)
            return None
        # Through JSON, as the recorded one: a tuple comes back as a list.
        if record["key"] != json.loads(json.dumps(key)):
            _log.warning("%s is the entry of something else and is made again", entry)
            return None
        if hashlib.sha256(content).hexdigest() != record["sha256"]:
            _log.warning("%s is not what was kept there, by its sha256, and is made again", entry / CONTENT)
            return None
        return content

    def write(self, kind: str, key: Key, content: bytes, **facts: Any) -> None:
        """Keep content under its key, and facts for people; an ``OutputError`` if the folder cannot be written to."""
        entry = self._made(kind, key)
        with output_errors(entry):
            # Gone before its content changes: a kill in between must not leave the old record beside the new content.
            (entry / RECORD).unlink(missing_ok=True)
            with atomic_file(entry / CONTENT) as file:
                file.write(content)
            sha256 = hashlib.sha256(content).hexdigest()
            write_json(entry / RECORD, {"key": key, "sha256": sha256, "bytes": len(content), **facts})

    @contextmanager
    def making(self, kind: str, key: Key) -> Iterator[None]:
        """Be the only process that makes an entry until the block ends, after any other that is making it."""
        entry, said = self._made(kind, key), False
        with contextlib.ExitStack() as held:
            while True:
                try:
                    held.enter_context(exclusive(entry))
                    break
                except OutputError:
                    if not said:
                        _log.info("%s is being made by another process; waiting for it", entry)
                    said = True
                    time.sleep(_POLL)
                except OSError as error:
                    with output_errors(entry):
                        raise error
            for path in leftovers(entry, _NAMES):  # Of a process that was killed: its lock died with it.
                path.unlink(missing_ok=True)
            yield

    def keys(self, kind: str) -> list[dict[str, Any]]:
        """The keys of all entries of a kind that have a readable record."""
        found = []
        for path in sorted((self.folder / kind).glob(f"*/{RECORD}")):
            with contextlib.suppress(OSError, IntegrityError):
                found.append(read_checked(_Record, path, fix="")["key"])
        return found

    def _made(self, kind: str, key: Key) -> Path:
        entry = self.entry(kind, key)
        with output_errors(entry):
            # For this user alone: what lies here runs.
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            entry.mkdir(parents=True, exist_ok=True)
        return entry
