"""Opens files from untrusted sources: only regular ones, of at most a stated size.

Every reader of a file that another person or program may have made uses `open_file` or `read_file`: a pipe would block,
a device never ends, and a link leads out of its folder. A file that this process may not read raises an `AccessError`,
which is no OSError, so that it is not taken for a damaged or missing one.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

from busigen.errors import AccessError

_AGAIN = "then run the same command again."
_DISK = f"Check the disk, or the connection to it, {_AGAIN}"
_ACCESS = f"Give yourself read access to it and to the folders above it, {_AGAIN}"
# The fix to suggest for each error of the system that says nothing about the file itself.
_FIXES = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), _ACCESS),
    errno.EMFILE: f"Allow more open files (ulimit -n 1024), {_AGAIN}",
    errno.ENFILE: f"End other programs, which hold all files that this machine can have open, {_AGAIN}",
    errno.ENOMEM: f"Free some memory, {_AGAIN}",
    **dict.fromkeys((errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN), _DISK),
}
MAX_DEPTH = 64  # Levels of folders that are read; longer paths cannot be opened.


class ForeignFileError(OSError):
    """A file is no regular file, a link, or too large: ``strerror`` says which, after the name in ``filename``."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))

    def __str__(self) -> str:
        return f"{self.filename} {self.strerror}"


@contextmanager
def looking(path: Path | None = None) -> Iterator[None]:
    """A context, or decorator, that raises an AccessError where the system refused to let this process read.

    ``path`` is named where the system's own error names no file.
    """
    try:
        yield
    except OSError as error:
        if found := access_error(error, path):
            raise found from error
        raise


def access_error(error: OSError, path: Path | None = None) -> AccessError | None:
    """The AccessError for an error of the system that says nothing about the file itself; None for any other."""
    fix = _FIXES.get(error.errno or 0)
    if fix is None:
        return None
    return AccessError(f"{error.filename or path or 'a file'} cannot be looked at: {error.strerror}.", fix=fix)


@looking()
def open_file(path: Path, *, limit: int | None = None, root: Path | None = None) -> BufferedReader:
    """Open a regular file for reading in binary.

    ``limit`` is the most bytes that it may have, checked once; beneath ``root``, no link is followed.

    Raises:
        ForeignFileError: it is no regular file, behind a link, or larger than ``limit``.
        AccessError: this process may not read it.
        OSError: it is missing or a folder.
    """
    if root is not None:
        refuse_links(path, root)
    # Before opening, because that alone moves some devices; and after it, because it may be another file by then.
    _refuse(path, path.stat(), limit)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse(path, os.fstat(handle), limit)
        return open(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


@looking()
def read_file(path: Path, limit: int, *, root: Path | None = None) -> bytes:
    """The bytes of a regular file of at most ``limit`` bytes; arguments and errors are those of `open_file`."""
    with open_file(path, limit=limit, root=root) as file:
        # Not up to the limit: `read` first allocates all that it is asked for.
        content = file.read(min(os.fstat(file.fileno()).st_size, limit) + 1)
    if len(content) > limit:
        raise ForeignFileError(path, f"grew beyond {limit:,} bytes while it was read")
    return content


@looking()
def names_in(folder: Path) -> list[str]:
    """Names of what lies in a folder, sorted; none if there is no such folder. Raises AccessError."""
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def walk(folder: Path) -> Iterator[Path]:
    """Everything below a folder to ``MAX_DEPTH``, folders before their content, sorted by name, not through links.

    Unlike ``rglob`` and ``os.walk`` of older Pythons it does not recurse. Raises OSError if a folder cannot be read.
    """
    waiting = [(folder, 0)]
    while waiting:
        place, depth = waiting.pop()
        if place != folder:
            yield place
        if depth == 0 or (depth <= MAX_DEPTH and stat.S_ISDIR(place.lstat().st_mode)):
            waiting.extend((place / name, depth + 1) for name in sorted(os.listdir(place), reverse=True))


@looking()
def refuse_links(path: Path, root: Path) -> None:
    """Raise a ForeignFileError if ``path`` is not in ``root``, a link, or behind one; an OSError if it is missing."""
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


_MAGIC = b"PAR1"
_SPARE_BYTES, _ROW_BYTES = 1 << 20, 8 << 10  # A table may take these, on disk and unpacked; a real row has some 600.
# Each row of a table of more than a few has these bytes on disk at least, because of its hash. Runs of one value would
# cost nothing there and, for each row and column, up to 16 bytes of memory.
_LEAST_ROW_BYTES, _FEW_ROWS = 24, 10_000
_MAX_COLUMNS = 128  # Real tables have some 40.
_MAX_LIST = 1_000  # Values of a list, in the mean of a column's rows.
_FIXED_LENGTH = 7  # Parquet's number of the type with values of one stated length, which runs repeat in full.
_DEPTH = 16  # Levels of nesting in a header; Parquet has fewer than ten.
_PAGE_HEADER = 64 << 10  # Largest header of a page, which holds the least and greatest value of its column.

Struct = dict[int, Any]


def refuse_costly(path: Path, rows: int, *, lists: bool = False) -> None:
    """Refuse a Parquet table that claims other than ``rows`` rows, or more room than these can need.

    Reading it then takes at most some 2 KiB for each row beside what its pages unpack to, 8 KiB for each row. ``lists``
    says whether columns may be lists. A ValueError refuses it, an OSError says that it cannot be read.
    """
    limit = _SPARE_BYTES + _ROW_BYTES * rows
    try:
        with looking(path), open_file(path, limit=limit) as file:
            size = file.seek(0, os.SEEK_END)
            if size < 12 or (rows > _FEW_ROWS and size < _LEAST_ROW_BYTES * rows):
                raise ValueError(f"it has {size:,} bytes, which cannot hold a table of {rows:,} rows")
            # Mapped, because of a large one little is looked at.
            with mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as data:
                _refuse_claims(data, rows, limit, lists)
    except (KeyError, IndexError, TypeError, AttributeError, OverflowError) as error:
        raise ValueError("its metadata are damaged") from error


def _refuse_claims(data: mmap.mmap, rows: int, limit: int, lists: bool) -> None:
    size = len(data)
    length = int.from_bytes(data[-8:-4], "little")
    if data[:4] != _MAGIC or data[-4:] != _MAGIC or length > min(size - 12, _SPARE_BYTES + rows // 4):
        raise ValueError("it is no Parquet file, or cut short")
    footer = _Thrift(data, size - 8 - length, size - 8).structure()
    groups = footer[4]
    if footer[3] != rows or sum(group[3] for group in groups) != rows:
        raise ValueError(f"it does not claim to have {rows} rows")
    # All but the first are columns, or what they are made of.
    if not lists and any(5 in element for element in footer[2][1:]):
        raise ValueError("one of its columns holds lists or structures")
    unpacked = 0
    for group in groups:
        if len(group[1]) > _MAX_COLUMNS:
            raise ValueError(f"it has {len(group[1])} columns; at most {_MAX_COLUMNS} are read")
        for column in group[1]:
            unpacked += _unpacked(data, column, group[3])
            if unpacked > limit:
                raise ValueError(f"its pages unpack to more than {limit} bytes")


def _unpacked(data: mmap.mmap, column: Struct, rows: int) -> int:
    """Bytes that a column's pages unpack to; a ValueError where they hold other values than it claims."""
    facts = column[3]
    if 1 in column:
        raise ValueError("a column lies in another file")
    first = facts.get(11) or facts[9]
    end, values, total = first + facts[7], 0, 0
    claimed = facts[5]
    if not 4 <= first <= facts[9] < end <= len(data) or (claimed != rows and len(facts[3]) == 1):
        raise ValueError("a column has other values than its table has rows")
    if facts[1] == _FIXED_LENGTH or claimed > _MAX_LIST * rows:
        raise ValueError("a column holds what no table has")
    while first < end:
        reader = _Thrift(data, first, min(end, first + _PAGE_HEADER))
        page = reader.structure()
        if page[2] < 0 or page[3] < 0:
            raise ValueError("a page has a negative size")
        total += page[2]
        values += sum(page[field][1] for field in (5, 8) if field in page)
        first = reader.at + page[3]
    if first != end or values != claimed:
        raise ValueError("a column's pages hold other values than its table has rows")
    return total


class _Thrift:
    """Thrift's compact encoding, of which Parquet's headers are made: structures as dicts by field number."""

    def __init__(self, data: mmap.mmap, start: int, end: int) -> None:
        self.data, self.at, self.end = data, start, end
        self.depth = 0

    def structure(self) -> Struct:
        """The structure that begins here."""
        self.depth += 1
        if self.depth > _DEPTH:
            raise ValueError("its metadata are nested too deeply")
        fields: Struct = {}
        number = 0
        while head := self._byte():
            number = number + (head >> 4) if head >> 4 else self._signed()
            kind = head & 15
            # A field's truth is its type; an element of a list has a byte of its own.
            fields[number] = kind == 1 if kind in (1, 2) else self._value(kind)
        self.depth -= 1
        return fields

    def _value(self, kind: int) -> Any:
        if kind in (1, 2, 3):
            return self._byte()
        if kind in (4, 5, 6):
            return self._signed()
        if kind == 7:
            return self._bytes(8)
        if kind == 8:
            return self._bytes(self._unsigned())
        if kind in (9, 10):
            head = self._byte()
            count = head >> 4 if head >> 4 != 15 else self._unsigned()
            if count > self.end - self.at:
                raise ValueError("its metadata claim a list longer than themselves")
            return [self._value(head & 15) for _ in range(count)]
        if kind == 12:
            return self.structure()
        raise ValueError("its metadata hold what Parquet's do not")

    def _byte(self) -> int:
        if self.at >= self.end:
            raise ValueError("its metadata are cut short")
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        if size > self.end - self.at:
            raise ValueError("its metadata are cut short")
        self.at += size
        return self.data[self.at - size : self.at]

    def _unsigned(self) -> int:
        value = shift = 0
        while shift < 64:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
        raise ValueError("its metadata hold a number without end")

    def _signed(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
