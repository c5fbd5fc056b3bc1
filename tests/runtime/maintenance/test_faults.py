"""Faults of a machine, let happen to real runs: nothing is lost, torn or repeated, and the bytes come out the same.

More of each, and SIGKILL two hundred times: `python -m benchmarks.faults`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import GUARD_SECONDS, ROOT

TIMES = {
    "kill": 12,
    "terminate": 3,
    "mending": 8,
    "full_disk": 2,
    "read_only": 2,
    "together": 3,
    "healthy": 4,
    "clock": 1,
}
"""Damage to finished files is tried in test_repair.py."""


def tried(fault: str, times: int, folder: Path, retry: float = GUARD_SECONDS) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.harness.fault_injection", fault, str(folder), str(times), "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=retry, check=False)
    assert done.returncode == 0, done.stderr
    tally: dict[str, int] = json.loads(done.stdout)
    return tally


@pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with what Linux has")
@pytest.mark.parametrize("fault", TIMES)
def test_nothing_is_lost_torn_or_repeated(tmp_path: Path, fault: str) -> None:
    tally = tried(fault, TIMES[fault], tmp_path / "runs")
    if not tally["tried"]:
        pytest.skip("needs root to mount a small disk, or a C compiler to set a clock back")
    assert tally.pop("tried") >= TIMES[fault]
    assert tally.pop("finished") >= 1
    assert not any(tally.values()), tally


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the faults are made with what Linux has")
def test_two_hundred_kills_lose_nothing(tmp_path: Path) -> None:
    tally = tried("kill", 200, tmp_path / "runs", retry=1_800)
    assert tally.pop("tried") >= 200
    assert tally.pop("finished") >= 1
    assert not any(tally.values()), tally
