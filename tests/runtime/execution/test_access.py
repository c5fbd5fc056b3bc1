"""Not being able to look is neither damage nor absence: nothing is called either, and nothing is made anew."""

from __future__ import annotations

import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.command import ROOT, run
from tests.harness.hashing import hashes

WITHOUT_RIGHTS = ["setpriv", "--bounding-set", "-dac_override,-dac_read_search"]
"""Makes root one who has to have the right to read, like everybody else."""


def limited(files: int) -> dict[str, object]:
    return {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))}


@pytest.mark.parametrize("files", [5, 6, 7, 8])
def test_too_few_open_files_are_no_damage(dataset: Path, files: int) -> None:
    done = run("verify", dataset, **limited(files))
    assert done.returncode in (0, 3), (done.stdout, done.stderr)
    if done.returncode:
        assert done.stdout == ""
        assert "cannot be looked at: Too many open files. Allow more open files (ulimit -n 1024)" in done.stderr


def test_what_may_not_be_read_is_neither_damaged_nor_missing(dataset: Path) -> None:
    before = hashes(dataset)
    names = (".", "shards", "shards/000001.tar", "shards/000001.json", "manifest.parquet", "run.json", "dataset.json")
    command = [sys.executable, "-m", "tests.harness.blind", str(dataset), *names]
    if os.geteuid() == 0:
        if shutil.which(WITHOUT_RIGHTS[0]) is None:
            pytest.skip("root may read everything, and nothing here takes that from it")
        command = WITHOUT_RIGHTS + command
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6 * len(names)
    for line in lines:
        # For these, nobody has to look into the file.
        if not line.startswith(("shards/000001.json read: ", "run.json read: ", "run.json merge: ")):
            assert re.search(r": (Access|Output)Error: .*: Permission denied\. Give yourself ", line), line
    assert hashes(dataset) == before
    assert run("verify", dataset).returncode == 0
