"""Ctrl-C and SIGTERM, sent to real processes: the open shard is finished, a second signal stops, nothing is torn."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.verify import verify
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.processes import GUARD_SECONDS, ROOT, Hold, events_of, listening, read_until, started, wait_for

SIGNALS = pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "Interrupted"), (signal.SIGTERM, 143, "Terminated")],
    ids=["SIGINT", "SIGTERM"],
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "set"
    generate(NoiseSource(), out, count=40, seed=7, shard_size=10)
    return hashes(out)


@SIGNALS
def test_the_open_shard_is_finished(
    tmp_path: Path, undisturbed: dict[str, str], number: int, code: int, said: str
) -> None:
    out, log = tmp_path / "set", tmp_path / "log"
    hold = Hold(tmp_path, 15)
    process = started(out, 40, 10, 7, 0.0, log, hold=hold)
    wait_for(process, lambda: (out / "shards" / "000000.json").exists() and hold.reached())
    process.send_signal(number)
    line = read_until(process, "finishing ")[-1]
    hold.release()
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == code, errors
    assert len(list((out / "shards").glob("*.json"))) == 2
    assert "finishing the open shard (" in line
    assert "Once more to stop at once." in line
    last = f"{said} with 2 of 4 shards complete in {out}. Run the same command again to continue."
    assert errors.splitlines()[-1] == last, "and nothing was lost"
    assert [str(problem) for problem in verify(out).problems] == [
        "dataset.json: is missing, the run is unfinished: 2 of 4 shards. "
        "The same `busigen generate` command continues it."
    ]
    end = events_of(log.read_text())[-1]
    assert (end["event"], end["signal"], end["exit_code"]) == ("interrupted", number, code)
    assert generate(NoiseSource(), out, count=40, seed=7, shard_size=10).written == 2
    assert hashes(out) == undisturbed


@SIGNALS
def test_a_second_signal_stops_at_once(
    tmp_path: Path, undisturbed: dict[str, str], number: int, code: int, said: str
) -> None:
    out = tmp_path / "set"
    # Nothing lets the first sample go on: only the second signal can end this.
    hold = Hold(tmp_path, 0)
    process = started(out, 40, 10, 7, hold=hold)
    wait_for(process, hold.reached)
    process.send_signal(number)
    read_until(process, "finishing ")
    process.send_signal(number)
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == code
    # The latter where this machine has so much to do that the process is taken for stuck.
    assert f"{said} with 0 of 4 shards complete in {out}." in errors or f"{said} while work was under way" in errors
    assert not list(out.rglob(".tmp-*"))
    generate(NoiseSource(), out, count=40, seed=7, shard_size=10)
    assert hashes(out) == undisturbed


@SIGNALS
@pytest.mark.parametrize("where", ["main", "thread", "workers"])
def test_a_second_signal_ends_an_engine_that_never_does(
    tmp_path: Path, number: int, code: int, said: str, where: str
) -> None:
    """No handler of Python's runs while an engine holds the main thread, or a thread that the main one waits for."""
    pytest.importorskip("onnx")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.harness.endless_source", str(tmp_path / "set"), where],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )
    at_work = read_until(process, "the engine is at work in process ")[-1]
    process.send_signal(number)
    read_until(process, "finishing ")
    process.send_signal(number)
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == code, errors
    assert f"{said} w" in errors.splitlines()[-1]
    engine = int(at_work.rpartition(" ")[2])
    deadline = time.monotonic() + GUARD_SECONDS
    while Path(f"/proc/{engine}/stat").exists():  # A worker's, which follows the process that started it.
        assert time.monotonic() < deadline, "the engine is still at work"
        time.sleep(0.02)


def test_a_run_in_its_last_shard_completes(tmp_path: Path) -> None:
    out = tmp_path / "set"
    hold = Hold(tmp_path, 15)
    process = started(out, 20, 10, 7, hold=hold)
    wait_for(process, lambda: (out / "shards" / "000000.json").exists() and hold.reached())
    process.send_signal(signal.SIGTERM)
    read_until(process, "finishing the open shard")
    hold.release()
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 0, errors
    assert verify(out).ok


WAITING = """
import sys, time
from busigen.runtime.execution.signals import GenerationInterrupted, Stopping
try:
    with Stopping():
        print("ready", flush=True)
        time.sleep(600)
except GenerationInterrupted as error:
    print(error)
    sys.exit(error.exit_code)
"""


@SIGNALS
def test_without_an_open_shard_the_first_signal_stops(number: int, code: int, said: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING], cwd=ROOT, stdout=subprocess.PIPE, text=True, preexec_fn=listening
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(number)
    output, _ = process.communicate(timeout=GUARD_SECONDS)
    assert (process.returncode, output) == (code, f"{said}. Run the same command again to continue.\n")


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    """As in the background of a script, where Ctrl-C is meant for someone else."""
    process = subprocess.Popen(
        [sys.executable, "-c", WAITING],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN),
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    # Were both heard, the first one, which is handed over first, would decide how it ends.
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=GUARD_SECONDS)
    assert (process.returncode, output) == (143, "Terminated. Run the same command again to continue.\n")
