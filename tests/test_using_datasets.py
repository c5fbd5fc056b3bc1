"""Every block of docs/using-datasets.md runs; blocks of tools that are not installed are left out."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from busigen.data.prepared import Prepared
from busigen.runtime.execution.factory import generate
from tests.harness.command import CLI, ROOT
from tests.harness.noise_source import NoiseSource

_PAGE = (ROOT / "docs" / "using-datasets.md").read_text(encoding="utf-8")
_SECTIONS = dict(re.findall(r"^##? (.+?)\n(.*?)(?=^##? |\Z)", _PAGE, re.MULTILINE | re.DOTALL))
_PROGRAMS = {"nnUNetv2_": "nnunetv2", "yolo ": "ultralytics", "busigen convert .* dicom ": "highdicom"}


def blocks(text: str) -> list[tuple[str, str]]:
    """Language and code of each block."""
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def missing(language: str, code: str) -> list[str]:
    """Modules that a block needs and that are not installed."""
    if language == "python":
        needed = re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE)
    else:
        needed = [module for word, module in _PROGRAMS.items() if re.search(rf"^{word}", code, re.MULTILINE)]
    return [module for module in needed if find_spec(module) is None]


@pytest.fixture(scope="module")
def place(synthetic_prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page speaks of: a dataset, a prepared set, and busigen as a command."""
    folder = tmp_path_factory.mktemp("using")
    generate(NoiseSource(), folder / "out" / "mine", count=16, seed=7, shard_size=8)
    (folder / "prepared").symlink_to(synthetic_prepared.folder)
    (folder / "bin").mkdir()
    command = folder / "bin" / "busigen"
    command.write_text(f'#!/bin/sh\nexec {" ".join(CLI)} "$@"\n')
    command.chmod(0o755)
    first = _SECTIONS["Using a dataset with other tools"]
    assert len(blocks(first)) == 1
    run_block(folder, *blocks(first)[0])
    return folder


def run_block(folder: Path, language: str, code: str) -> None:
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    environment["HF_HOME"] = str(folder / "cache")
    program = [sys.executable, "-"] if language == "python" else ["bash", "-eu"]
    done = subprocess.run(
        program, input=code, cwd=folder, env=environment, text=True, capture_output=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("section", list(_SECTIONS)[1:])
def test_the_blocks_of_each_section_run(place: Path, section: str) -> None:
    found = blocks(_SECTIONS[section])
    assert found
    for language, code in found:
        if lacking := missing(language, code):
            pytest.skip(f"needs {', '.join(lacking)}")
        run_block(place, language, code)


def test_a_tool_takes_ten_lines_of_python_at_most() -> None:
    for language, code in blocks(_PAGE):
        assert language in ("sh", "python")
        assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
