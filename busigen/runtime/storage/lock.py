"""Who may write a dataset's folder: one process alone, or several tasks with shards of their own.

Every lock is the operating system's and dies with its holder, however that ends, so no stale lock blocks a rerun. On a
folder that several machines share, that takes a file system with locks across machines (NFS, Lustre with ``flock``).

``.lock`` is held whole by a process that is alone and shared by tasks; ``.lock-task-A-B`` is held by the task that
makes the shards from A to before B; ``.lock-turn`` for moments, by a task that does what only one may do at a time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from busigen.errors import OutputError, UsageError
from busigen.foreign import read_file

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
"""Name of the file by which a process holds a folder."""

_TASK = f"{LOCK_FILE}-task-"
_TURN = f"{LOCK_FILE}-turn"
_TASKS = "tasks"
_TASK_NAME = re.compile(rf"{re.escape(_TASK)}([0-9]+)-([0-9]+)")
_SIGNED = re.compile(rb"\0*|%b|[0-9]+|process [0-9]+ on .*" % _TASKS.encode())
"""What a lock's file may hold: nothing where its process was killed before it could sign, zeros after a power cut."""

_LOCK_WAIT_SECONDS = 2.0
"""Seconds that a task waits for ``.lock``: one that ends holds it alone for moments, to remove it."""


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for this process until the block ends.

    Raises:
        OutputError: another process holds the folder, or tasks do.
    """
    with locked(folder / LOCK_FILE, folder):
        yield


@contextmanager
def locked(path: Path, place: Path) -> Iterator[None]:
    """Hold a lock file for this process until the block ends, which removes it.

    Args:
        path: the lock file.
        place: what it guards, for the error.

    Raises:
        OutputError: another process holds it, or the file is none of this program's.
    """
    handle = _acquire(path, place)
    try:
        _sign(handle, str(os.getpid()))
        yield
    finally:
        _release(handle, path)


@contextmanager
def joined(folder: Path, numbers: range) -> Iterator[None]:
    """Hold some of the folder's shards for this process until the block ends, beside tasks that hold others.

    Args:
        folder: the dataset.
        numbers: of the shards.

    Raises:
        OutputError: a process holds the whole folder, or another task one of the shards.
        UsageError: this system has no such locks.
    """
    if not fcntl:
        raise UsageError(
            "--index-range with --count and --array-task need file locks that this system lacks.",
            fix="Give every task an --index-range and an --out of its own, and join them with `busigen merge`.",
        )
    everyone = folder / LOCK_FILE
    shared = _flock(everyone, fcntl.LOCK_SH, wait_seconds=_LOCK_WAIT_SECONDS)
    try:
        _sign(shared, _TASKS)
        with turn(folder):
            for others, path in living(folder):
                if others.start < numbers.stop and numbers.start < others.stop:
                    raise _overlapping(folder, others, path)
            own = folder / f"{_TASK}{numbers.start}-{numbers.stop}"
            handle = _flock(own, fcntl.LOCK_EX)
            _sign(handle, f"process {os.getpid()} on {platform.node()}")
        try:
            yield
        finally:
            with turn(folder):
                _release(handle, own)
                living(folder)  # Whoever was killed leaves its file to the others.
    finally:
        # Whoever still shares it keeps it, and the last one to go removes it.
        with contextlib.suppress(OSError):
            fcntl.flock(shared, fcntl.LOCK_EX | fcntl.LOCK_NB)
            everyone.unlink()
        os.close(shared)


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Wait until no other task is in such a block, and be the only one there until it ends."""
    path = folder / _TURN
    handle = _flock(path, fcntl.LOCK_EX, wait_seconds=float("inf"))
    try:
        yield
    finally:
        _release(handle, path)


def living(folder: Path) -> list[tuple[range, Path]]:
    """Shard numbers of the tasks that are at work, this process's included, with the file that each holds.

    Files of tasks that were killed are removed. To be called in one's turn.
    """
    found = []
    for path in sorted(folder.glob(f"{_TASK}*")):
        task = _TASK_NAME.fullmatch(path.name)
        if task is None:
            continue
        try:
            handle = _flock(path, fcntl.LOCK_EX)
        except OutputError:
            found.append((range(int(task[1]), int(task[2])), path))
        else:
            _release(handle, path)
    return found


def forget_tasks(folder: Path) -> None:
    """Remove what killed tasks left; to be called by who holds the folder alone."""
    for path in folder.glob(f"{LOCK_FILE}-*"):
        if is_lock(path.name) and stat.S_ISREG(path.lstat().st_mode):
            path.unlink()


def is_lock(name: str) -> bool:
    """Whether a file of a dataset is a lock, by its name."""
    return name in (LOCK_FILE, _TURN) or _TASK_NAME.fullmatch(name) is not None


def _acquire(path: Path, place: Path) -> int:
    return _flock(path, fcntl.LOCK_EX, place=place) if fcntl else _acquire_open_file(path, place)


def _release(handle: int, path: Path) -> None:
    if fcntl:
        # Removed while still held: whoever opened the old file meanwhile sees that it is no longer the one there.
        with contextlib.suppress(OSError):
            path.unlink()
    os.close(handle)
    if not fcntl:
        with contextlib.suppress(OSError):
            path.unlink()


def _sign(handle: int, holder: str) -> None:
    os.ftruncate(handle, 0)
    os.pwrite(handle, holder.encode(), 0)


def _flock(path: Path, kind: int, wait_seconds: float = 0.0, place: Path | None = None) -> int:
    """Open and lock the file, which must still be there under its name once it is locked."""
    deadline = time.monotonic() + wait_seconds
    # Waiting inside the system call is exact; a deadline has to look again and again.
    nonblocking = 0 if wait_seconds == float("inf") else fcntl.LOCK_NB
    while True:
        # Not through a link: a dataset may come from anywhere, and the file that it points to would be overwritten.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, kind | nonblocking)
            if _is_same_file(handle, path):
                _refuse_foreign(handle, path)
                return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise _held(path, place or path.parent) from None
            time.sleep(0.05)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _acquire_open_file(path: Path, place: Path) -> int:
    # Windows refuses to delete a file that a living process has open, which is all that a lock needs.
    try:
        path.unlink(missing_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except (PermissionError, FileExistsError):
        raise _held(path, place) from None


def _refuse_foreign(handle: int, path: Path) -> None:
    """Another program's file is neither overwritten nor removed."""
    regular = stat.S_ISREG(os.fstat(handle).st_mode)
    if not regular or not _SIGNED.fullmatch(os.pread(handle, 1 << 10, 0)):
        raise OutputError(
            f"{path} is another program's file.", fix="Choose another folder, or delete the file if nobody needs it."
        )


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _held(path: Path, place: Path) -> OutputError:
    holder = _holder(path)
    who = f"process {holder}" if holder.isdigit() else "array tasks" if holder == _TASKS else "another process"
    return OutputError(
        f"{place} is being written by {who}.", fix="Wait until it ends, stop it, or choose another --out."
    )


def _overlapping(folder: Path, numbers: range, path: Path) -> OutputError:
    who = _holder(path) or "another process"
    return OutputError(
        f"shards {numbers.start} to {numbers.stop - 1} of {folder} are being made by {who}.",
        fix="Give every task an --array-task or --index-range of its own, or wait until that one ends.",
    )


def _holder(path: Path) -> str:
    try:
        return read_file(path, 1 << 10).decode(errors="replace").strip()
    except OSError:
        return ""
