"""Sums that do not depend on threads: alone, and in the shipped bundle, whose samples they leave as they were."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper

from busigen.export import trace
from busigen.export.graph_rewrites import make_sums_deterministic
from busigen.registry import OPSETS, PRESETS
from busigen.runtime.backends.base import EngineOptions
from busigen.runtime.backends.bundle import RECORD, Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.dataset.format import Sample
from busigen.runtime.sampling.sampler import Sampler
from busigen.training.networks.build import build
from busigen.training.networks.inference import Networks

TINY = PRESETS["tiny"]


def reduction(op: str, sizes: list[int], axes: list[int], keepdims: int, order: list[int] | None) -> ModelProto:
    """A sum over ``axes`` of a batch of ``sizes``, squared; transposed to ``order`` before."""
    source, nodes = "x", []
    if order is not None:
        nodes.append(helper.make_node("Transpose", [source], ["turned"], perm=order))
        source = "turned"
    nodes.append(helper.make_node("Pow", [source, "two"], ["squared"]))
    nodes.append(helper.make_node(op, ["squared", "axes"], ["y"], keepdims=keepdims))
    graph = helper.make_graph(
        nodes,
        "reduction",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", *sizes])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.array(axes), "axes"), numpy_helper.from_array(np.float32(2.0), "two")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def run(model: ModelProto, threads: int, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: x})
    return output


@pytest.mark.parametrize(
    ("op", "sizes", "axes", "keepdims", "order"),
    [
        ("ReduceMean", [33, 16, 16], [1], 1, None),
        ("ReduceMean", [33, 16, 16], [-3], 0, None),
        ("ReduceSum", [48, 40], [1], 0, None),
        ("ReduceSum", [4, 12, 5, 40], [2, 3], 1, None),
        # A norm of channels, as PyTorch exports it.
        ("ReduceMean", [33, 16, 16], [3], 1, [0, 2, 3, 1]),
        ("ReduceSum", [33, 16, 16], [-1], 0, [0, 2, 3, 1]),
    ],
)
def test_neither_threads_nor_batch_change_a_bit(
    op: str, sizes: list[int], axes: list[int], keepdims: int, order: list[int] | None
) -> None:
    model = reduction(op, sizes, axes, keepdims, order)
    rewritten = make_sums_deterministic(model)
    x = np.random.default_rng(0).standard_normal((7, *sizes), dtype=np.float32)
    expected = run(rewritten, 1, x)
    for threads in (1, 2, 5):
        for rows in (1, 3, 7):
            assert np.array_equal(run(rewritten, threads, x[:rows]), expected[:rows])
    # Sums of at most 60 squares of about one, each rounded to 24 bits: far more than the rounding of all of them.
    np.testing.assert_allclose(expected, run(model, 1, x), rtol=1e-5)


def test_sums_that_have_one_order_are_left_alone() -> None:
    for sizes, axes in (([16, 16], [2]), ([16, 2, 16], [2]), ([16, 16], [1, 2])):
        model = reduction("ReduceMean", sizes, axes, 0, None)
        assert make_sums_deterministic(model) == model


def test_a_sum_that_cannot_be_mended_is_named() -> None:
    model = reduction("ReduceSum", [4, 5, 6, 7], [1, 3], 1, None)
    with pytest.raises(ValueError, match=r"y is over axes \[1, 3\]"):
        make_sums_deterministic(model)


def test_an_exported_encoder_is_steady() -> None:
    torch.manual_seed(0)
    channels = TINY.latent_channels
    networks = Networks(TINY, build("autoencoder", TINY), torch.zeros(channels), torch.ones(channels))
    model = make_sums_deterministic(trace.Tracer(OPSETS[0]).encoder(networks, 128))
    x = np.random.default_rng(0).standard_normal((2, 1, 128, 128), dtype=np.float32)
    assert np.array_equal(run(model, 1, x), run(model, 5, x))


def steady_bundle(folder: Path) -> Bundle:
    """The shipped bundle with its graphs rewritten."""
    shutil.copytree(default_bundle(), folder)
    info = json.loads((folder / RECORD).read_text())
    for record in info["graphs"].values():
        path = folder / record["file"]
        data = make_sums_deterministic(onnx.load(path, load_external_data=False)).SerializeToString(deterministic=True)
        path.write_bytes(data)
        record["files"][path.name] = hashlib.sha256(data).hexdigest()
    (folder / RECORD).write_text(json.dumps(info))
    return Bundle.open(folder)


def test_threads_change_no_byte_of_a_sample(tmp_path: Path) -> None:
    def draw(bundle: Bundle, threads: int) -> list[Sample]:
        sampler = Sampler(
            bundle, OnnxBackend(bundle, options=EngineOptions(threads)), classes={"benign": 1.0}, batch_size=2
        )
        return sampler.attempt(11, [(0, 0), (1, 0)])[0]

    bundle = steady_bundle(tmp_path / "bundle")
    # As it was at two threads, where each image of a batch of two has a thread of its own.
    expected = draw(Bundle.open(default_bundle()), 2)
    assert len(expected) == 2
    for threads in (1, 5):
        for found, wanted in zip(draw(bundle, threads), expected, strict=True):
            assert np.array_equal(found.image, wanted.image)
            assert np.array_equal(found.mask, wanted.mask)
            assert found.row == wanted.row
