"""Nothing that busigen starts reports home, whatever the environment says: neither over a network nor into a queue."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.harness.command import CLI, ROOT, Done

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces and home folders as Linux has them")

TALKATIVE = {
    "ORT_DISABLE_TELEMETRY": "0",
    "HF_HUB_DISABLE_TELEMETRY": "0",
    "HF_UPDATE_DOWNLOAD_COUNTS": "1",
    "RAY_USAGE_STATS_ENABLED": "1",
    "DO_NOT_TRACK": "0",
}
"""An environment that asks for the opposite."""

SMALL = ("--count", 2, "--shard-size", 1, "--batch-size", 2, "--threads", 1)


@dataclass(frozen=True)
class Seen:
    """What a process and its children did.

    Attributes:
        done: the process.
        addresses: system calls that spoke to another machine; always empty where strace is not at hand.
        files: what they left in the home folder and in that of temporary files.
    """

    done: Done
    addresses: list[str]
    files: list[str]


@cache
def works(*command: str) -> bool:
    return shutil.which(command[0]) is not None and subprocess.run(command, capture_output=True).returncode == 0


def watched(folder: Path, *command: object) -> Seen:
    """Run a command in a home of its own, without a network where the system allows that."""
    home, calls = folder / "home", folder / "calls"
    (home / "tmp").mkdir(parents=True)
    calls.write_text("")
    before: list[str] = []
    if works("strace", "-f", "--seccomp-bpf", "-o", os.devnull, "true"):
        before += ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,sendto", "-o", str(calls)]
    if works("unshare", "-rn", "true"):
        before += ["unshare", "-rn"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    environment |= TALKATIVE | {"HOME": str(home), "TMPDIR": str(home / "tmp"), "MPLCONFIGDIR": str(folder)}
    done = subprocess.run(
        [*before, *map(str, command)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    addresses = [line for line in calls.read_text().splitlines() if "AF_INET" in line]
    return Seen(done, addresses, sorted(str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()))


def assert_silent(seen: Seen) -> None:
    assert seen.done.returncode == 0, seen.done.stderr
    assert seen.addresses == []
    assert seen.files == []


def test_the_watch_would_see_a_report(tmp_path: Path) -> None:
    if not works("unshare", "-rn", "true"):
        pytest.skip("this system lets nobody run a process without a network, and the report must not go out")
    # The report is a thread's work, which a busy machine may not have begun when the process ends.
    code = (
        "import onnxruntime, pathlib, time\nend = time.monotonic() + 30\n"
        "while not any(path.is_file() for path in pathlib.Path.home().rglob('*')) and time.monotonic() < end:\n"
        "    time.sleep(0.1)"
    )
    seen = watched(tmp_path, sys.executable, "-c", code)
    assert seen.done.returncode == 0, seen.done.stderr
    if not seen.files:
        pytest.skip("this build of ONNX Runtime reports nothing")
    assert any("onnxruntime" in file for file in seen.files)


def test_generate_and_its_workers_and_explain(tmp_path: Path) -> None:
    for number, command in enumerate(
        (("generate", *SMALL, "--workers", 2, "--out", tmp_path / "set"), ("explain", tmp_path / "set", 0))
    ):
        assert_silent(watched(tmp_path / str(number), *CLI, *command))


def test_bench(tmp_path: Path) -> None:
    options = ("--count", 2, "--batch-sizes", 2, "--repeat", 1, "--threads", 1, "--out", tmp_path / "bench")
    assert_silent(watched(tmp_path, *CLI, "bench", *options))


def test_doctor_and_its_probes_and_that_it_says_so(tmp_path: Path) -> None:
    seen = watched(tmp_path, *CLI, "doctor", "--out", tmp_path)
    assert_silent(seen)
    assert "ok       reporting home: off: ORT_DISABLE_TELEMETRY=1, " in seen.done.stdout


def test_training_export_and_audit_with_all_that_they_import(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs the extra 'train'")
    pytest.importorskip("monai", reason="needs the extra 'eval'")
    program = """
import importlib
import busigen.training.pipeline, busigen.export.exporter, busigen.export.import_bundle, busigen.evaluation.audit
for section in busigen.evaluation.audit.SECTIONS:
    package = f"busigen.evaluation.{section}"
    importlib.import_module(package if section == "integrity" else f"{package}.section")
"""
    assert_silent(watched(tmp_path, sys.executable, "-c", program))


def test_the_tests_themselves(tmp_path: Path) -> None:
    assert_silent(watched(tmp_path, sys.executable, "-c", "import tests.conftest, onnxruntime"))


def test_doctor_knows_of_an_import_that_came_before_busigen(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import onnxruntime\n")
    environment = {**os.environ, **TALKATIVE, "PYTHONPATH": os.pathsep.join((str(tmp_path), str(ROOT)))}
    # What ONNX Runtime's own tests set, so that this one does not report.
    environment["ORT_RUNNING_UNIT_TESTS"] = "1"
    done = subprocess.run(
        [*CLI, "doctor", "--json", "--out", str(tmp_path)], env=environment, cwd=ROOT, capture_output=True, text=True
    )
    (found,) = [one for one in json.loads(done.stdout)["findings"] if one["name"] == "reporting home"]
    assert (done.returncode, found["state"]) == (0, "warning")
    assert "ORT_DISABLE_TELEMETRY=1" in found["fix"]
