"""The local folder that shards for a URL pass through: one for each URL, held by one process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from busigen.errors import OutputError
from busigen.records import read_json
from busigen.runtime.address import Address
from busigen.runtime.atomic import is_temporary, leftovers, output_errors, write_json
from busigen.runtime.dataset import recorded_shards
from busigen.runtime.layout import OWN_FILE, RUN_FILE, SHARD_FOLDER, WRITTEN
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
        OutputError: another process holds it, it is a link, or it cannot be written.
    """
    for path in (spool, spool / SHARD_FOLDER):
        if path.is_symlink():
            raise OutputError(f"{path} is a link.", fix="Remove it, or choose another --spool.")
    with output_errors(spool):
        (spool / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = exclusive(spool)
        try:
            lock.__enter__()
        except OutputError as error:
            raise OutputError(error.problem.replace(str(spool), str(address)), fix=error.fix) from None
    try:
        with output_errors(spool):
            for path in leftovers(spool, WRITTEN) + leftovers(spool / SHARD_FOLDER, WRITTEN):
                path.unlink()
        yield
    finally:
        if not recorded_shards(spool) and not (spool / MARKS_FILE).exists():
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
        empty(spool / SHARD_FOLDER)
    (spool / SHARD_FOLDER).mkdir(exist_ok=True)
    write_json(spool / RUN_FILE, run)


def empty(folder: Path) -> None:
    """Remove a spool's files, or those of its shards; what is none of this program's stays, and its folder with it."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.name == SHARD_FOLDER and not path.is_symlink():
                empty(path)
                path.rmdir()
            elif OWN_FILE.fullmatch(path.name) or is_temporary(path.name, WRITTEN):
                path.unlink()
