"""``--launcher slurm``: array tasks as real processes in one folder, with the environment that Slurm gives them."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from tests.harness.command import CLI, ROOT, error_line, run
from tests.harness.hashing import hashes
from tests.harness.processes import GUARD_SECONDS, wait_for

OPTIONS = tuple(map(str, ("--count", 8, "--shard-size", 1, "--batch-size", 2, "--seed", 3)))
"""Eight shards, four for each of two tasks, so that a killed one leaves some."""


def slurm(task: int, restarts: int = 0) -> dict[str, str]:
    """What `sbatch --array=1-2` sets in each task; a task that was put back into the queue keeps its number."""
    described = {
        "SLURM_JOB_ID": 700 + task,
        "SLURM_ARRAY_JOB_ID": 700,
        "SLURM_ARRAY_TASK_ID": task,
        "SLURM_ARRAY_TASK_COUNT": 2,
        "SLURM_ARRAY_TASK_MIN": 1,
        "SLURM_ARRAY_TASK_MAX": 2,
        "SLURM_ARRAY_TASK_STEP": 1,
        **({"SLURM_RESTART_COUNT": restarts} if restarts else {}),
    }
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return clean | {name: str(value) for name, value in described.items()}


def begun(out: Path, healthy: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [*CLI, "generate", *OPTIONS, "--out", str(out), "--healthy", str(healthy), "--launcher", "slurm"]
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def shards(out: Path) -> set[str]:
    return {path.stem for path in (out / "shards").glob("[0-9]*.json")}


def test_a_killed_task_is_put_back_into_the_queue(synthetic_busi: Path, tmp_path: Path) -> None:
    out, healthy = tmp_path / "set", synthetic_busi / "normal"
    first, second = (begun(out, healthy, slurm(task)) for task in (1, 2))
    wait_for(second, (out / "shards" / "000004.json").exists)
    second.send_signal(signal.SIGKILL)
    assert second.wait() == -signal.SIGKILL
    described, errors = first.communicate(timeout=GUARD_SECONDS)
    assert first.returncode == 0, errors
    there = shards(out)
    assert {"000000", "000001", "000002", "000003", "000004"} <= there and len(there) < 8
    assert f"still to come from others: {8 - len(there)} shard" in described
    assert not (out / "dataset.json").exists()

    again = begun(out, healthy, slurm(2, restarts=1))
    described, errors = again.communicate(timeout=GUARD_SECONDS)
    assert again.returncode == 0, errors
    assert "still to come" not in described
    alone = run("generate", *OPTIONS, "--out", tmp_path / "alone", "--healthy", healthy)
    assert alone.returncode == 0, alone.stderr
    assert hashes(out) == hashes(tmp_path / "alone")

    # Where no task saw the last shard, as on a slow file system, any of the commands completes the dataset.
    (out / "dataset.json").unlink()
    late = begun(out, healthy, slurm(1, restarts=1))
    _, errors = late.communicate(timeout=GUARD_SECONDS)
    assert late.returncode == 0, errors
    assert hashes(out) == hashes(tmp_path / "alone")


def test_what_is_no_array_task_is_refused(tmp_path: Path) -> None:
    alone = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_ARRAY_")}
    command = ("generate", *OPTIONS, "--out", tmp_path / "set", "--launcher", "slurm")
    line = error_line(run(*command, env={**alone, "SLURM_JOB_ID": "7"}), 2)
    assert "no task of a job array" in line and "sbatch --array=1-N" in line
    assert "--array-task 1/2" in error_line(run(*command, "--array-task", "1/2", env=slurm(1)), 2)
    assert not (tmp_path / "set").exists()
