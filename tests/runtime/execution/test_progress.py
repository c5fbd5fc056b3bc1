"""What a waiting person reads: counts, rates and times that are neither early, nor too hopeful, nor missing."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import pytest

from busigen.errors import InputError
from busigen.runtime.execution.factory import generate
from busigen.runtime.progress import Bar, Progress, console_progress
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.terminal import Terminal
from busigen.text import counted, disk_size, duration
from tests.harness.noise_source import NoiseSource


class Clock:
    """Stands for the module ``time``, and goes on only where a test says so."""

    seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("busigen.runtime.progress.time", clock)
    return clock


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    progress = console_progress()
    generate(NoiseSource(), tmp_path, count=8, seed=7, shard_size=4, progress=progress)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "generating: 0/8"
    assert lines[-1].startswith("generating: 8/8")
    assert "samples/s, 88.9% accepted" in lines[-1]
    assert "left" not in lines[-1]


def test_lines_tell_shards_stages_and_the_rate_of_now(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        progress.stage_seconds = lambda: {"lesion": 3.0, "mask": 1.0}
        progress.start("generating", 2000, 100, shards=(1, 20))
        progress.advance(1000)
        assert progress.rate_now is None, "now is all there is"
        clock.seconds += 50
        for _ in range(5):
            progress.advance(20)
            clock.seconds += 5
        # A thousand at once, then four a second at most; the thousand lie further back than now looks.
        assert 0 < progress.rate_now <= 4 < progress.rate
        progress.advance(1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("generating: 1201/2000, 1/20 shards, ")
    assert " samples/s now, " in last and " samples/s overall, " in last
    assert last.endswith(" left; engine time: lesion 75%, mask 25%")


def test_a_bar_tells_the_same_and_leaves_notes_standing() -> None:
    file = StringIO()
    with Progress(Bar(Terminal(file=file, force_terminal=True, width=160))) as progress:
        progress.stage_seconds = lambda: {"lesion": 3.0, "mask": 1.0}
        progress.start("generating", 20, shards=(0, 2))
        progress.advance(5)
        progress.note("[half] way")
    shown = file.getvalue()
    assert "0/2 shards" in shown and "samples/s" in shown
    assert "engine time: lesion 75%, mask 25%" in shown
    assert "generating: [half] way\n" in shown


def test_every_phase_ends_with_its_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        for what in ("reading", "generating"):
            progress.start(what, 3)
            progress.advance(1)
            progress.advance(2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "reading: 0/3",
        "reading: 3/3",
        "generating: 0/3",
        "generating: 3/3",
    ]


def test_an_empty_folder_has_no_progress(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError), console_progress() as progress:
        HealthyFolder(tmp_path, progress)
    assert capsys.readouterr().err == ""


def test_remaining_time_is_told_once_there_is_something_to_judge_by(clock: Clock) -> None:
    progress = Progress()
    progress.start("generating", 100, 40)
    assert progress.left is None
    clock.seconds += 10
    progress.advance(20)
    # Twenty took ten seconds and forty remain.
    assert progress.left == pytest.approx(20)
    progress.advance(39)
    # One is left, but it takes a batch of its own.
    assert progress.left >= 5
    progress.advance(1)
    assert progress.left is None


def test_slow_runs_count_seconds_per_sample(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        progress.start("generating", 2)
        clock.seconds += 12
        progress.advance(1)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "12.0 s per sample, " in last and "12 s left" in last
    assert "samples/s" not in last


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3600, "60 min"), (12_345, "3 h 26 min")]
)
def test_durations_are_rounded_to_what_matters(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_plurals() -> None:
    assert [counted(number, "shard") for number in (0, 1, 2)] == ["0 shards", "1 shard", "2 shards"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1.00 kB"),
        (43_700, "43.7 kB"),
        (999_900, "1.00 MB"),
        (8e13, "80.0 TB"),
    ],
)
def test_disk_sizes_have_three_digits(size: float, text: str) -> None:
    assert disk_size(size) == text
