"""The whole chain by its commands, in real processes: prepare, train (killed and resumed), export, generate, verify."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from busigen.data.prepared import Prepared
from busigen.errors import IntegrityError
from busigen.registry import LESION_CLASSES, STAGES
from busigen.runtime.backends.bundle import Bundle, default_bundle
from tests.harness.engine_library import TARGET, rtx

GRAPHS = Bundle.recorded(default_bundle()).graph_names

SCALE = "0.1"


def busigen(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "busigen.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def succeed(*arguments: object) -> str:
    result = busigen(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.fixture(scope="module")
def checkpoint(synthetic_prepared: Prepared, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint whose training was killed by SIGKILL in the middle of a task and then resumed."""
    out = tmp_path_factory.mktemp("runs") / "tiny"
    options = ["train", "--data", synthetic_prepared.folder, "--out", out, "--preset", "tiny", "--scale", SCALE]
    command = [sys.executable, "-m", "busigen.cli", *map(str, options)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 600
    while not (out / "samples" / "lesion").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (out / "done" / "autoencoder.json").is_file(), "the kill came before anything was done"
    assert not (out / "busigen.json").exists()
    done = {path: path.stat().st_mtime_ns for path in (out / "done").iterdir()}

    stdout = succeed(*options)
    assert "Checkpoint finished" in stdout
    assert {path: path.stat().st_mtime_ns for path in done} == done, "finished tasks are not trained again"
    return out


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundles") / "tiny"
    report = out.with_name("report.md")
    stdout = succeed("export", checkpoint, "--out", out, "--draws", 8, "--batch-size", "2,4", "--report", report)
    assert "parity" in stdout
    assert "| cpu | malignant | 8 of 8 |" in report.read_text()
    return out


def test_the_checkpoint_has_the_documented_layout_and_no_pickle(checkpoint: Path) -> None:
    record = json.loads((checkpoint / "busigen.json").read_text())
    assert record["preset"] == "tiny" and record["data"]["split_hash"]
    for stage in STAGES:
        for label in LESION_CLASSES:
            adapter = checkpoint / "adapters" / f"{stage}-{label}"
            assert (adapter / "adapter_model.safetensors").is_file()
            assert (checkpoint / "merged" / f"{stage}-{label}" / "config.json").is_file()
    assert not [p for p in checkpoint.rglob("*") if p.suffix in (".pt", ".pth", ".pkl", ".bin", ".ckpt")]


def test_the_bundle_holds_every_graph_and_its_parity(bundle: Path) -> None:
    info = json.loads((bundle / "bundle.json").read_text())
    assert info["batch_sizes"] == [2, 4]
    for label in LESION_CLASSES:
        assert info["parity"][label]["dice"] >= 0.99
    # What is a norm in PyTorch is one kernel in ONNX Runtime, in the loop's body, too.
    assert info["fused"]["lesion-benign@128"]["normalisation"] > 0
    assert set(info["fused"]) == set(info["graphs"])
    for stage in STAGES:
        for label in LESION_CLASSES:
            assert any(name.startswith(f"{stage}-{label}") for name in info["graphs"])
    recorded = {file for graph in info["graphs"].values() for file in graph["files"]}
    assert recorded == {path.name for path in bundle.iterdir()} - {"bundle.json", "MODEL_CARD.md"}


def test_export_refuses_graphs_that_do_not_reproduce_the_checkpoint(checkpoint: Path, bundle: Path) -> None:
    """The reference is changed rather than the bundle: to the comparison, that is the same broken export."""
    import torch

    from busigen.export.parity import Reference, failures
    from busigen.runtime.backends.base import open_backend
    from busigen.runtime.backends.bundle import Bundle
    from busigen.training.checkpoint import load_networks

    networks, _ = load_networks(checkpoint)
    with torch.no_grad():
        for label in LESION_CLASSES:
            networks.denoisers[f"mask-{label}"].space.field += 0.1
    opened = Bundle.open(bundle)
    missed = failures(Reference(networks, opened, draws=4).compare(opened, open_backend(opened)))
    assert re.search("dice|boundary|gates", "; ".join(missed))


def test_a_changed_weight_file_is_refused_by_export(checkpoint: Path, tmp_path: Path) -> None:
    from busigen.training.checkpoint import read_record

    copy = tmp_path / "checkpoint"
    shutil.copytree(checkpoint, copy, ignore=shutil.ignore_patterns("cache", "state", "tensorboard", "samples"))
    weights = next((copy / "merged" / "mask-benign").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    with pytest.raises(IntegrityError, match="mask-benign"):
        read_record(copy)
    result = busigen("export", copy, "--out", tmp_path / "bundle")
    assert result.returncode == 5 and not (tmp_path / "bundle").exists()


def test_a_run_with_other_options_is_refused_with_the_difference(
    checkpoint: Path, synthetic_prepared: Prepared
) -> None:
    result = busigen("train", "--data", synthetic_prepared.folder, "--out", checkpoint, "--preset", "tiny", "--seed", 7)
    assert result.returncode == 4
    assert "--seed: 0 there, 7 now" in result.stderr


def test_an_unfinished_checkpoint_cannot_be_exported(tmp_path: Path) -> None:
    result = busigen("export", tmp_path, "--out", tmp_path / "bundle")
    assert result.returncode == 3 and "busigen train" in result.stderr


def test_in_graph_loop_equals_the_reference_sampler(checkpoint: Path, bundle: Path) -> None:
    """One stage alone, on noise: the graph must be the solver's loop and not merely something close to it."""
    from busigen.export.parity import TorchBackend
    from busigen.runtime.backends.bundle import Bundle
    from busigen.runtime.backends.onnxruntime import OnnxBackend
    from busigen.training.checkpoint import load_networks

    networks, _ = load_networks(checkpoint)
    opened = Bundle.open(bundle)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((3, *opened.background_shape)).astype(np.float32)
    asked = {"noise": noise, "frame": np.array([[0, 0, 180, 256], [0, 40, 256, 176]] * 4, np.float32)[:3]}
    expected = TorchBackend(networks).run("prior", asked)
    found = OnnxBackend(opened).run("prior", asked)
    # Weights are stored as fp16, whose relative error is 5e-4; ten evaluations let it grow a few times over.
    assert np.abs(found - expected).max() < 2e-2 * np.abs(expected).max()
    whole = OnnxBackend(opened).run("prior", asked | {"frame": np.array([[0, 0, 256, 256]] * 3, np.float32)})
    assert not np.allclose(whole[0], found[0]), "the prior paints for the frame that it is told"


def test_generate_from_the_new_bundle_and_verify(bundle: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    """A barely trained model draws poor outlines, so the gates may refuse the run: then it must say so, and cleanly."""
    healthy = synthetic_busi / "normal"
    out = tmp_path / "data"
    result = busigen(
        "generate", "--count", 6, "--out", out, "--bundle", bundle, "--healthy", healthy, "--shard-size", 4
    )
    if result.returncode == 8:
        assert "refused" in result.stderr and "Traceback" not in result.stderr
        return
    assert result.returncode == 0, result.stderr[-2000:]
    stdout = succeed("verify", out, "--healthy", healthy)
    assert "is sound" in stdout and "bit for bit: 6" in stdout


@pytest.mark.slow
def test_every_graph_of_the_new_bundle_becomes_an_engine(bundle: Path, tmp_path: Path) -> None:
    """TensorRT for RTX parses and builds all of them, here and without a card."""
    rtx()
    options = ("--bundle", bundle, "--target", TARGET, "--batch-size", "4,2", "--out", tmp_path / "cache", "--json")
    engines = json.loads(succeed("build-engines", *options))["engines"]
    assert [engine["graph"] for engine in engines] == list(GRAPHS)
    assert all(engine["bytes"] > 10_000 and not engine["cached"] for engine in engines)
