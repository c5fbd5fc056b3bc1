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
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from busigen.errors import OutputError, UsageError
from busigen.foreign import read_file
from busigen.runtime.storage.url import Address

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"  # name of the file by which a process holds a folder
_TASK = f"{LOCK_FILE}-task-"
_TURN = f"{LOCK_FILE}-turn"
_TASKS = "tasks"
_TASK_NAME = re.compile(rf"{re.escape(_TASK)}([0-9]+)-([0-9]+)")
_SIGNED = re.compile(rb"\0*|%b|[0-9]+|process [0-9]+ on .*" % _TASKS.encode())
"""What a lock's file may hold: nothing where its process was killed before it could sign, zeros after a power cut."""

_LOCK_WAIT_SECONDS = 2.0  # of a task, for ``.lock``: one that ends holds it alone for moments, to remove it


def exclusive(folder: Path, place: Path | Address | None = None) -> AbstractContextManager[None]:
    """Hold the folder for this process until the block ends; see :func:`locked`. ``place`` is its name in errors."""
    return locked(folder / LOCK_FILE, place or folder)


@contextmanager
def locked(path: Path, place: Path | Address) -> Iterator[None]:
    """Hold a lock file, which guards ``place``, until the block ends; an ``OutputError`` if another process has it."""
    handle = _flock(path, fcntl.LOCK_EX, place) if fcntl else _open_exclusively(path, place)
    try:
        _sign(handle, str(os.getpid()))
        yield
    finally:
        _release(handle, path)


@contextmanager
def joined(folder: Path, numbers: range) -> Iterator[None]:
    """Hold the dataset's shards of these numbers until the block ends, beside tasks that hold others.

    An OutputError says that a process holds the whole folder, or a task one of the shards.
    """
    if not fcntl:
        fix = "Give every task an --index-range and an --out of its own, and join them with `busigen merge`."
        raise UsageError("--index-range with --count and --array-task need file locks that this system lacks.", fix=fix)
    everyone = folder / LOCK_FILE
    shared = _flock(everyone, fcntl.LOCK_SH, folder, wait_seconds=_LOCK_WAIT_SECONDS)
    try:
        _sign(shared, _TASKS)
        with turn(folder):
            for others, path in living(folder):
                if others.start < numbers.stop and numbers.start < others.stop:
                    raise OutputError(
                        f"shards {others.start} to {others.stop - 1} of {folder} are being made by "
                        f"{_holder(path) or 'another process'}.",
                        fix="Give every task an --array-task or --index-range of its own, or wait until that one ends.",
                    )
            own = folder / f"{_TASK}{numbers.start}-{numbers.stop}"
            handle = _flock(own, fcntl.LOCK_EX, folder)
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
    handle = _flock(path, fcntl.LOCK_EX, folder, wait_seconds=float("inf"))
    try:
        yield
    finally:
        _release(handle, path)


def living(folder: Path) -> list[tuple[range, Path]]:
    """Shard numbers of the tasks at work, with each one's file; killed ones' are removed. To be called in turn."""
    found = []
    for path in sorted(folder.glob(f"{_TASK}*")):
        if (task := _TASK_NAME.fullmatch(path.name)) is None:
            continue
        try:
            handle = _flock(path, fcntl.LOCK_EX, folder)
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


def _flock(path: Path, kind: int, place: Path | Address, wait_seconds: float = 0.0) -> int:
    """Open and lock the file, which must still be there under its name once it is locked."""
    deadline = time.monotonic() + wait_seconds
    # Waiting inside the system call is exact; a deadline has to look again and again.
    nonblocking = 0 if wait_seconds == float("inf") else fcntl.LOCK_NB
    while True:
        # Not through a link: a dataset may come from anywhere, and the file that it points to would be overwritten.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, kind | nonblocking)
            opened = os.fstat(handle)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(opened, path.stat()):
                    if not stat.S_ISREG(opened.st_mode) or not _SIGNED.fullmatch(os.pread(handle, 1 << 10, 0)):
                        problem = f"{path} is another program's file."
                        raise OutputError(problem, fix="Choose another folder, or delete the file if nobody needs it.")
                    return handle
        except BlockingIOError:
            if time.monotonic() >= deadline:
                os.close(handle)
                raise _held(path, place) from None
            time.sleep(0.05)
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _open_exclusively(path: Path, place: Path | Address) -> int:
    # Windows refuses to delete a file that a living process has open, which is all that a lock needs.
    try:
        path.unlink(missing_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    except (PermissionError, FileExistsError):
        raise _held(path, place) from None


def _held(path: Path, place: Path | Address) -> OutputError:
    holder = _holder(path)
    who = f"process {holder}" if holder.isdigit() else "array tasks" if holder == _TASKS else "another process"
    return in_use(place, who)


def in_use(place: Path | Address, holder: str) -> OutputError:
    """The error where somebody else writes a dataset's place."""
    problem = f"{place} is being written by {holder}."
    return OutputError(problem, fix="Wait until it ends, stop it, or choose another --out.")


def _holder(path: Path) -> str:
    try:
        return read_file(path, 1 << 10).decode(errors="replace").strip()
    except OSError:
        return ""
