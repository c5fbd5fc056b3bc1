"""Paths that give a file another name than it has, and one of its frames.

DICOM files are often named after patients or unique identifiers. They, and masks named like them, are called by their
content's hash: `renamed` gives ``scans/JANE DOE.dcm/3fa9c1d20b7e-012.dcm``, which is frame 12 of that file. Such a
path's name can be shown and recorded; where its bytes lie, `real_file` says.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from busigen.errors import AccessError
from busigen.files import sha256_of

_GIVEN = re.compile(r"[0-9a-f]{12}(?:(?:-(?P<frame>\d{3,5}))?\.dcm|_mask(?:_\d+)?\.[a-z]{2,5})")


def renamed(path: Path, sha256: str, frame: int = 0, end: str = ".dcm") -> Path:
    """A file under a name made of its image's hash; ``frame``, from 1, of a file with several of them."""
    return path / f"{sha256[:12]}{f'-{frame:03}' if frame else ''}{end}"


def real_file(path: Path) -> Path:
    """Where the bytes lie of what a path names."""
    return path.parent if _renamed(path) else path


def frame_number(path: Path) -> int:
    """Which frame of its file a path names, from 1."""
    found = _GIVEN.fullmatch(path.name) if _renamed(path) else None
    return int(found["frame"] or 1) if found else 1


def shown(path: Path) -> str:
    """A path as people are told of it."""
    return path.name if _renamed(path) else str(path)


def content_hash(path: Path, data: bytes) -> str:
    """The hex sha256 of a file's ``data``; of a frame of several, one made of that and the frame's number."""
    return _of_frame(path, hashlib.sha256(data).hexdigest())


def image_hash(path: Path) -> str:
    """The `content_hash` of a file, or an OSError; files that did not change since are not read again."""
    real = real_file(path)
    if real == path:
        return sha256_of(path)
    found = real.stat()
    return _of_frame(path, _hash(real, found.st_mtime_ns, found.st_size))


def _of_frame(path: Path, sha256: str) -> str:
    found = _GIVEN.fullmatch(path.name)
    several = found is not None and found["frame"] and _renamed(path)
    return hashlib.sha256(f"{sha256} frame {frame_number(path)}".encode()).hexdigest() if several else sha256


@lru_cache(maxsize=1024)
def _hash(path: Path, _changed: int, _size: int) -> str:
    return sha256_of(path)


def _renamed(path: Path) -> bool:
    # The file may be gone by now.
    return _GIVEN.fullmatch(path.name) is not None and not os.path.isdir(path.parent)


@contextmanager
def hidden(path: Path) -> Iterator[None]:
    """Keep a renamed file's own name out of an AccessError."""
    try:
        yield
    except AccessError as error:
        if not _renamed(path):
            raise
        raise AccessError(f"{path.name} cannot be looked at.", fix=error.fix) from None
