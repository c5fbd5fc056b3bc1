"""Small runs as processes of their own, and what is lost, torn or repeated after something happened to them.

Each run is forked from a process that has done its imports, so that it is at work after a moment: a kill falls into
the run and not into the start-up. This process must never use polars itself, whose threads do not survive a fork.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from busigen.errors import BusigenError
from busigen.files import TEMPORARY_PREFIX
from busigen.runtime.dataset.format import Source
from busigen.runtime.execution.events import supervised
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from tests.harness.command import CLI
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs

COUNT, SHARD_SIZE, SEED = 12, 2, 7
RUN = {"count": COUNT, "seed": SEED, "shard_size": SHARD_SIZE}
"""Six shards, so that there are many files to be torn."""


@dataclass
class Tally:
    """What became of the samples.

    Attributes:
        tried: times that something was done to a run.
        lost: samples that were complete before and were not, or not the same, afterwards.
        torn: files with a final name and other bytes than those of an undisturbed run.
        repeated: samples that a dataset holds twice, or that were complete and were made again.
        finished: datasets that were continued to the end; each was verified and compared byte for byte.
        differing: of these, the ones that ``verify`` finds fault with or that differ from an undisturbed run.
        unnoticed: faults that nothing spoke of, where something has to: by an exit code, or as ``verify``'s finding.
    """

    tried: int = 0
    lost: int = 0
    torn: int = 0
    repeated: int = 0
    finished: int = 0
    differing: int = 0
    unnoticed: int = 0


def forked(work: Callable[[], int]) -> int:
    """Start ``work`` in a process of its own, which ends with its result; returns the process's id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 70
    try:
        # What a run says is not of interest here, and stays off the terminal.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        code = work()
    except BusigenError as error:
        code = error.exit_code
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Wait for a process; its exit code, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def writing(out: Path, source: Source | None = None) -> Callable[[], int]:
    """A run to be forked, supervised like ``busigen generate``."""

    def work() -> int:
        with supervised(out, None) as (progress, stop):
            report = generate(source or NoiseSource(), out, **RUN, progress=progress, stop=stop)
        return 0 if report.samples == COUNT else 71

    return work


@dataclass(frozen=True)
class Runs:
    """How datasets of ``RUN`` are made and mended.

    Attributes:
        begin: starts a run with so many seconds per sample, if that can be chosen; returns the process's id.
        mend: starts the repair of a dataset of which one file is damaged; the process ends with 0, plus 1 where
            verify did not name the file, plus 2 where repair failed.
    """

    begin: Callable[[Path, float], int]
    mend: Callable[[Path, str], int]


def _mended(out: Path, name: str) -> int:
    named = any(problem.file == name for problem in verify(out).problems)
    report = repair(out, inputs=NoiseInputs())
    return (0 if named else 1) + (0 if report.error is None else 2)


def _mended_by_command(out: Path, name: str) -> int:
    found, mended = (
        subprocess.run([*CLI, "verify", str(out), *more], capture_output=True, text=True, check=False)
        for more in ((), ("--repair",))
    )
    named = found.returncode == 5 and name in found.stdout
    return (0 if named else 1) + (0 if mended.returncode == 0 else 2)


def _generating(out: Path, seconds: float) -> int:
    options = {"--count": COUNT, "--seed": SEED, "--shard-size": SHARD_SIZE, "--out": out}
    command = [*CLI, "generate", *(str(word) for option in options.items() for word in option)]
    silence = [(os.POSIX_SPAWN_OPEN, descriptor, os.devnull, os.O_WRONLY, 0) for descriptor in (1, 2)]
    return os.posix_spawn(command[0], command, os.environ, file_actions=silence)


NOISE = Runs(
    begin=lambda out, seconds: forked(writing(out, NoiseSource(seconds))),
    mend=lambda out, name: forked(partial(_mended, out, name)),
)
"""Forked, with a source of noise in the place of a bundle."""

BUNDLE = Runs(begin=_generating, mend=lambda out, name: forked(partial(_mended_by_command, out, name)))
"""The shipped bundle and the real commands, which take seconds to start."""


def undisturbed(out: Path, runs: Runs = NOISE) -> dict[str, str]:
    """The hashes of a dataset that nothing happened to."""
    assert ended(runs.begin(out, 0.0)) == 0
    return hashes(out)


def complete(out: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of both files of every shard that counts as complete."""
    found = {}
    for record in (out / "shards").glob("[0-9]*.json"):
        for path in (record.with_suffix(".tar"), record.with_suffix(".parquet")):
            found[path.name] = (path.stat().st_ino, path.stat().st_mtime_ns)
    return found


def judge(out: Path, before: dict[str, tuple[int, int]], whole: dict[str, str], tally: Tally) -> None:
    """Count what happened to the samples that were complete before, and what is torn."""
    after = complete(out)
    for name, stamp in before.items():
        if name.endswith(".tar") and name not in after:
            tally.lost += SHARD_SIZE
        elif name.endswith(".tar") and after[name] != stamp:
            tally.repeated += SHARD_SIZE
    tally.torn += sum(
        whole.get(name) != digest
        for name, digest in hashes(out).items()
        if TEMPORARY_PREFIX not in name and name != ".lock"
    )


def judge_finished(out: Path, whole: dict[str, str], tally: Tally) -> None:
    """Compare a finished dataset with the undisturbed one, and have it verified."""
    tally.finished += 1

    def check() -> int:
        report = verify(out)
        return min(100, report.duplicates) if report.ok or report.duplicates else 101

    said = ended(forked(check))
    tally.repeated += said if said <= 100 else 0
    tally.differing += bool(said) or hashes(out) != whole
