"""Power cuts: the states that a run leaves a folder in, and what a disk may hold of them when the power goes.

A run is recorded inside this process, whoever writes the files: before every operation on a name, and around every
fsync, the folder is looked at. A cut at one of these states keeps what an fsync has made safe, files by their bytes and
folders by their names. Of everything else it keeps a part by chance: a file's old bytes, a beginning of the new ones,
or zeros; a new name or the old one. A rename alone is never halved. No fsync reaches the real disk meanwhile.

The cases are in `tests.harness.power_cut_cases`; ``python -m benchmarks.power_cut`` tries them a thousand times.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate"}
_RECENT = 50_000_000
"""Nanoseconds within which a file may have changed without its time saying so."""

_SECTOR = 512
"""Bytes that a disk writes together."""

Names = dict[int, dict[str, int]]
Contents = dict[int, str]


@dataclass(frozen=True)
class State:
    """A folder at one moment, files and folders by their inodes.

    Attributes:
        names: what each folder holds.
        contents: hash of each file's bytes.
        safe_names: what each folder held when it was flushed last.
        safe_contents: hash of each file's bytes when it was flushed last.
    """

    names: Names
    contents: Contents
    safe_names: Names
    safe_contents: Contents


@dataclass
class Recording:
    """The states of ``root``, oldest first, and the bytes behind the hashes."""

    root: Path
    states: list[State] = field(default_factory=list)
    stored: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock, self._looking = threading.RLock(), False
        self._handles: dict[int, int] = {}  # Open for good, so that no inode's number is given twice.
        self._stamps: dict[int, tuple[int, int]] = {}
        self._names: Names = {}
        self._contents: Contents = {}
        self._safe_names: Names = {}
        self._safe_contents: Contents = {}

    def begin(self) -> None:
        """Take all that is there for safe."""
        self.look()
        self._safe_names, self._safe_contents = dict(self._names), dict(self._contents)
        self.states.clear()
        self._keep()

    def look(self) -> None:
        """Note how the folder is now."""
        with self._lock:
            if self._looking:
                return
            self._looking = True
            try:
                self._names = {}
                self._visit(self.root)
                self._keep()
            finally:
                self._looking = False

    def flush(self, handle: int) -> bool:
        """Note that a file or folder is on disk; False where it is none of the root's."""
        with self._lock:
            self.look()
            number = os.fstat(handle).st_ino
            if number not in self._handles:
                return False
            if number in self._names:
                self._safe_names[number] = self._names[number]
            else:
                self._contents[number] = self._safe_contents[number] = self._read(number)
            self._keep()
            return True

    def end(self) -> None:
        """Let go of the files."""
        for handle in self._handles.values():
            os.close(handle)

    def _keep(self) -> None:
        now = State(dict(self._names), dict(self._contents), dict(self._safe_names), dict(self._safe_contents))
        if not self.states or now != self.states[-1]:
            self.states.append(now)

    def _visit(self, folder: Path) -> None:
        number = self._held(folder)
        names: dict[str, int] = {}
        for entry in sorted(os.listdir(folder)):
            path = folder / entry
            try:
                found = path.lstat()
                names[entry] = self._held(path)
            except FileNotFoundError:
                continue  # Another thread's, which is at work.
            if stat.S_ISDIR(found.st_mode):
                self._visit(path)
                continue
            stamp = (found.st_mtime_ns, found.st_size)
            if self._stamps.get(found.st_ino) != stamp or time.time_ns() - found.st_mtime_ns < _RECENT:
                self._contents[found.st_ino] = self._read(found.st_ino)
                self._stamps[found.st_ino] = stamp
        self._names[number] = names

    def _held(self, path: Path) -> int:
        number = path.lstat().st_ino
        if number not in self._handles:
            self._handles[number] = os.open(path, os.O_RDONLY)
        return number

    def _read(self, number: int) -> str:
        handle = self._handles[number]
        content = os.pread(handle, os.fstat(handle).st_size, 0)
        digest = hashlib.sha256(content).hexdigest()
        self.stored.setdefault(digest, content)
        return digest


_recordings: list[Recording] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _recordings and event in _EVENTS:
        recording = _recordings[-1]
        if any(str(recording.root) in str(argument) for argument in arguments[:2]):
            recording.look()


@contextmanager
def recorded(root: Path) -> Iterator[Recording]:
    """Record what the block does below ``root``, an existing folder."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if not getattr(_audit, "added", False):
        sys.addaudithook(_audit)
        _audit.added = True  # type: ignore[attr-defined]
    recording, real = Recording(root), os.fsync
    recording.begin()

    def fsync(file: Any) -> None:
        handle = file if isinstance(file, int) else file.fileno()
        if not recording.flush(handle):
            real(handle)

    _recordings.append(recording)
    os.fsync = fsync
    try:
        yield recording
        recording.look()
    finally:
        os.fsync = real
        _recordings.pop()
        recording.end()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def cut(recording: Recording, state: State, rng: random.Random, target: Path) -> None:
    """Make ``target`` what a power cut at ``state`` could leave of the recorded folder."""
    share = rng.choice((0.0, 0.5, 1.0))  # Of what was not flushed: nothing, some of it, or all names without the bytes.
    root = next(number for number in state.names if number == recording.root.lstat().st_ino)
    changed = {
        (folder, name): rng.random() < share
        for folder in sorted({*state.names, *state.safe_names})
        for name in sorted({*state.names.get(folder, {}), *state.safe_names.get(folder, {})})
        if state.names.get(folder, {}).get(name) != state.safe_names.get(folder, {}).get(name)
    }
    arrived = {
        state.names[folder][name]
        for (folder, name), kept in changed.items()
        if kept and name in state.names.get(folder, {})
    }
    moved = {number for names in state.names.values() for number in names.values()}
    contents: dict[int, bytes] = {}

    def content(number: int) -> bytes:
        if number not in contents:
            contents[number] = _torn(recording, state, number, rng, whole_names=share == 1.0)
        return contents[number]

    def write(number: int, place: Path) -> None:
        place.mkdir()
        now, safe = state.names.get(number, {}), state.safe_names.get(number, {})
        for name in sorted({*now, *safe}):
            found = now.get(name) if changed.get((number, name), True) else safe.get(name)
            before = safe.get(name)
            if found is None and before in moved and before not in arrived:
                found = before  # It has another name now, which did not reach the disk.
            if found is None:
                continue
            if found in state.names or found in state.safe_names or found not in state.contents:
                write(found, place / name)
            else:
                (place / name).write_bytes(content(found))

    write(root, target)


def _torn(recording: Recording, state: State, number: int, rng: random.Random, *, whole_names: bool) -> bytes:
    now, safe = state.contents[number], state.safe_contents.get(number)
    new, old = recording.stored[now], b"" if safe is None else recording.stored[safe]
    if now == safe:
        return new
    length = rng.randrange(len(new) + 1) // _SECTOR * _SECTOR
    kinds = (old, new[:length], new[:length] + bytes(len(new) - length), *(() if whole_names else (new,)))
    return rng.choice(kinds)


@dataclass(frozen=True)
class Case:
    """A command that may be cut off.

    Attributes:
        begin: puts what stands before the command into a folder.
        work: the command, on that folder; called again, it continues.
        faults: what is vouched for in a folder and missing or torn, compared with the folder of an undisturbed run.
        differs: whether a folder differs from that of an undisturbed run once the command has ended.
    """

    begin: Callable[[Path], None]
    work: Callable[[Path], object]
    faults: Callable[[Path, Path], list[str]]
    differs: Callable[[Path, Path], bool]


@dataclass
class Tally:
    """What became of the points: cuts tried, vouched for and lost or torn, continued, and of these the differing."""

    states: int = 0
    tried: int = 0
    faults: list[str] = field(default_factory=list)
    continued: int = 0
    differing: list[str] = field(default_factory=list)


def cut_off(case: Case, folder: Path, points: int, *, seed: int = 5, continue_every: int = 1) -> Tally:
    """Record a case once, cut it at random points and continue from there.

    Args:
        case: the command.
        folder: an empty one to work in.
        points: cuts to try; the last one comes after the command has ended, which then has to be complete.
        seed: of the points and of what is lost.
        continue_every: continue after every so many cuts; the others are only looked at.
    """
    whole, root = folder / "whole", folder / "root"
    for place in (whole, root):
        place.mkdir()
        case.begin(place)
    case.work(whole)
    with recorded(root) as recording:
        case.work(root)
    tally = Tally(states=len(recording.states))
    if case.differs(root, whole):
        tally.differing.append("undisturbed")
    for point in range(points):
        rng = random.Random(f"{seed}/{point}")
        last = point == points - 1
        number = len(recording.states) - 1 if last else rng.randrange(len(recording.states))
        place = folder / "cut"
        cut(recording, recording.states[number], rng, place)
        at = f"point {point}, state {number} of {len(recording.states)}"
        tally.tried += 1
        tally.faults += [f"{at}: {fault}" for fault in case.faults(place, whole)]
        if last and case.differs(place, whole):
            tally.faults.append(f"{at}: not complete after the command has ended")
        if point % continue_every == 0:
            tally.continued += 1
            try:
                case.work(place)
                if case.differs(place, whole):
                    tally.differing.append(at)
            except Exception as error:
                tally.differing.append(f"{at}: {type(error).__name__}: {error}")
        shutil.rmtree(place)
    return tally
