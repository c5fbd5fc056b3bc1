"""Faults that happen to runs of the factory, again and again at random instants (see judging.py).

``python -m tests.harness.fault_injection FAULT FOLDER TIMES SEED [default]`` lets a fault of ``FAULTS`` happen to runs
of a
small dataset, continues each until it is finished, and prints the tally as JSON. ``default`` takes the shipped bundle
in the place of noise, for the faults of ``BUNDLE_FAULTS``.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from busigen.files import TEMPORARY_PREFIX
from busigen.runtime.maintenance.repair import repair
from tests.harness.crash_harness import (
    BUNDLE,
    COUNT,
    NOISE,
    SEED,
    SHARD_SIZE,
    Runs,
    Tally,
    complete,
    ended,
    forked,
    judge,
    judge_finished,
    undisturbed,
    writing,
)
from tests.harness.fault_sources import (
    Happening,
    Painting,
    another_image,
    clock_library,
    die,
    fill_up,
    mount,
    small_disk,
)
from tests.harness.hashing import hashes
from tests.harness.processes import ROOT
from tests.harness.replaying import NoiseInputs


def kill(folder: Path, times: int, seed: int, runs: Runs = NOISE) -> Tally:
    """SIGKILL at random instants of runs; the same command then continues, and may be killed as well."""
    return _ended_early(folder, times, seed, signal.SIGKILL, -signal.SIGKILL, runs)


def terminate(folder: Path, times: int, seed: int, runs: Runs = NOISE) -> Tally:
    """SIGTERM at random instants, after which a run finishes its shard and ends with 143."""
    return _ended_early(folder, times, seed, signal.SIGTERM, 143, runs)


def _ended_early(folder: Path, times: int, seed: int, number: int, code: int, runs: Runs) -> Tally:
    rng, tally = random.Random(seed), Tally()
    started = time.monotonic()
    whole = undisturbed(folder / "whole", runs)
    lasted = time.monotonic() - started
    while tally.tried < times:
        out = folder / str(tally.finished)
        while not (out / "dataset.json").exists() and tally.tried < times:
            before = complete(out)
            process = runs.begin(out, 0.01 if number == signal.SIGTERM else 0.0)
            time.sleep(rng.uniform(0.0, lasted))
            os.kill(process, number)
            found = ended(process)
            # A signal before the run listens to it ends it as by default; one that comes too late finds it finished.
            assert found in (0, code, -number), found
            tally.tried += found != 0
            # How long a run takes depends on what else the machine does: this keeps most instants within it, anywhere.
            lasted *= 1.15 if found else 0.7
            judge(out, before, whole, tally)
        _continued(out, whole, tally, partial(runs.begin, out, 0.0))
        shutil.rmtree(out)
    return tally


def _continued(out: Path, whole: dict[str, str], tally: Tally, begin: Callable[[], int] | None = None) -> None:
    """Give the same command again, which has to finish the dataset, and judge it."""
    before = complete(out)
    code = ended(begin() if begin else forked(writing(out)))
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


def flipped(folder: Path, times: int, seed: int, runs: Runs = NOISE) -> Tally:
    """One bit of a shard's files or of the manifest is flipped; verify names the file, repair restores it."""

    def flip(path: Path, rng: random.Random) -> bytes:
        data = bytearray(path.read_bytes())
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        return bytes(data)

    concerned = re.compile(r"shards/.*|manifest\.parquet")
    return _damaged(folder, times, seed, concerned, flip, runs)


def truncated(folder: Path, times: int, seed: int, runs: Runs = NOISE) -> Tally:
    """The manifest is cut short anywhere; verify names it, repair restores it."""

    def cut(path: Path, rng: random.Random) -> bytes:
        return path.read_bytes()[: rng.randrange(path.stat().st_size)]

    return _damaged(folder, times, seed, re.compile(r"manifest\.parquet"), cut, runs)


def _damaged(
    folder: Path,
    times: int,
    seed: int,
    concerned: re.Pattern[str],
    damage: Callable[[Path, random.Random], bytes],
    runs: Runs,
) -> Tally:
    rng, tally, out = random.Random(seed), Tally(), folder / "whole"
    whole = undisturbed(out, runs)
    names = sorted(filter(concerned.fullmatch, whole))
    for _ in range(times):
        tally.tried += 1
        name = rng.choice(names)
        (out / name).write_bytes(damage(out / name, rng))
        code = ended(runs.mend(out, name))
        assert code in (0, 1, 2, 3), code
        tally.unnoticed += code & 1
        judge(out, {}, whole, tally)
        judge_finished(out, whole, tally)
    return tally


def mending(folder: Path, times: int, seed: int) -> Tally:
    """SIGKILL at random instants of repairs of several files; the same repair is then given again, and killed again."""
    rng, tally, out = random.Random(seed), Tally(), folder / "whole"
    whole = undisturbed(out)
    lasted = 0.5

    def mended() -> int:
        # What a killed repair leaves outside of the dataset is not to stay beyond the test.
        tempfile.tempdir = str(folder)
        return 0 if repair(out, inputs=NoiseInputs()).error is None else 71

    while tally.tried < times:
        spoilt = _spoil(out, sorted(whole), rng)
        code = -1
        while code and tally.tried < times:
            before = _sound(out, whole)
            process = forked(mended)
            time.sleep(rng.uniform(0.0, lasted))
            os.kill(process, signal.SIGKILL)
            code = ended(process)
            assert code in (0, -signal.SIGKILL), code
            tally.tried += code != 0
            lasted *= 1.15 if code else 0.7
            _judge_mended(out, before, spoilt, whole, tally)
        before = _sound(out, whole)
        assert ended(forked(mended)) == 0
        _judge_mended(out, before, {}, whole, tally)
        judge_finished(out, whole, tally)
    return tally


def _spoil(out: Path, names: list[str], rng: random.Random) -> dict[str, str]:
    """Damage or remove a few files of which enough is recorded elsewhere; the hashes of those that are still there."""
    chosen = rng.sample([name for name in names if name.startswith("shards/") or name == "manifest.parquet"], 4)
    for path in (out / name for name in chosen):
        if path.suffix == ".json" or rng.random() < 0.3:
            path.unlink()
        else:
            path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    found = hashes(out)
    return {name: found[name] for name in chosen if name in found}


def _sound(out: Path, whole: dict[str, str]) -> dict[str, tuple[int, int]]:
    """Inode and time of the shards' files that are as they should be."""
    files = [name for name, digest in hashes(out).items() if name.startswith("shards/") and whole.get(name) == digest]
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in files}


def _judge_mended(
    out: Path, before: dict[str, tuple[int, int]], spoilt: dict[str, str], whole: dict[str, str], tally: Tally
) -> None:
    """Count files that were sound and are no longer, or were written again, and ones with bytes of neither kind."""
    after = _sound(out, whole)
    tally.lost += sum(name not in after for name in before)
    tally.repeated += sum(name in after and after[name] != stamp for name, stamp in before.items())
    tally.torn += sum(
        digest not in (whole.get(name), spoilt.get(name))
        for name, digest in hashes(out).items()
        if TEMPORARY_PREFIX not in name and name != ".lock"
    )


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
        _continued(out, whole, tally, partial(forked, writing(out, source)))
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
        described = {"LD_PRELOAD": str(library), "CLOCK_SET_BACK": str(now)}
        command = [sys.executable, "-m", "tests.harness.noise_source", *map(str, (out, COUNT, SHARD_SIZE, SEED, 0.05))]
        run = partial(subprocess.Popen, command, cwd=ROOT, env={**os.environ, **described}, stderr=subprocess.DEVNULL)
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


FAULTS: dict[str, Callable[..., Tally]] = {
    task.__name__: task
    for task in (kill, terminate, mending, full_disk, read_only, flipped, truncated, together, healthy, clock)
}

BUNDLE_FAULTS = ("kill", "terminate", "flipped", "truncated")

if __name__ == "__main__":
    task, place, times, seed, *bundle = sys.argv[1:]
    Path(place).mkdir(parents=True, exist_ok=True)
    how = {"runs": BUNDLE} if bundle == ["default"] and task in BUNDLE_FAULTS else {}
    print(json.dumps(asdict(FAULTS[task](Path(place), int(times), int(seed), **how))))
