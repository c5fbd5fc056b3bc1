"""One process per dataset folder; a lock that dies with its holder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from busigen.errors import OutputError
from busigen.runtime.layout import LOCK_FILE

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for this process until the block ends.

    The operating system drops the lock when the holder dies, however it dies, so no stale lock ever blocks a rerun.

    Raises:
        OutputError: another process holds the folder.
    """
    path = folder / LOCK_FILE
    handle = _acquire(path)
    try:
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        yield
    finally:
        if fcntl:
            # Removed while still held: whoever opened the old file meanwhile sees that it is no longer the one there.
            with contextlib.suppress(OSError):
                path.unlink()
        os.close(handle)
        if not fcntl:
            with contextlib.suppress(OSError):
                path.unlink()


def _acquire(path: Path) -> int:
    return _acquire_flock(path) if fcntl else _acquire_open_file(path)


def _acquire_flock(path: Path) -> int:
    while True:
        # Not through a link: a dataset may come from anywhere, and the file that it points to would be overwritten.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_same_file(handle, path):
                return handle
        except BlockingIOError:
            os.close(handle)
            raise _held(path) from None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _acquire_open_file(path: Path) -> int:
    # Windows refuses to delete a file that a living process has open, which is all that a lock needs.
    try:
        path.unlink(missing_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except (PermissionError, FileExistsError):
        raise _held(path) from None


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _held(path: Path) -> OutputError:
    try:
        holder = path.read_text().strip()
    except OSError:
        holder = ""
    who = f"process {holder}" if holder.isdigit() else "another process"
    return OutputError(
        f"{path.parent} is being written by {who}.", fix="Wait until it ends, stop it, or choose another --out."
    )
