"""Writes files and folders that are whole or absent, also after a power cut, and hashes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from busigen.foreign import open_file, walk

TEMPORARY_PREFIX = ".tmp-"  # Start of the names of unfinished files.

# Older versions gave a number or a token alone.
_TEMPORARY = re.compile(rf"{re.escape(TEMPORARY_PREFIX)}(?:[0-9]+(?:-[0-9a-f]{{8}})?|[0-9a-f]{{8}})-(.+)", re.DOTALL)


def temporary_name(name: str) -> str:
    """A unique name for what becomes ``name`` once it is complete."""
    return f"{TEMPORARY_PREFIX}{os.getpid()}-{secrets.token_hex(4)}-{name}"


def is_temporary(path: str, names: re.Pattern[str]) -> bool:
    """Whether a name or path is that of an unfinished file which was to become one that ``names`` matches."""
    found = _TEMPORARY.fullmatch(path.rpartition("/")[2])
    return found is not None and names.fullmatch(found[1]) is not None


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder; on success it is flushed to disk and renamed to ``path``.

    The rename makes a file survive a kill, the fsyncs a power cut: without them, the name may outlive the bytes.
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
    """A file opened for writing that appears at ``path`` only once it is complete."""
    with atomic_path(path) as temporary, temporary.open("xb") as file:
        yield file


@contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """A new folder that takes the place of ``target`` on success, flushed to disk.

    A folder that is there already is replaced file by file: none of them is missing at any moment.
    """
    make_folder(target.parent)
    temporary = target.with_name(temporary_name(target.name))
    temporary.mkdir()
    try:
        yield temporary
        sync_tree(temporary)
        if target.is_dir():
            names = set(os.listdir(temporary))
            for name in names:
                if (temporary / name).is_dir():
                    remove(target / name)
                os.replace(temporary / name, target / name)
            for name in set(os.listdir(target)) - names:
                remove(target / name)
            sync(target)
            temporary.rmdir()
        else:
            os.replace(temporary, target)
    except BaseException:
        remove(temporary)
        raise
    sync(target.parent)


def publish(places: Mapping[Path, Path]) -> None:
    """Rename finished files of one folder to the keys, of which the last one is the record of the others.

    An earlier record is removed before its files are replaced. A process that is killed in between leaves all files on
    disk, the new record under its temporary name, from which another can do this again.
    """
    *names, record = places
    for place in places.values():
        sync(place)
    sync(record.parent)
    record.unlink(missing_ok=True)
    sync(record.parent)
    for name in names:
        os.replace(places[name], name)
    sync(record.parent)
    os.replace(places[record], record)
    sync(record.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its missing parents so that they survive a power cut."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for place in missing:
        with contextlib.suppress(PermissionError):  # A folder may be written to without being readable.
            sync(place.parent)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinities raise a ``ValueError``."""
    with atomic_file(path) as file:
        # In pieces: the text of a dataset.json with a thousand shards takes megabytes.
        for piece in _json_pieces(value):
            file.write(piece)


def json_bytes(value: Any) -> bytes:
    """What :func:`write_json` writes."""
    return b"".join(_json_pieces(value))


def _json_pieces(value: Any) -> Iterator[bytes]:
    for piece in json.JSONEncoder(indent=2, ensure_ascii=False, allow_nan=False).iterencode(value):
        yield piece.encode()
    yield b"\n"


def sha256_of(path: Path, *, limit: int | None = None, root: Path | None = None) -> str:
    """Hexadecimal sha256 of a file's bytes; arguments and errors are those of `busigen.foreign.open_file`."""
    with open_file(path, limit=limit, root=root) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def leftovers(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Unfinished files directly in ``folder`` (see `is_temporary`), sorted; none if it does not exist."""
    found = folder.glob(f"{TEMPORARY_PREFIX}*")
    return sorted(path for path in found if is_temporary(path.name, names) and stat.S_ISREG(path.lstat().st_mode))


def sync(path: Path) -> None:
    """Flush a file's bytes, or a folder's names, to disk."""
    if os.name != "posix" and path.is_dir():
        return  # Windows cannot open a folder; its file system journals renames.
    # POSIX flushes by any handle, also of a read-only file; Windows needs a writing one.
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    """Flush everything in a folder, and its names, to disk."""
    for path in (*walk(folder), folder):
        sync(path)
