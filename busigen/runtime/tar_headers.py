"""Walking through a tar file that may have come from anywhere, with a bound on what its headers can cost."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from busigen.foreign import open_file

HEADER_LIMIT = 16 << 10
"""Most bytes that the headers of one member may take, long names and PAX records included.

A plain header takes 512. A long name or a set of PAX records can claim any size, and tarfile reads all of it at once;
what tarfiles before Python 3.12.6 make of overlapping records grows with their square: 16 KiB into some 70 MB.
"""


class TarHeaders:
    """An uncompressed tar file's members, one after another. Open one with ``open_headers``."""

    def __init__(self, file: _BoundedFile, tar: tarfile.TarFile) -> None:
        self._file = file
        self._tar = tar

    @property
    def offset(self) -> int:
        """Where in the file the next member's header should lie, in bytes."""
        return self._tar.offset

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end of the archive or at a damaged header.

        Raises:
            tarfile.TarError: its headers are malformed, or take more than ``HEADER_LIMIT`` bytes.
            OSError: the file cannot be read.
        """
        self._file.left = HEADER_LIMIT
        with _malformed_as_tar_error():
            member = self._tar.next()
        # A tarfile collects every header that it has seen, and every record of the global ones.
        vars(self._tar)["members"] = []
        self._tar.pax_headers = {}
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        """A plain member's content, less than its size where the file is cut short. Check its size before."""
        self._file.left = member.size
        self._file.seek(member.offset_data)
        return self._file.read(member.size)


@contextmanager
def open_headers(path: Path) -> Iterator[TarHeaders]:
    """Open a tar file. Not a compressed one: a few kilobytes of it can unpack to terabytes.

    Raises:
        tarfile.TarError: it is no tar file, or its first member is refused; see ``TarHeaders.next``.
        OSError: the file cannot be read, or is no regular one.
    """
    with _BoundedFile(open_file(path).detach()) as file:
        with _malformed_as_tar_error():
            tar = tarfile.TarFile(fileobj=file)
        with tar:
            yield TarHeaders(file, tar)


class _BoundedFile(io.BufferedReader):
    """A file of which no more than ``left`` bytes can be read until somebody sets that anew."""

    left = HEADER_LIMIT

    def read(self, size: int | None = -1, /) -> bytes:
        # Negative stands for all; so does what tarfile computes from a header that claims a negative size.
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"the headers of one member claim more than {HEADER_LIMIT:,} bytes")
        self.left -= size
        return super().read(size)


@contextmanager
def _malformed_as_tar_error() -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, ValueError, OverflowError, RecursionError) as error:
        # What tarfile lets out on malformed records; the error's text is a bare key, or says nothing of the file.
        raise tarfile.ReadError(f"one of its headers is malformed ({type(error).__name__})") from error
