"""Runs of the factory that something happens to, one process each, and what is lost, torn or repeated afterwards.

Each run is forked from a process that has done its imports, so that it is at work after a moment: a kill falls into
the run and not into the start-up. This process must never use polars itself, whose threads do not survive a fork.

``python -m tests.runtime.faulting FAULT FOLDER TIMES SEED`` lets a fault of ``FAULTS`` happen to runs of a small
dataset at random instants, continues each until it is finished, and prints the tally as JSON.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from busigen.errors import BusigenError
from busigen.runtime.factory import generate
from busigen.runtime.layout import TEMPORARY_PREFIX
from busigen.runtime.repair import repair
from busigen.runtime.sample import Source
from busigen.runtime.supervise import supervised
from busigen.runtime.verify import verify
from tests.hashing import hashes
from tests.runtime.happening import Happening, Painting, another_image, clock_library, die, fill_up, mount, small_disk
from tests.runtime.noise_source import NoiseSource
from tests.runtime.processes import ROOT
from tests.runtime.replaying import NoiseInputs

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


def undisturbed(out: Path) -> dict[str, str]:
    """The hashes of a dataset that nothing happened to."""
    assert ended(forked(writing(out))) == 0
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


def kill(folder: Path, times: int, seed: int) -> Tally:
    """SIGKILL at random instants of runs; the same command then continues, and may be killed as well."""
    return _ended_early(folder, times, seed, signal.SIGKILL, -signal.SIGKILL)


def terminate(folder: Path, times: int, seed: int) -> Tally:
    """SIGTERM at random instants, after which a run finishes its shard and ends with 143."""
    return _ended_early(folder, times, seed, signal.SIGTERM, 143)


def _ended_early(folder: Path, times: int, seed: int, number: int, code: int) -> Tally:
    rng, tally = random.Random(seed), Tally()
    started = time.monotonic()
    whole = undisturbed(folder / "whole")
    lasted = time.monotonic() - started
    while tally.tried < times:
        out = folder / str(tally.finished)
        while not (out / "dataset.json").exists() and tally.tried < times:
            before = complete(out)
            process = forked(writing(out, NoiseSource(0.01 if number == signal.SIGTERM else 0.0)))
            time.sleep(rng.uniform(0.0, lasted))
            os.kill(process, number)
            found = ended(process)
            # A signal before the run listens to it ends it as by default; one that comes too late finds it finished.
            assert found in (0, code, -number), found
            tally.tried += found != 0
            # How long a run takes depends on what else the machine does: this keeps most instants within it, anywhere.
            lasted *= 1.15 if found else 0.7
            judge(out, before, whole, tally)
        _continued(out, whole, tally)
        shutil.rmtree(out)
    return tally


def _continued(out: Path, whole: dict[str, str], tally: Tally, source: Source | None = None) -> None:
    """Give the same command again, which has to finish the dataset, and judge it."""
    before = complete(out)
    code = ended(forked(writing(out, source)))
    assert code == 0, code
    judge(out, before, whole, tally)
    judge_finished(out, whole, tally)


def together(folder: Path, times: int, seed: int) -> Tally:
    """Three processes start on one folder at once: one writes, the others are refused."""
    tally, whole = Tally(), undisturbed(folder / "whole")
    for number in range(times):
        tally.tried += 1
        out = folder / str(number)
        codes = [ended(process) for process in [forked(writing(out)) for _ in range(3)]]
        assert 0 in codes and set(codes) <= {0, 4}, codes
        tally.unnoticed += codes.count(4) == 0
        judge(out, {}, whole, tally)
        judge_finished(out, whole, tally)
    return tally


def full_disk(folder: Path, times: int, seed: int) -> Tally:
    """A neighbour fills the disk, a file system of 8 MiB, while a shard is drawn; then it makes room again."""
    rng, tally = random.Random(seed), Tally()
    whole = undisturbed(folder / "whole")
    with small_disk(folder / "disk") as disk:
        for number in range(times if disk else 0):
            tally.tried += 1
            out, neighbour = disk / str(number), disk / "neighbour"
            place, left = rng.randrange(COUNT), rng.randrange(200_000)
            fill = partial(fill_up, disk, neighbour, left)
            code = ended(forked(writing(out, Happening(place, fill))))
            assert code in (0, 4), code
            tally.unnoticed += code == 0 and left < 50_000
            judge(out, {}, whole, tally)
            neighbour.unlink()
            _continued(out, whole, tally)
            shutil.rmtree(out)
    return tally


def read_only(folder: Path, times: int, seed: int) -> Tally:
    """A run is killed, its disk becomes read-only, the run is continued in vain; then the disk is as before."""
    rng, tally = random.Random(seed), Tally()
    whole = undisturbed(folder / "whole")
    with small_disk(folder / "disk") as disk:
        for number in range(times if disk else 0):
            tally.tried += 1
            out = disk / str(number)
            place = rng.randrange(COUNT)
            code = ended(forked(writing(out, Happening(place, die))))
            assert code == -signal.SIGKILL, code
            before, bytes_before = complete(out), hashes(out)
            mount("-o", "remount,ro", disk)
            code = ended(forked(writing(out)))
            tally.unnoticed += code != 4 or hashes(out) != bytes_before
            mount("-o", "remount,rw", disk)
            judge(out, before, whole, tally)
            _continued(out, whole, tally)
            shutil.rmtree(out)
    return tally


def flipped(folder: Path, times: int, seed: int) -> Tally:
    """One bit of a shard's files or of the manifest is flipped; verify names the file, repair restores it."""

    def flip(path: Path, rng: random.Random) -> bytes:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)

    return _damaged(folder, times, seed, lambda name: name.startswith("shards/") or name == "manifest.parquet", flip)


def truncated(folder: Path, times: int, seed: int) -> Tally:
    """The manifest is cut short anywhere; verify names it, repair restores it."""
    return _damaged(
        folder,
        times,
        seed,
        lambda name: name == "manifest.parquet",
        lambda path, rng: path.read_bytes()[: rng.randrange(path.stat().st_size)],
    )


def _damaged(
    folder: Path,
    times: int,
    seed: int,
    concerns: Callable[[str], bool],
    damage: Callable[[Path, random.Random], bytes],
) -> Tally:
    rng, tally, out = random.Random(seed), Tally(), folder / "whole"
    whole = undisturbed(out)
    names = sorted(filter(concerns, whole))
    for _ in range(times):
        tally.tried += 1
        name = rng.choice(names)
        (out / name).write_bytes(damage(out / name, rng))

        def mended(name: str = name) -> int:
            named = any(problem.file == name for problem in verify(out).problems)
            report = repair(out, inputs=NoiseInputs())
            return (0 if named else 1) + (0 if report.error is None else 2)

        code = ended(forked(mended))
        assert code in (0, 1, 2, 3), code
        tally.unnoticed += code & 1
        judge(out, {}, whole, tally)
        judge_finished(out, whole, tally)
    return tally


def healthy(folder: Path, times: int, seed: int) -> Tally:
    """The healthy folder changes while a shard is drawn: an image is another, cut short, gone, or one is added."""
    rng, tally, images = random.Random(seed), Tally(), folder / "images"
    images.mkdir(parents=True)
    for number in range(5):
        pixels = np.random.default_rng(number).integers(40, 140, (64, 80), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    kept = {path: path.read_bytes() for path in images.iterdir()}
    source = Painting(images)
    assert ended(forked(writing(folder / "whole", source))) == 0
    whole = hashes(folder / "whole")
    for number in range(times):
        tally.tried += 1
        out, path = folder / str(number), rng.choice(sorted(kept))
        other = kept[path.with_name(f"{(int(path.stem) + 1) % 5}.png")]
        changes: list[Callable[[], object]] = [
            partial(path.write_bytes, other),
            partial(path.write_bytes, kept[path][:-50]),
            path.unlink,
            partial((images / "new.png").write_bytes, another_image()),
        ]
        happening = Painting(images, rng.randrange(COUNT), changes[number % len(changes)])
        code = ended(forked(writing(out, happening)))
        tally.unnoticed += code != 5
        judge(out, {}, whole, tally)
        (images / "new.png").unlink(missing_ok=True)
        for place, data in kept.items():
            place.write_bytes(data)
        _continued(out, whole, tally, source)
    return tally


def clock(folder: Path, times: int, seed: int) -> Tally:
    """The clock is set back by a year in the middle of a run, which is then killed and continued at that time."""
    rng, tally = random.Random(seed), Tally()
    whole = undisturbed(folder / "whole")
    library = clock_library(folder)
    for number in range(times if library else 0):
        tally.tried += 1
        out, now = folder / str(number), folder / "now"
        now.unlink(missing_ok=True)
        told = {"LD_PRELOAD": str(library), "CLOCK_SET_BACK": str(now)}
        command = [sys.executable, "-m", "tests.runtime.noise_source", *map(str, (out, COUNT, SHARD_SIZE, SEED, 0.05))]
        run = partial(subprocess.Popen, command, cwd=ROOT, env={**os.environ, **told}, stderr=subprocess.DEVNULL)
        process = run()
        while not complete(out) and process.poll() is None:
            time.sleep(0.01)
        now.touch()
        time.sleep(rng.uniform(0.0, 0.3))
        process.kill()
        process.wait()
        before = complete(out)
        judge(out, {}, whole, tally)
        assert run().wait() == 0
        judge(out, before, whole, tally)
        judge_finished(out, whole, tally)
    return tally


FAULTS: dict[str, Callable[[Path, int, int], Tally]] = {
    task.__name__: task
    for task in (kill, terminate, full_disk, read_only, flipped, truncated, together, healthy, clock)
}

if __name__ == "__main__":
    task, place, times, seed = sys.argv[1:]
    Path(place).mkdir(parents=True, exist_ok=True)
    print(json.dumps(asdict(FAULTS[task](Path(place), int(times), int(seed)))))
