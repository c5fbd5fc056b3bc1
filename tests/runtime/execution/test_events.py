"""The log for programs: every line is JSON with the documented keys, the last one says how the run ended."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from busigen.runtime.execution.estimate import FINISH_BYTES
from tests.harness.command import error_line, run
from tests.harness.processes import GUARD_SECONDS, ROOT, command, events_of, started


def documented() -> dict[str, set[str]]:
    """Keys by event, from the table in the documentation."""
    page = (ROOT / "docs" / "progress.md").read_text()
    rows = re.findall(r"^\| `?(\w+)`? \| [^|]*\| ([^|]+) \|$", page.split("## For programs")[1], re.MULTILINE)
    # Explanations stand in parentheses and may quote values.
    keys = {event: set(re.findall(r"`(\w+)`", re.sub(r"\([^)]*\)", "", text))) for event, text in rows}
    common = keys.pop("all")
    return {event: common | named for event, named in keys.items() if event != "event"}


def logged(
    out: Path, log: object, count: int, shard_size: int, seconds: float = 0.0
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(out, count, shard_size, 7, seconds, log),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=GUARD_SECONDS,
    )


def test_a_run_by_its_log(tmp_path: Path) -> None:
    out, log = tmp_path / "set", tmp_path / "log.jsonl"
    assert logged(out, log, 60, 10, 0.01).returncode == 0
    events = events_of(log.read_text())
    assert all(set(event) == documented()[event["event"]] for event in events)
    assert [event["elapsed"] for event in events] == sorted(event["elapsed"] for event in events)

    finished = events[-1]
    assert finished["event"] == "finished"
    assert (finished["samples"], finished["shards_written"], finished["rejected"]) == (60, 6, {"too dark": 9})
    shards = [event for event in events if event["event"] == "shard_written"]
    assert [(event["number"], event["shards_done"]) for event in shards] == [(n, n + 1) for n in range(6)]
    assert all((out / event["file"]).is_file() for event in shards)
    assert sum(event["bytes"] for event in shards) == finished["bytes"]
    last = [event for event in events if event["event"] == "progress"][-1]
    assert (last["done"], last["total"], last["shards_done"], last["shards"]) == (60, 60, 6, 6)
    assert last["acceptance"] == round(60 / 69, 4)

    (predicted,) = [event for event in events if event["event"] == "predicted"]
    # 0.01 s of sleep is what a sample takes at least, and the first ten are there when it is said.
    assert 0.01 <= predicted["seconds"] / predicted["samples"] <= predicted["elapsed"] / 10
    files = [path for path in out.rglob("*") if path.is_file() and path.stem != "000000"]
    rest = sum(path.stat().st_size for path in files)
    # Never less than it takes; the preview and the like are counted with the most that they can take.
    assert rest <= predicted["bytes"] <= 1.05 * rest + FINISH_BYTES
    assert predicted["bytes_per_sample"] == round(shards[0]["bytes"] / 10)

    assert logged(out, log, 60, 10).returncode == 0
    rerun = events_of(log.read_text())[len(events) :]
    assert [(event["event"], event["already_complete"]) for event in rerun] == [("finished", True)]


def test_generate_logs_to_standard_output(tmp_path: Path) -> None:
    done = run(
        "generate", "--count", 3, "--shard-size", 2, "--batch-size", 2, "--out", tmp_path / "set", "--log-json", "-"
    )
    assert done.returncode == 0, done.stderr
    events = events_of(done.stdout)
    assert all(set(event) == documented()[event["event"]] for event in events)
    assert (events[0]["event"], events[0]["count"], events[0]["provider"]) == ("started", 3, "cpu")
    assert (events[-1]["event"], events[-1]["samples"]) == ("finished", 3)
    stages = [event for event in events if event["event"] == "progress"][-1]["stages"]
    assert set(stages) == {"prior", "context", "mask", "encoder", "lesion", "blend", "decoder"}
    assert sum(stages.values()) == pytest.approx(1, abs=1e-3)  # Seven figures of four digits.
    assert "3 samples (" in done.stderr and "engine time: " in done.stderr


def test_a_failed_run_says_so_in_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log"
    line = error_line(run("generate", "--count", 0, "--out", tmp_path / "set", "--log-json", log), 2)
    events = events_of(log.read_text())
    assert [event["event"] for event in events] == ["started", "failed"]
    assert all(set(event) == documented()[event["event"]] for event in events)
    assert (events[-1]["error"], events[-1]["exit_code"]) == ("UsageError", 2)
    assert line == f"error: {events[-1]['message']} {events[-1]['fix']}"


def test_a_log_that_has_no_place(tmp_path: Path) -> None:
    out = tmp_path / "set"
    line = error_line(run("generate", "--count", 1, "--out", out, "--log-json", out / "log"), 2)
    assert f"--log-json {out / 'log'} lies in --out {out}" in line
    line = error_line(run("generate", "--count", 1, "--out", out, "--log-json", tmp_path / "missing" / "log"), 4)
    assert str(tmp_path / "missing" / "log") in line
    assert not out.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_log_that_cannot_be_written_ends_no_run(tmp_path: Path) -> None:
    done = logged(tmp_path / "set", "/dev/full", 4, 2)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("--log-json ends here, it cannot be written: No space left on device") == 1
    assert (tmp_path / "set" / "dataset.json").exists()


def test_a_reader_that_goes_away_ends_no_run(tmp_path: Path) -> None:
    process = started(tmp_path / "set", 4, 2, 7, 0.0, "-")
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=GUARD_SECONDS) == 0, errors
    assert (tmp_path / "set" / "dataset.json").exists()
