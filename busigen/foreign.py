"""Opening files that may have come from anywhere: only regular ones, of at most a stated size.

Every reader of a file that another person or program may have made goes through `open_file` or `read_file`: a pipe in a
file's place would be waited for, a device never ends, and a link leads out of the folder that was given.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

MAX_DEPTH = 64
"""Folders within folders that are looked into: nothing sound is as deep, and longer paths cannot be opened."""


class ForeignFileError(OSError):
    """A file is not read: it is no regular file, a link, or larger than it may be.

    ``strerror`` says which, as a clause that follows the file's name ("is a pipe, not a file"); ``filename`` names it.
    """

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


def open_file(path: Path, *, limit: int | None = None, root: Path | None = None) -> BufferedReader:
    """Open a regular file for reading in binary.

    Args:
        path: the file.
        limit: most bytes that it may have; None for no limit.
        root: a folder above ``path``, beneath which no link is followed, neither to a folder nor to the file itself;
            None follows links.

    Returns:
        The open file, at its start. Its size was checked once: a reader that trusts it reads no further than that.

    Raises:
        ForeignFileError: it is no regular file, lies behind a link where none is followed, or is larger than ``limit``.
        OSError: it is missing or cannot be opened.
    """
    if root is not None:
        refuse_links(path, root)
    # Looked at first, because opening alone moves some devices; again once open, because it may be another by then.
    _refuse(path, path.stat(), limit)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse(path, os.fstat(handle), limit)
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def read_file(path: Path, limit: int, *, root: Path | None = None) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; arguments and errors are those of `open_file`."""
    with open_file(path, limit=limit, root=root) as file:
        # Not up to the limit, which may be large: room for all that is asked for is made first.
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(content) > limit:
        raise ForeignFileError(path, f"grew beyond {limit:,} bytes while it was read")
    return content


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder, folders before what they hold, in order of name; no link is followed.

    Folders are looked into ``MAX_DEPTH`` deep. Unlike ``rglob`` and ``os.walk`` of older Pythons this does not recurse.

    Raises:
        OSError: a folder cannot be read.
    """
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        if place != folder:
            yield place
        if depth == 0 or (depth <= MAX_DEPTH and stat.S_ISDIR(place.lstat().st_mode)):
            waiting.extend((place / name, depth + 1) for name in sorted(os.listdir(place), reverse=True))


def refuse_links(path: Path, root: Path) -> None:
    """Refuse a path that is a link, or lies behind one, beneath a folder.

    Raises:
        ForeignFileError: ``path`` or a folder between it and ``root`` is a link, or ``path`` does not lie in ``root``.
        OSError: it is missing.
    """
    names = path.relative_to(root).parts if path.is_relative_to(root) else ("..",)
    if ".." in names:
        raise ForeignFileError(path, f"does not lie in {root}")
    place = root
    for name in names:
        place /= name
        if stat.S_ISLNK(place.lstat().st_mode):
            raise ForeignFileError(place, "is a link, and links are not followed here")


def _refuse(path: Path, found: os.stat_result, limit: int | None) -> None:
    mode = found.st_mode
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        kind = "a pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
        raise ForeignFileError(path, f"is {kind}, not a file")
    if limit is not None and found.st_size > limit:
        raise ForeignFileError(path, f"has {found.st_size:,} bytes; at most {limit:,} are read")
