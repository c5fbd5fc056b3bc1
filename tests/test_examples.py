"""The examples and the code of docs/python.md, run as they stand."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from busigen.data.prepared import Prepared
from busigen.runtime.maintenance.verify import verify
from tests.harness.command import ROOT
from tests.test_cli_slurm import slurm

EXAMPLES = ROOT / "examples"


@pytest.mark.slow
def test_the_code_of_the_page_on_python_runs(
    synthetic_busi: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(synthetic_busi, tmp_path / "Dataset_BUSI_with_GT")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 5
    (tmp_path / "page.py").write_text("\n".join(blocks), encoding="utf-8")
    _ran(tmp_path, sys.executable, "page.py")
    assert (tmp_path / "report" / "report.html").is_file()


def test_the_cells_of_the_notebook_run(tmp_path: Path) -> None:
    notebook = json.loads((EXAMPLES / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "images are never committed"
    (tmp_path / "cells.py").write_text("\n".join("".join(cell["source"]) for cell in cells), encoding="utf-8")
    said = _ran(tmp_path, sys.executable, "cells.py")
    assert said.count("torch.Size([4, 1, 256, 256])") == 2


@pytest.mark.slow
def test_the_unet_trains_and_goes_on(synthetic_prepared: Prepared, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "train_monai_unet.py", synthetic_prepared.folder, "--batch-size", 4]
    said = _ran(tmp_path, *command, "--steps", 1)
    assert re.search(r"step 1: loss \d", said) and re.search(r"Dice on \d+ test images: [01]\.\d{3}", said)
    said = _ran(tmp_path, *command, "--steps", 2)
    assert "step 2: loss" in said and "step 1" not in said


def test_array_tasks_of_the_script_make_one_dataset(tmp_path: Path) -> None:
    # So that its `busigen` is the one that is tested.
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "busigen").write_text(f'#!/bin/sh\nexec {sys.executable} -m busigen.cli "$@"\n')
    (tmp_path / "bin" / "busigen").chmod(0o755)
    for task in (1, 2):
        environment = {**slurm(task), "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "SLURM_CPUS_PER_TASK": "1"}
        _ran(tmp_path, "bash", EXAMPLES / "slurm_array.sh", "set", 4, "--shard-size", 2, "--batch-size", 2,
             environment=environment)  # fmt: skip
    report = verify(tmp_path / "set")
    assert report.ok and report.samples == 4


def _ran(folder: Path, *command: object, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [*map(str, command)],
        cwd=folder,
        env={**(environment or os.environ), "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
