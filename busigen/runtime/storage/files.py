"""Files that are either whole or absent, and operating-system errors turned into advice."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import polars as pl

from busigen.errors import OutputError
from busigen.foreign import open_file
from busigen.runtime.storage.lock import locked

TEMPORARY_PREFIX = ".tmp-"
"""Start of the names of files that are still being written. No finished dataset holds one."""

# Older versions gave a number or a token alone.
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(?:[0-9]+(?:-[0-9a-f]{{8}})?|[0-9a-f]{{8}})-(.+)", re.DOTALL)

_AGAIN = "then run the same command again: what is complete is kept."
_FULL = f"Free some space there or raise the quota, {_AGAIN}"
_DENIED = f"Give yourself write access to it, {_AGAIN} Or choose another --out."
_FIXES = {
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
}


def fix_of(number: int | None) -> str | None:
    """What helps against an operating-system error of this number; None for one that says little."""
    return _FIXES.get(number or 0)


def temporary_name(name: str) -> str:
    """A name for what becomes ``name`` once it is complete: nobody else has it, and nobody can guess it."""
    return f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{name}"


def is_temporary(path: str, names: re.Pattern[str]) -> bool:
    """Whether a file is of this program's making and was to become another one, by its name.

    A name that merely begins like one of these is somebody else's.

    Args:
        path: the file's name or path, with forward slashes.
        names: of the files that are written in such a place, such as ``layout.WRITTEN``.
    """
    found = _TEMPORARY.fullmatch(path.rpartition("/")[2])
    return found is not None and names.fullmatch(found[1]) is not None


@contextmanager
def output_errors(folder: Path) -> Iterator[None]:
    """Turn a failure to write into an ``OutputError`` that names the folder and what helps.

    Raises:
        OutputError: the block raised an ``OSError`` or polars could not write.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        fix = fix_of(error.errno) or f"Check the disk, {_AGAIN}"
        raise OutputError(f"Cannot write to {folder}: {reason}.", fix=fix) from error
    except pl.exceptions.PolarsError as error:
        raise OutputError(f"Cannot write to {folder}: {error}.", fix=f"Check the disk, {_AGAIN}") from error


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path in the same folder; on success it is flushed to disk and renamed to ``path``.

    The rename is what makes a shard survive a kill; the two fsyncs are what make it survive a power cut: without the
    first, the name may outlive the bytes.
    """
    temporary = path.with_name(temporary_name(path.name))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for writing that appears at ``path`` only once it is complete."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a new folder beside ``out`` that becomes it on success and is removed on failure.

    A lock file lies beside it for as long as it is filled. One that no living process holds tells the next call for the
    same ``out`` what a killed one left, and nothing else is ever removed.

    Raises:
        OutputError: ``out`` is a link, a file, or a folder that is not empty, or another process is making it.
        OSError: the disk refused.
    """
    if out.is_symlink():
        raise OutputError(f"{out} is a link.", fix="Choose a folder that does not exist or is empty.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"{out} exists and is not empty.", fix="Choose a folder that does not exist or is empty.")
    parent = out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    # Not the name itself, with which the longest ones would be too long.
    digest = hashlib.sha256(os.fsencode(out.name)).hexdigest()[:16]
    for lock in parent.glob(f"{TEMPORARY_PREFIX}*-{digest}.lock"):
        if is_temporary(lock.name, re.compile(rf"{digest}\.lock")) and stat.S_ISREG(lock.lstat().st_mode):
            with locked(lock, out):
                _remove_folder(lock.with_suffix(""))
    place = parent / temporary_name(digest)
    with locked(place.with_name(f"{place.name}.lock"), out):
        place.mkdir()
        try:
            yield place
            sync(place)
            with contextlib.suppress(FileNotFoundError):
                out.rmdir()  # Not every system replaces even an empty one.
            os.replace(place, out)
        except BaseException:
            _remove_folder(place)
            raise
        sync(parent)


def _remove_folder(folder: Path) -> None:
    """Remove a folder with all that is in it, following no link."""
    if folder.is_dir() and not folder.is_symlink():
        shutil.rmtree(folder)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically. NaN and infinities are refused with a ``ValueError``: they are not JSON."""
    with atomic_file(path) as file:
        # In pieces: the text of a dataset.json with a thousand shards takes megabytes before it is one.
        for piece in _json_pieces(value):
            file.write(piece)


def json_bytes(value: Any) -> bytes:
    """What :func:`write_json` writes."""
    return b"".join(_json_pieces(value))


def _json_pieces(value: Any) -> Iterator[bytes]:
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(value):
        yield piece.encode()
    yield b"\n"


def sha256_of(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes.

    Raises:
        OSError, AccessError: as for `busigen.foreign.open_file`.
    """
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leftovers(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Temporary files directly in ``folder`` that a killed process left behind, sorted; none if it does not exist.

    Args:
        folder: one of this program's.
        names: see :func:`is_temporary`.
    """
    found = folder.glob(f"{TEMPORARY_PREFIX}*")
    return sorted(path for path in found if is_temporary(path.name, names) and stat.S_ISREG(path.lstat().st_mode))


def sync(path: Path) -> None:
    """Have a file's bytes, or a folder's names, survive a power cut."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open a folder; its rename is journalled by the file system.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
