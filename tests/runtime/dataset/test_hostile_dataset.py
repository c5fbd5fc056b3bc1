"""A dataset from a stranger costs its reader little and changes nothing outside of its folder, whatever is in it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.harness.hashing import hashes
from tests.harness.hostile_datasets import CASES, VICTIM
from tests.harness.processes import GUARD_SECONDS, ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the limit on memory is set by what /proc says")

SECONDS = 60.0
"""Most that one dataset may take, on a machine with much else to do; each takes a fraction of a second."""


@pytest.fixture(scope="module")
def described(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What one process, in little memory, says of every evil dataset; and what became of the folder beside each."""
    places, before = {}, {}
    for name, (damage, _) in CASES.items():
        place = places[name] = tmp_path_factory.mktemp("evil")
        (place / VICTIM).mkdir()
        (place / VICTIM / "file").write_text("precious")
        damage(Path(shutil.copytree(pristine, place / "set")))
        before[name] = hashes(place / VICTIM)
    command = [
        sys.executable,
        "-m",
        "tests.harness.hostile_datasets",
        *(str(place / "set") for place in places.values()),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=GUARD_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    answers = dict(zip(CASES, map(json.loads, done.stdout.splitlines()), strict=True))
    for name, place in places.items():
        answers[name]["untouched"] = hashes(place / VICTIM) == before[name]
        answers[name]["beside"] = sorted(path.name for path in place.iterdir())
        answers[name]["whole"] = hashes(place / "set") == hashes(pristine)
    return answers


@pytest.mark.parametrize("name", CASES)
def test_an_evil_dataset_is_named_in_little_memory_and_touches_nothing_else(
    described: dict[str, dict[str, Any]], name: str
) -> None:
    said = described[name]
    assert said["bug"] is None
    assert said["verify"] == 5
    assert any(problem.startswith(CASES[name][1]) for problem in said["problems"]), said
    assert all(line.isprintable() for line in (*said["problems"], *said["refused"]))
    assert said["seconds"] < SECONDS
    assert said["untouched"] and said["beside"] == ["set", VICTIM]
    # Either the bytes are those of the run again, or what stands in the way is told with an exit code.
    assert said["whole"] if said["repair"] == 0 else said["repair"] in (4, 5) and all(said["refused"])
