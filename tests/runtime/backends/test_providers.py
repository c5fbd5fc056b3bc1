"""Providers: choosing one, refusing what is not there, falling back only when told to, buffers on the device."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from busigen.errors import OutputError, ProviderError, UsageError
from busigen.registry import AUTO, LAUNCHERS, PROVIDERS
from busigen.runtime.backends import onnxruntime
from busigen.runtime.backends.base import ENGINES, EngineOptions, largest_that_fits, open_backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnx_graph import Graph
from busigen.runtime.backends.onnxruntime import OnnxBackend, left_to_others
from busigen.runtime.backends.probe import choose, driver_cuda, probe
from busigen.runtime.execution import launchers
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.command import ROOT, error_line, run
from tests.harness.hashing import hashes

GRAPHS = Bundle.recorded(default_bundle()).graph_names

no_driver = pytest.mark.skipif(driver_cuda() is not None, reason="this machine has an NVIDIA driver")
MIX = {"benign": 0.5, "malignant": 0.5}
TWO = ("--count", 2, "--shard-size", 2, "--batch-size", 2, "--threads", 1)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_bundle())


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of the provider that `auto` takes on a machine without a card."""
    out = tmp_path_factory.mktemp("first") / "set"
    done = run("generate", *TWO, "--out", out, "--provider", "cpu")
    assert done.returncode == 0, done.stderr
    return out


def recorded(out: Path) -> str:
    return json.loads((out / "dataset.json").read_text())["fingerprint"]["provider"]


# Choosing


def test_every_name_of_the_registry_is_found() -> None:
    assert set(ENGINES) == set(PROVIDERS)
    assert set(launchers.LAUNCHERS) == set(LAUNCHERS)
    assert all(hasattr(launchers.launcher(name), "worker_pool") for name in LAUNCHERS)
    assert type(launchers.launcher("slurm")).__name__ == "Slurm"


@no_driver
def test_auto_is_the_processor_where_there_is_no_card_and_says_why(tmp_path: Path, first: Path) -> None:
    done = run("generate", *TWO, "--out", tmp_path / "set")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("provider: ")]
    assert line.startswith("provider: cpu (the best that works here; ")
    assert "no NVIDIA driver is loaded" in line
    assert all(name in line for name in PROVIDERS)
    assert hashes(tmp_path / "set") == hashes(first), "auto records what it took, never its own name"
    assert recorded(tmp_path / "set") == "cpu"


def test_auto_goes_on_with_what_a_dataset_was_begun_with(first: Path) -> None:
    done = run("generate", *TWO, "--out", first)
    assert done.returncode == 0, done.stderr
    assert "provider: cpu (this dataset was begun with it)" in done.stderr


@no_driver
def test_auto_refuses_a_dataset_of_a_provider_that_is_not_here(tmp_path: Path, first: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    run_file = json.loads((first / "run.json").read_text())
    run_file["fingerprint"]["provider"] = "cuda"
    (out / "run.json").write_text(json.dumps(run_file))
    line = error_line(run("generate", *TWO, "--out", out), 2)
    assert f"{out} was begun with --provider cuda, which cannot be used here" in line
    assert "another --out" in line
    line = error_line(run("generate", *TWO, "--out", out, "--provider", "cpu"), 4)
    assert "--provider: cuda -> cpu" in line


def test_what_auto_takes_is_what_a_probe_says_works() -> None:
    chosen = choose()
    assert probe(PROVIDERS[chosen.provider]).works
    better = list(PROVIDERS)[list(PROVIDERS).index(chosen.provider) + 1 :]
    assert not any(probe(PROVIDERS[name]).works for name in better)
    assert choose("abacus") == chosen, "an unknown name in a record is no reason to fail"


def test_a_provider_that_kills_its_process_is_reported_and_not_chosen(tmp_path: Path) -> None:
    """As a library does that was built for another machine."""
    (tmp_path / "onnxruntime").mkdir()
    (tmp_path / "onnxruntime" / "__init__.py").write_text("import ctypes\nctypes.string_at(0)\n")
    code = (
        "from busigen.registry import PROVIDERS; from busigen.runtime.backends.probe import probe; "
        "print(probe(PROVIDERS['cpu']))"
    )
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    # The broken one comes first in the probe's own process, too, because it inherits the variable.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((str(tmp_path), path))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert "works=False" in done.stdout
    assert "ended the process (SIGSEGV)" in done.stdout


# Falling back


@no_driver
@pytest.mark.parametrize("provider", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_that_is_not_here_is_refused(bundle: Bundle, provider: str) -> None:
    with pytest.raises(ProviderError, match=f"--provider {provider}") as caught:
        open_backend(bundle, provider)
    assert caught.value.exit_code == UsageError.exit_code
    assert "--provider cpu" in caught.value.fix
    # What is installed already, as one of the TensorRTs is for the tests, lacks a card alone.
    assert "pip install" in caught.value.fix or "has no NVIDIA driver" in caught.value.problem


@no_driver
def test_a_fallback_that_was_allowed_is_told_and_recorded_as_what_ran(tmp_path: Path, first: Path) -> None:
    done = run("generate", *TWO, "--out", tmp_path / "set", "--provider", "cuda", "--allow-fallback")
    assert done.returncode == 0, done.stderr
    assert "provider: cpu, because of --allow-fallback: --provider cuda: " in done.stderr
    assert recorded(tmp_path / "set") == "cpu"
    assert hashes(tmp_path / "set") == hashes(first)


@no_driver
def test_bench_measures_once_what_falls_back_to_the_same(tmp_path: Path) -> None:
    done = run(
        *("bench", "--count", 2, "--batch-sizes", 2, "--repeat", 1, "--out", tmp_path / "bench"),
        *("--provider", f"{AUTO},cpu,cuda", "--allow-fallback"),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "bench" / "bench.json").read_text())
    assert record["providers"] == {"cpu": ["CPUExecutionProvider"]}
    assert [result["provider"] for result in record["results"]] == ["cpu"]


def test_work_that_was_given_to_another_provider_is_counted(bundle: Bundle) -> None:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    session = ort.InferenceSession(str(bundle.graph("encoder@128")), options, providers=["CPUExecutionProvider"])
    assert left_to_others(session, "CUDAExecutionProvider")["Conv"] > 5
    assert not left_to_others(session, "CPUExecutionProvider")


# Buffers on the device


def test_fixed_buffers_change_no_byte(bundle: Bundle) -> None:
    """On the processor, where the bound path can be tested without a card; sizes that need padding, both windows."""
    jobs = [(index, 0) for index in range(2)]
    plain, bound = (
        Sampler(bundle, open_backend(bundle, options=EngineOptions(2, bound=bound)), classes=MIX, batch_size=6).attempt(
            3, jobs
        )
        for bound in (False, True)
    )
    assert len(plain[0]) + len(plain[1]) == 2 and plain[0]
    for one, other in zip(plain[0], bound[0], strict=True):
        assert (one.image == other.image).all() and (one.mask == other.mask).all()
        assert one.row == other.row
    assert plain[1] == bound[1]


def test_what_is_kept_outlives_the_next_run_of_the_same_graph(bundle: Bundle) -> None:
    backend = open_backend(bundle, options=EngineOptions(2, bound=True))
    assert isinstance(backend, OnnxBackend)
    inputs = [{"pixels": np.full((2, 1, 128, 128), value, np.float32)} for value in (0.1, 0.7)]
    expected = [backend.run("encoder@128", each) for each in inputs]
    kept = [backend.keep("encoder@128", each) for each in inputs]
    assert len(kept[0]) == 2
    assert [np.asarray(each).tobytes() for each in kept] == [each.tobytes() for each in expected]
    where = np.zeros(expected[0].shape, bool)
    where[:, :, ::2] = True
    chosen = backend.select(where, *kept)
    assert (np.asarray(chosen) == np.where(where, *expected)).all()


def test_only_graphs_without_loops_are_captured(bundle: Bundle) -> None:
    """ONNX Runtime refuses control flow in CUDA graphs; the denoisers' sampling loops are such."""
    looping = {name for name in GRAPHS if "Loop" in Graph(bundle.graph(name)).operators()}
    assert looping and not any(name.startswith(("encoder", "decoder", "context")) for name in looping)
    assert "Conv" in Graph(bundle.graph("encoder@128")).operators()


# Memory


def test_no_room_for_a_copy_of_the_weights_is_told_as_such(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(graph: Path, files: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    backend = open_backend(bundle, options=EngineOptions(1))
    monkeypatch.setattr(onnxruntime, "openable", full)
    with pytest.raises(OutputError, match="needs a copy of its weights"):
        backend.run("prior", {"noise": np.zeros((2, 1), np.float32)})


def test_halving_finds_what_fits() -> None:
    tried: list[int] = []

    def fits(rows: int) -> bool:
        tried.append(rows)
        return rows <= 40

    assert largest_that_fits(256, fits) == 32
    assert tried == [128, 64, 32]
    assert largest_that_fits(256, lambda rows: False) == 0
    assert largest_that_fits(2, lambda rows: True) == 0


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_a_batch_too_large_for_memory_is_refused_with_one_that_fits(tmp_path: Path) -> None:
    """ONNX Runtime's arena really fails here, under a limit on the process's memory."""
    code = (
        "import resource, sys, numpy as np\n"
        "from busigen.runtime.backends.base import EngineOptions, open_backend\n"
        "from busigen.runtime.backends.bundle import Bundle, default_bundle\n"
        "from busigen.runtime.sampling.sampler import Sampler\n"
        "from busigen.errors import CapacityError\n"
        "backend = open_backend(Bundle.open(default_bundle()), options=EngineOptions(1))\n"
        "sampler = Sampler(backend._bundle, backend, classes={'benign': 1.0}, batch_size=1024)\n"
        "rows = lambda count: {'pixels': np.zeros((count, 1, 128, 128), np.float32)}\n"
        "backend.run('encoder@128', rows(2))\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)\n"
        "try:\n"
        "    sampler.graphs.run('encoder@128', 1024, 1024, **rows(1024))\n"
        "except CapacityError as error:\n"
        "    print(error.exit_code, error.fits, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    status, fits, message = done.stdout.strip().split(" ", 2)
    assert (status, int(fits) in (16, 32, 64, 128, 256, 512)) == ("11", True), done.stdout
    assert message.startswith("--batch-size is 1024: encoder@128 needs more memory for 1024 images")
    assert f"Run the same command with --batch-size {fits}, which changes no sample." in message
