"""A folder that appears whole, held by a lock until then, and operating-system errors turned into advice."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import polars as pl

from busigen.errors import OutputError
from busigen.files import TEMPORARY_PREFIX, is_temporary, make_folder, remove, sync, sync_tree, temporary_name
from busigen.runtime.storage.lock import locked

_AGAIN = "then run the same command again: what is complete is kept."
_FULL = f"Free some space there or raise the quota, {_AGAIN}"
_DENIED = f"Give yourself write access to it, {_AGAIN} Or choose another --out."
FIXES = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: f"Raise the file-size limit (ulimit -f) or choose another --out with a smaller --shard-size, {_AGAIN}",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.EROFS: "It is on a read-only file system: choose another --out.",
    errno.ENOTDIR: "A part of that path is a file, not a folder: choose another --out.",
    errno.ELOOP: "A link is in the way: remove it, or choose another --out.",
    errno.EEXIST: "A file is in the way: choose another --out.",
    errno.ENAMETOOLONG: "The path is too long for this file system: choose a shorter --out.",
}  # what helps against an operating-system error, by its number


def cache_folder() -> Path:
    """The folder for ``busigen`` where this system keeps a user's caches."""
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "busigen" / "cache"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "busigen"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "busigen"


def existing(place: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    place = place.absolute()
    while not place.exists():
        place = place.parent
    return place


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turn an ``OSError``, or polars' own, into an ``OutputError`` that names the folder and what helps."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = FIXES.get(error.errno or 0) or f"Check the disk, {_AGAIN}"
        raise OutputError(f"Cannot write to {folder}: {reason}.", fix=fix) from error
    except pl.exceptions.PolarsError as error:
        raise OutputError(f"Cannot write to {folder}: {error}.", fix=f"Check the disk, {_AGAIN}") from error


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a new folder beside ``out`` that becomes it, with all in it on disk, on success and is removed on failure.

    A lock file lies beside it meanwhile. One that no living process holds tells the next call for the same ``out`` what
    a killed one left, and nothing else is removed. An OutputError: ``out`` is a link, a file, not empty, or in use.
    """
    if out.is_symlink():
        raise OutputError(f"{out} is a link.", fix="Choose a folder that does not exist or is empty.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty.", fix="Choose a folder that does not exist or is empty.")
    parent = out.absolute().parent
    make_folder(parent)
    # Not the name itself, with which the longest ones would be too long.
    digest = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
    for lock in parent.glob(f"{TEMPORARY_PREFIX}*-{digest}.lock"):
        if is_temporary(lock.name, re.compile(rf"{digest}\.lock")) and stat.S_ISREG(lock.lstat().st_mode):
            with locked(lock, out):
                remove(lock.with_suffix(""))
    place = parent / temporary_name(digest)
    with locked(place.with_name(f"{place.name}.lock"), out):
        place.mkdir()
        try:
            yield place
            sync_tree(place)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()  # Not every system replaces even an empty one.
            os.replace(place, out)
        except BaseException:
            remove(place)
            raise
        sync(parent)
