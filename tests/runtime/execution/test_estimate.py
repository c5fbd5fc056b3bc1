"""What a run will take, and a disk that is too small for it: said early, with figures, and never half-written."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from busigen.errors import OutputError
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.dataset.shards import ShardRecord
from busigen.runtime.execution.estimate import Forecast, pace_of
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.output.base import LocalOutput
from busigen.runtime.progress import Progress
from tests.harness.command import error_line, run
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.processes import GUARD_SECONDS, events_of, read_until, started


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system with 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)]
    if os.name != "posix" or os.geteuid() != 0 or subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root, and a system that allows it")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(disk: Path) -> None:
    with pytest.raises(OutputError, match=r"has 8\.39 MB free, but the remaining 1000 samples need about 84\.0 MB"):
        generate(NoiseSource(), disk / "deep" / "set", count=1000, seed=7, shard_size=10)
    assert list(disk.iterdir()) == []


def test_no_disk_holds_a_billion_samples(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free > 80e12:
        pytest.skip("this disk does")
    line = error_line(run("generate", "--count", 10**9, "--out", tmp_path / "deep" / "set"), 4)
    assert re.search(r" has [\d.]+ .B free, but the remaining 1000000000 samples need about 80\.0 TB", line)
    assert "80.0 kB per sample, the most one can take, none is measured yet" in line
    assert "Free some space, then run the same command again" in line
    assert list(tmp_path.iterdir()) == []
    # Beyond what keys can number.
    assert "from 1 to 1000000000" in error_line(run("generate", "--count", 10**12, "--out", tmp_path / "set"), 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shard_size", "message"),
    [
        # A neighbour takes the room while the second of four shards is drawn: the check after the first one sees it.
        (10, r"has [\d.]+ kB free, but the remaining 30 samples need about 6\.\d+ MB \(6\d\.\d kB per sample, "),
        # While the only one is drawn: there is no further check, and it is the disk that refuses.
        (40, r"No space left on device\. .* is free, but the remaining 40 samples need about 7\.20 MB"),
    ],
    ids=["between shards", "in a shard"],
)
def test_a_disk_that_becomes_full_loses_nothing(disk: Path, tmp_path: Path, shard_size: int, message: str) -> None:
    out, neighbour = disk / "set", disk / "neighbour"
    first = out / "shards" / "000000.json"

    class Crowded(NoiseSource):
        def draw(self, seed, indices, done):
            if indices[-1] in (19, 39):
                # The first of several shards may still be on its way to the disk, and has to find room there.
                while indices[0] and not first.exists():
                    time.sleep(0.01)
                neighbour.write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 300_000)))
            return super().draw(seed, indices, done)

    with pytest.raises(OutputError, match=message) as caught:
        generate(Crowded(), out, count=40, seed=7, shard_size=shard_size)
    assert "same command again" in caught.value.fix
    assert not list(out.rglob(".tmp-*"))
    kept = hashes(out)
    assert first.exists() == (shard_size == 10), "what was complete is kept"
    # As full as before, a rerun is refused before it draws, and touches nothing.
    with pytest.raises(OutputError, match=r"free, but the remaining .* samples need about"):
        generate(NoiseSource(), out, count=40, seed=7, shard_size=shard_size)
    assert hashes(out) == kept
    neighbour.unlink()
    generate(NoiseSource(), out, count=40, seed=7, shard_size=shard_size)
    generate(NoiseSource(), tmp_path / "roomy", count=40, seed=7, shard_size=shard_size)
    assert hashes(out) == hashes(tmp_path / "roomy")
    assert verify(out).ok


def test_a_long_run_is_foretold_once_and_at_once_when_it_is_continued(tmp_path: Path) -> None:
    out, log = tmp_path / "set", tmp_path / "log"
    for basis in ("the first shard of this run", "the pace of the"):
        process = started(out, 10_000, 5, 7, 0.02, log)
        line = read_until(process, "will take about")[-1]
        assert re.match(
            r"generating: the remaining \d+ samples will take about \d+ (min|h \d+ min) and 7\d\d MB of", line
        )
        assert basis in line and "at most" not in line
        while len(list((out / "shards").glob("*.json"))) < 4:
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=GUARD_SECONDS)
        assert "will take about" not in errors
    events = events_of(log.read_text())
    first, second = (event for event in events if event["event"] == "predicted")
    assert first["samples"] == 9995 > second["samples"]
    # 0.02 s of sleep is what a sample takes at least; five of them fit into the first run's time.
    ended = next(event["elapsed"] for event in events if event["event"] == "interrupted")
    assert all(0.02 <= event["seconds"] / event["samples"] <= ended / 5 for event in (first, second))


def test_what_a_large_run_may_take_of_the_disk_is_told_before_its_first_sample(tmp_path: Path) -> None:
    if shutil.disk_usage(tmp_path).free < 2e9:
        pytest.skip("this disk has no room for such a run")
    process = started(tmp_path / "set", 15_000, 5, 7, 0.02)
    lines = read_until(process, "will take")
    process.kill()
    process.communicate()
    # 80 kB each, the most that one can take, and 4 MB for the preview and the like.
    expected = r"generating: 15000 samples will take at most 1\.20 GB of [\d.]+ .B free; how long it takes is told"
    assert re.match(expected, lines[-1])
    assert lines[:-1] == ["generating: 0/15000\n"]


def test_the_pace_on_disk_knows_no_pauses_and_no_clock_set_back(tmp_path: Path) -> None:
    generate(NoiseSource(), tmp_path, count=12, seed=7, shard_size=2)
    records = {number: ShardRecord.read(tmp_path, number) for number in range(6)}
    # A pause of an hour before shard 2, and a clock set back by a day before shard 4.
    for number, written in enumerate((0, 10, 3610, 3622, 3622 - 86_400, 3633 - 86_400)):
        os.utime(tmp_path / "shards" / f"{number:06d}.json", (1e9 + written, 1e9 + written))
    assert pace_of(tmp_path, records) == pytest.approx((12 + 11) / 2 / 2)  # Median of 10, 11, 12 and 3600 s a shard.
    assert pace_of(tmp_path, {number: records[number] for number in (0, 1, 3)}) is None, "one gap says too little"


class ReadyMade(NoiseSource):
    """An engine that takes no time at all."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.made = super().draw(7, range(count), lambda samples: None).samples

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        done(len(indices))
        return SampleBatch([replace(self.made[index], attempt=0) for index in indices], [])


class Predictions(Progress):
    """Remembers the forecast."""

    forecast: Forecast

    def predicted(self, forecast: Forecast) -> None:
        self.forecast = forecast


class SlowDisk(LocalOutput):
    """Takes half a second for a shard, at least."""

    def keep(self, record: ShardRecord) -> None:
        time.sleep(0.5)


def test_where_writing_is_slower_than_drawing_the_forecast_goes_by_writing(tmp_path: Path) -> None:
    progress = Predictions()
    generate(ReadyMade(90), SlowDisk(tmp_path / "set"), count=90, seed=7, shard_size=30, progress=progress)
    # Two more shards like the first; drawing all of them takes a hundredth of a second.
    assert progress.forecast.seconds >= 2 * 0.5
