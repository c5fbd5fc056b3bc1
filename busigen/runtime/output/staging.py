"""The local staging folder that shards for a URL pass through: one for each URL, held by one process."""

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
from busigen.files import is_temporary, leftovers, write_json
from busigen.records import read_json
from busigen.runtime.dataset.format import OWN_FILE, RUN_FILE, SHARD_FOLDER, WRITTEN
from busigen.runtime.dataset.reader import recorded_shards
from busigen.runtime.output.lease import MARKS_FILE
from busigen.runtime.storage.files import output_errors
from busigen.runtime.storage.lock import exclusive
from busigen.runtime.storage.url import Address


def default_staging() -> Path:
    """The folder that holds staging folders: in the user's caches, since some systems empty other places."""
    home = os.environ.get("XDG_CACHE_HOME") or os.environ.get("LOCALAPPDATA") or Path.home() / ".cache"
    return Path(home) / "busigen" / "spool"


def staging_folder(address: Address, root: Path) -> Path:
    """The staging folder for a URL. Its name holds the machine's, since a home may be shared by several."""
    digest = hashlib.sha256(address.url.encode()).hexdigest()[:16]
    machine = re.sub(r"[^A-Za-z0-9.-]+", "-", platform.node())[:64]
    return root / f"busigen-{digest}-{machine}"


@contextmanager
def hold_staging(staging: Path, address: Address) -> Iterator[None]:
    """Hold a staging folder until the block ends; it is removed unless the next run needs what it holds.

    That may be shards, and the mark by which the next run knows a lock at the URL that could not be removed.

    Raises:
        OutputError: another process holds it, it is a link, or it cannot be written.
    """
    for path in (staging, staging / SHARD_FOLDER):
        if path.is_symlink():
            raise OutputError(f"{path} is a link.", fix="Remove it, or choose another --spool.")
    with output_errors(staging):
        (staging / SHARD_FOLDER).mkdir(parents=True, exist_ok=True)
        lock = exclusive(staging)
        try:
            lock.__enter__()
        except OutputError as error:
            raise OutputError(error.problem.replace(str(staging), str(address)), fix=error.fix) from None
    try:
        with output_errors(staging):
            for path in leftovers(staging, WRITTEN) + leftovers(staging / SHARD_FOLDER, WRITTEN):
                path.unlink()
        yield
    finally:
        if not recorded_shards(staging) and not (staging / MARKS_FILE).exists():
            empty(staging)
        lock.__exit__(None, None, None)
        # One that holds shards stays, and so does one that another process has begun to use.
        with contextlib.suppress(OSError):
            staging.rmdir()


def bind_to_run(staging: Path, run: Mapping[str, Any]) -> None:
    """Have a staging folder hold nothing but this run's; shards that a killed run left are kept if they are."""
    existing = None
    with contextlib.suppress(OSError, ValueError):
        existing = read_json(staging / RUN_FILE)
    if existing != json.loads(json.dumps(run)):
        empty(staging / SHARD_FOLDER)
    (staging / SHARD_FOLDER).mkdir(exist_ok=True)
    write_json(staging / RUN_FILE, run)


def empty(folder: Path) -> None:
    """Remove the files of this program from a staging folder; any others stay, and their folder with them."""
    for path in folder.iterdir() if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.name == SHARD_FOLDER and not path.is_symlink():
                empty(path)
                path.rmdir()
            elif OWN_FILE.fullmatch(path.name) or is_temporary(path.name, WRITTEN):
                path.unlink()
