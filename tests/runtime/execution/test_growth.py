"""A dataset of any size is made in the memory of a small one: real runs in processes of their own, their peaks read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.processes import GUARD_SECONDS, ROOT


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads peaks in /proc")
def test_twenty_times_the_samples_take_the_same_memory(tmp_path: Path) -> None:
    # The benchmark's null engine: what grows with the count is then all there is to see.
    results = tmp_path / "growth.json"
    growth = [sys.executable, ROOT / "benchmarks" / "growth.py", "--counts", "1000", "20000", "--results", results]
    subprocess.run(list(map(str, growth)), cwd=ROOT, check=True, capture_output=True, timeout=4 * GUARD_SECONDS)
    small, large = json.loads(results.read_text())["peaks"].values()
    # Records, 1.7 kB a shard, and polars' part of joining 200 tables: 4 MB, which is 3 % of a null engine's process.
    assert max(large.values()) < 1.05 * max(small.values()), (small, large)
    assert large["draw_missing"] < 1.02 * small["draw_missing"], "what is drawn is let go once it is written"
