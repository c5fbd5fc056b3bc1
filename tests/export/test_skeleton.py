"""Graphs are made without their weights, which go from the checkpoint to the bundle one by one, each stored once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors.torch import load_file, save_file

from busigen.errors import InputError
from busigen.export.components import components
from busigen.export.exporter import export
from busigen.export.import_bundle import restore
from busigen.export.request import Options, empty
from busigen.export.weights import SMALL, WeightFiles, emptied, weights_of, write_graphs
from busigen.registry import LESION_CLASSES, OPSETS
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.sampling.sampler import Sampler
from busigen.training.checkpoint import load_networks
from tests.harness.checkpoints import untrained

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_graphs_without_weights_become_the_files_that_graphs_with_weights_become(tmp_path: Path) -> None:
    checkpoint = untrained(tmp_path / "checkpoint")
    networks, _ = load_networks(checkpoint)
    for name in ("whole", "skeleton"):
        for component in components(networks, opset=OPSETS[0], loop="loop", only={"encoder", "mask"}):
            for precision in ("fp32", "fp16"):
                folder = tmp_path / name / f"{component.name}-{precision}"
                folder.mkdir(parents=True)
                graphs = component.graphs(precision)
                held = {t.name for graph in graphs.values() for t in weights_of(graph) if len(t.raw_data) > 4 * SMALL}
                # What is left are tables, around the loop of stage 1.
                assert name == "whole" or all(weight.startswith(("after/", "update/")) for weight in held)
                write_graphs(component.name, graphs, folder, WeightFiles(folder))
        empty(networks, checkpoint, tmp_path)
    first, second = (sorted((tmp_path / name).glob("*/*")) for name in ("whole", "skeleton"))
    assert [path.name for path in first] == [path.name for path in second] and len(first) == 12
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name


def peak(*arguments: object) -> list[float]:
    """What ``tests/harness/big_component.py`` prints of its memory in MiB, in a process of its own."""
    command = [sys.executable, "-m", "tests.harness.big_component", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True
    )
    return [float(number) for number in done.stdout.split()]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_an_export_takes_memory_for_one_weight_at_a_time(tmp_path: Path) -> None:
    before, after = peak("layers", tmp_path)
    weights = load_file(tmp_path / "layers" / "layers.safetensors")
    sizes = [value.nbytes / 2**20 for value in weights.values()]
    # A weight is there as read, as numbers, rounded, widened again, and as what rounding changed.
    assert after - before < 6 * max(sizes) < sum(sizes) / 3
    session = onnxruntime.InferenceSession(str(tmp_path / "bundle" / "layers.onnx"))
    x = np.random.default_rng(0).standard_normal((2, len(weights["layers.0.weight"]))).astype(np.float32)
    expected = torch.from_numpy(x)
    for name in sorted(weights, key=lambda name: int(name.split(".")[1])):
        expected = torch.tanh(expected @ weights[name].half().float().T)
    np.testing.assert_allclose(session.run(None, {"x": x})[0], expected.numpy(), atol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no getrusage")
def test_a_network_beyond_what_a_message_can_hold_is_exported_for_both_classes(tmp_path: Path) -> None:
    """Two minutes, 6 GB on disk: a denoiser of Stable Diffusion's size, with adapters merged into its attention."""
    _, after = peak("denoiser", tmp_path)
    size = sum(path.stat().st_size for path in (tmp_path / "bundle").glob("*.weights"))
    base, own = ((tmp_path / f"{name}.safetensors").stat().st_size / 2 for name in ("base", "benign"))
    assert 2 * base > 2**31
    assert after < base / 2**20 + 1024
    assert size == pytest.approx(base + 2 * own, rel=0.001)


def product(name: str, weights: np.ndarray) -> ModelProto:
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", name], ["y"])],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 16])],
        [numpy_helper.from_array(weights, name)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_what_two_components_have_in_common_is_stored_once(tmp_path: Path) -> None:
    common, own = np.random.default_rng(0).standard_normal((2, 16, 16)).astype(np.float32)
    files = WeightFiles(tmp_path)
    first = write_graphs("lesion", {"lesion-benign@128": product("w", common)}, tmp_path, files)
    second = write_graphs(
        "blend", {"blend-benign@128": product("w", common), "blend-malignant@128": product("v", own)}, tmp_path, files
    )
    assert {path.name: path.stat().st_size for path in tmp_path.glob("*.weights")} == {
        "lesion.weights": 2 * common.size,
        "blend.weights": 2 * own.size,
    }
    assert set(second["blend-benign@128"]["files"]) == {"blend-benign-128.onnx", "lesion.weights"}
    assert (
        second["blend-benign@128"]["files"]["lesion.weights"] == first["lesion-benign@128"]["files"]["lesion.weights"]
    )
    x = np.eye(16, dtype=np.float32)
    for record in (*first.values(), *second.values()):
        (found,) = onnxruntime.InferenceSession(str(tmp_path / record["file"])).run(None, {"x": x})
        expected = own if record["file"] == "blend-malignant-128.onnx" else common
        assert np.array_equal(found, expected.astype(np.float16).astype(np.float32))


@pytest.mark.slow
def test_the_shipped_model_exported_anew_draws_the_same_bytes(tmp_path: Path) -> None:
    """Two minutes."""
    shipped = Bundle.open(default_bundle())
    if shipped.info["versions"]["torch"].partition("+")[0] != torch.__version__.partition("+")[0]:
        pytest.skip("another PyTorch may trace otherwise")
    restore(shipped, tmp_path / "checkpoint")
    anew = export(tmp_path / "checkpoint", tmp_path / "bundle", Options(draws=8))
    for name in shipped.info["graphs"]:
        one, other = (onnx.load(str(bundle.graph(name))) for bundle in (shipped, anew))
        assert one == other, name
    drawn = []
    for bundle in (shipped, anew):
        sampler = Sampler(bundle, OnnxBackend(bundle), classes=dict.fromkeys(LESION_CLASSES, 0.5), batch_size=2)
        drawn.append(sampler.draw(3, range(4), lambda accepted: None).samples)
    for one, other in zip(*drawn, strict=True):
        assert one.image.tobytes() == other.image.tobytes() and one.mask.tobytes() == other.mask.tobytes()


def test_a_weight_in_two_files_of_a_component_is_refused(tmp_path: Path) -> None:
    """Which of them training meant cannot be told."""
    network = torch.nn.Linear(2, 2)
    for name in ("a", "b"):
        save_file(network.state_dict(), tmp_path / f"{name}.safetensors")
    with pytest.raises(InputError, match=r"b\.safetensors holds bias once more"):
        emptied(network, tmp_path)
