"""`busigen doctor` on this machine as it is, and in environments that are really broken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from busigen.registry import PROVIDERS
from busigen.runtime.backends.probe import driver_cuda
from busigen.runtime.diagnostics.doctor import FIXED_MEMORY, ROW_MEMORY, largest_batch
from tests.harness.command import CLI, ROOT, Done, run

no_driver = pytest.mark.skipif(driver_cuda() is not None, reason="this machine has an NVIDIA driver")


def doctor(*arguments: object, path: Path | None = None, **environment: str) -> tuple[Done, dict[str, dict[str, Any]]]:
    """Run it, with ``path`` before everything else that Python imports from."""
    variables = {**os.environ, **environment}
    if path is not None:
        variables["PYTHONPATH"] = os.pathsep.join((str(path), str(ROOT)))
    done = subprocess.run(
        [*CLI, "doctor", "--json", *map(str, arguments)],
        cwd=ROOT,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return done, {finding["name"]: finding for finding in json.loads(done.stdout)["findings"]}


def distribution(folder: Path, name: str, version: str) -> None:
    """What pip leaves of an installed distribution."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


@no_driver
def test_a_machine_without_a_card_can_generate(tmp_path: Path) -> None:
    done = run("doctor", "--out", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"--provider {name}: " in done.stdout for name in PROVIDERS)
    assert "ok       --provider cpu: works, on ONNX Runtime" in done.stdout
    assert "off      --provider cuda: no NVIDIA driver is loaded" in done.stdout
    assert "ok       auto: --provider auto takes cpu" in done.stdout
    assert f"free in {tmp_path}: room for some " in done.stdout
    assert "problem" not in done.stdout


def test_json_says_the_same(tmp_path: Path) -> None:
    done, findings = doctor("--out", tmp_path / "not" / "yet")
    assert done.returncode == 0
    assert json.loads(done.stdout)["can_generate"] is True
    assert {finding["state"] for finding in findings.values()} <= {"ok", "off", "warning"}
    assert all(finding["fix"] for finding in findings.values() if finding["state"] == "warning")
    assert not (tmp_path / "not").exists()


def test_two_onnxruntimes_in_one_place_are_found(tmp_path: Path) -> None:
    distribution(tmp_path, "onnxruntime", "1.20.0")
    distribution(tmp_path, "onnxruntime-gpu", "1.24.1")
    done, findings = doctor(path=tmp_path)
    found = findings["onnxruntime install"]
    assert (done.returncode, found["state"]) == (0, "warning")
    assert "overwritten" in found["told"]
    assert "pip uninstall -y onnxruntime" in found["fix"] and "onnxruntime-gpu" in found["fix"]


def test_an_onnxruntime_whose_files_are_another_versions(tmp_path: Path) -> None:
    distribution(tmp_path, "onnxruntime-gpu", "0.1")
    _, findings = doctor(path=tmp_path)
    assert (
        "0.1, but " in findings["onnxruntime install"]["told"]
        or "overwritten" in findings["onnxruntime install"]["told"]
    )
    assert findings["onnxruntime install"]["state"] == "warning"


def test_an_onnxruntime_that_does_not_load_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("raise ImportError('libonnxruntime.so: no such file')\n")
    done, findings = doctor(path=tmp_path)
    assert done.returncode == 9
    assert findings["onnxruntime install"]["state"] == "problem"
    assert findings["--provider cpu"]["state"] == "problem"
    assert "libonnxruntime.so" in findings["--provider cpu"]["told"]
    assert done.stderr.startswith("error: generate cannot run here: onnxruntime install: ")


def linked_install(folder: Path) -> Path:
    """The package as uv and conda install it: every file a hard link to one in a cache."""
    shutil.copytree(ROOT / "busigen", folder / "cache" / "busigen", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(folder / "cache", folder / "site", copy_function=os.link)
    return folder / "site"


def installed(site: Path, *arguments: object) -> Done:
    environment = {**os.environ, "PYTHONPATH": str(site)}
    # From there, because Python looks into the current folder before anything else.
    return subprocess.run(
        [*CLI, *map(str, arguments)],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_hard_linked_weights_are_as_good_as_any(tmp_path: Path) -> None:
    site = linked_install(tmp_path)
    done = installed(site, "doctor", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ok       generate: 2 samples drawn in " in done.stdout
    out = tmp_path / "set"
    done = installed(site, "generate", "--count", 2, "--seed", 3, "--batch-size", 2, "--out", out)
    assert done.returncode == 0, done.stderr
    assert run("generate", "--count", 2, "--seed", 3, "--batch-size", 2, "--out", tmp_path / "plain").returncode == 0
    shard = "shards/000000.tar"
    assert (out / shard).read_bytes() == (tmp_path / "plain" / shard).read_bytes()
    assert run("verify", out, "--repair", "--bundle", site / "busigen" / "bundles" / "default").returncode == 0


def test_a_bundle_that_no_hash_gives_away_is_tried(tmp_path: Path) -> None:
    """Whole and recorded as such, but ONNX Runtime cannot run it."""
    site = linked_install(tmp_path)
    bundle = site / "busigen" / "bundles" / "default"
    graph, record = bundle / "decoder-128.onnx", bundle / "bundle.json"
    old = hashlib.sha256(graph.read_bytes()).hexdigest()
    content = graph.read_bytes().replace(b"Conv", b"Cold")
    graph.unlink()
    graph.write_bytes(content)
    text = record.read_text().replace(old, hashlib.sha256(content).hexdigest())
    record.unlink()
    record.write_text(text)
    done = installed(site, "doctor", "--out", tmp_path)
    assert done.returncode == 9
    assert "ok       bundle: " in done.stdout
    assert "ok       --provider cpu: works" in done.stdout
    assert f"problem  generate: {graph} cannot be loaded by ONNX Runtime" in done.stdout
    assert "error: generate cannot run here: generate: " in done.stderr
    assert "Install busigen again." in done.stderr


def test_mixed_tensorrts_are_found(tmp_path: Path) -> None:
    distribution(tmp_path, "tensorrt", "11.0.0.1")
    distribution(tmp_path, "tensorrt-cu13", "10.14.1.48")
    libraries = tmp_path / "lib"
    libraries.mkdir()
    (libraries / "libnvinfer.so.9").touch()
    _, findings = doctor(path=tmp_path, LD_LIBRARY_PATH=str(libraries))
    found = findings["TensorRT packages"]
    assert found["state"] == "warning"
    assert "versions are mixed: tensorrt 11.0.0.1, tensorrt-cu13 10.14.1.48" in found["told"]
    assert "pip uninstall -y tensorrt tensorrt-cu13" in found["fix"]
    stray = findings["TensorRT libraries"]
    assert str(libraries / "libnvinfer.so.9") in stray["told"]
    assert str(libraries) in stray["fix"]


def test_tensorrt_for_two_cudas_is_found(tmp_path: Path) -> None:
    distribution(tmp_path, "tensorrt-cu12", "10.14.1.48")
    distribution(tmp_path, "tensorrt-cu13", "10.14.1.48")
    _, findings = doctor(path=tmp_path)
    assert "CUDA 12 and 13 are mixed" in findings["TensorRT packages"]["told"]


@no_driver
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler makes a driver's library here")
def test_a_driver_that_is_too_old_is_named(tmp_path: Path) -> None:
    """A real library in the driver's place: nothing but its version is asked for before it is refused."""
    source = tmp_path / "cuda.c"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", source], check=True)
    _, findings = doctor(LD_LIBRARY_PATH=str(tmp_path))
    found = findings["NVIDIA driver"]
    assert found["state"] == "warning"
    assert "runs CUDA 12.4 at most, and ONNX Runtime is built for CUDA 13" in found["told"]
    assert "580" in found["fix"]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    done = run("generate", "--count", 1, "--out", tmp_path / "set", "--provider", "cuda", env=environment)
    assert done.returncode == 2
    assert "the NVIDIA driver runs CUDA 12.4 at most" in done.stderr
    assert not (tmp_path / "set").exists()


def test_a_disk_without_room_is_a_problem(tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(tmp_path)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        done, findings = doctor("--out", tmp_path / "set")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
    assert done.returncode == 9
    assert "No space left" in findings["disk"]["told"]
    assert "another --out" in done.stderr


def test_memory_decides_the_batch() -> None:
    assert largest_batch(0) == largest_batch(FIXED_MEMORY + ROW_MEMORY) == 0
    assert largest_batch(FIXED_MEMORY + 2 * ROW_MEMORY) == 2
    assert largest_batch(FIXED_MEMORY + 300 * ROW_MEMORY) == 256
    assert largest_batch(1 << 40) == 1024
