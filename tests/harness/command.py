"""Running ``busigen`` as a user does: a process of its own, its exit code and its one line of error."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CLI = [sys.executable, "-m", "busigen.cli"]
SMALL = ("--count", 6, "--shard-size", 2, "--batch-size", 2, "--seed", 3)
"""Three shards: enough to be killed between any two of them."""

Done = subprocess.CompletedProcess[str]


def run(*arguments: object, **options: object) -> Done:
    return subprocess.run(
        [*CLI, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False, **options
    )


def error_line(done: Done, code: int) -> str:
    """The one line that a refused command leaves on stderr, apart from progress and log lines."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    said = r"provider: |generating: |measuring: |reading healthy images: |\d\d:\d\d:\d\d (left out|healthy images): "
    lines = [line for line in done.stderr.splitlines() if not re.match(said, line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("error: ")
    assert "This is a bug" not in lines[0]
    return lines[0]
