"""The local folder that shards for a URL pass through: one for each URL, held by one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from busigen.errors import OutputError
from busigen.records import read_json
from busigen.runtime.address import Address
from busigen.runtime.atomic import leftovers, output_errors, write_json
from busigen.runtime.layout import LOCK_FILE, RUN_FILE, SHARD_FOLDER
from busigen.runtime.lock import exclusive
from busigen.runtime.remote.lease import MARKS_FILE


def default_spools() -> Path:
    """The folder below which spools lie: that of this user's caches, since not every system empties it now and then."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(home) / "busigen" / "spool"


def spool_of(address: Address, spools: Path) -> Path:
    """The spool for a URL. Its name holds the machine's, since a home may be shared by several."""
    digest = hashlib.sha256(address.url.encode()).hexdigest()[:16]
    machine = re.sub(r"[^A-Za-z0-9.-]+", "-", platform.node())[:64]
    return spools / f"busigen-{digest}-{machine}"


@contextmanager
def held(spool: Path, address: Address) -> Iterator[None]:
    """Hold a spool for this process until the block ends; it is removed unless the next run needs what it holds.

    That may be shards, and the mark by which the next run knows a lock at the URL that could not be removed.

    Raises:
        OutputError: another process holds it, or it cannot be written.
    """
    with output_errors(spool):
        (spool / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = exclusive(spool)
        try:
            lock.__enter__()
        except OutputError as error:
            raise OutputError(error.problem.replace(str(spool), str(address)), fix=error.fix) from None
    try:
        with output_errors(spool):
            for path in leftovers(spool) + leftovers(spool / SHARD_FOLDER):
                path.unlink()
        yield
    finally:
        if not any((spool / SHARD_FOLDER).glob("*.json")) and not (spool / MARKS_FILE).exists():
            empty(spool)
        lock.__exit__(None, None, None)
        # One that holds shards stays, and so does one that another process has begun to use.
        with contextlib.suppress(OSError):
            spool.rmdir()


def devote(spool: Path, run: Mapping[str, Any]) -> None:
    """Have a spool hold nothing but this run's; shards that a killed run left are kept if they are."""
    standing = None
    with contextlib.suppress(OSError, ValueError):
        standing = read_json(spool / RUN_FILE)
    if standing != json.loads(json.dumps(run)):
        shutil.rmtree(spool / SHARD_FOLDER, ignore_errors=True)
    (spool / SHARD_FOLDER).mkdir(exist_ok=True)
    write_json(spool / RUN_FILE, run)


def empty(spool: Path) -> None:
    """Remove all but the lock."""
    for path in spool.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name != LOCK_FILE:
            with contextlib.suppress(OSError):
                path.unlink()
