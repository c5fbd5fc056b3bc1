"""Half precision: what it rounds, what it leaves alone, and that an overflow is seen on a processor without it."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto, TensorProto
from torch import Tensor, nn

from busigen.export.graph_rewrites import TYPES, emulated, lowered
from busigen.export.trace import traced
from busigen.registry import OPSETS

EPSILON = {"fp16": 2.0**-11, "bf16": 2.0**-8}
"""Largest relative error of one rounding."""


class Small(nn.Module):
    """Convolution, norm, activation, a sum taken apart, and a residual: what the networks are made of."""

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.read = nn.Linear(8, 4)
        with torch.no_grad():
            self.first.weight.mul_(gain)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        hidden = hidden + self.second(nn.functional.silu(self.norm(hidden)))
        return self.read(hidden.pow(2).mean(dim=(2, 3)).sqrt())


@cache
def made(gain: float = 1.0) -> tuple[nn.Module, ModelProto]:
    torch.manual_seed(0)
    module = Small(gain).eval()
    return module, traced(module, {"x": torch.randn(2, 3, 16, 16)}, ["y"], OPSETS[0])


def run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {"x": x})
    return output


def images() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)


@pytest.mark.parametrize("precision", TYPES)
def test_results_are_off_by_a_few_roundings(precision: str) -> None:
    module, model = made()
    with torch.no_grad():
        expected = module(torch.from_numpy(images())).numpy()
    found = run(emulated(lowered(model, precision)), images())
    error = np.abs(found - expected).max() / np.abs(expected).max()
    # Six roundings lie on the longest way through; not one of them would show as nothing at all.
    assert EPSILON[precision] / 50 < error < 6 * EPSILON[precision]


def test_fp16_runs_on_the_cpu_as_it_is() -> None:
    _, model = made()
    low = lowered(model, "fp16")
    expected = run(model, images())
    assert np.abs(run(low, images()) - expected).max() < 6 * EPSILON["fp16"] * np.abs(expected).max()


@pytest.mark.parametrize("precision", TYPES)
def test_weights_of_products_are_halves_and_norms_stay_whole(precision: str) -> None:
    _, model = made()
    low = lowered(model, precision)
    onnx.checker.check_model(low, full_check=True)
    kinds = {tensor.name: tensor.data_type for tensor in low.graph.initializer}
    assert kinds[f"first.weight/as-{precision}"] == TYPES[precision] and "first.weight" not in kinds
    inferred = onnx.shape_inference.infer_shapes(low, strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in (*inferred.input, *inferred.value_info, *inferred.output)}
    for node in low.graph.node:
        if node.op_type in ("InstanceNormalization", "Pow", "Sqrt", "ReduceMean"):
            assert types[node.output[0]] == TensorProto.FLOAT, node.op_type
    assert types["x"] == types["y"] == TensorProto.FLOAT


def test_an_overflow_is_seen_although_this_processor_has_no_halves() -> None:
    """Activations of 1e6 pass fp16's 65,504 and not bf16's range."""
    module, model = made(gain=1e6)
    with torch.no_grad():
        expected = module(torch.from_numpy(images())).numpy()
    assert np.isfinite(run(model, images())).all()
    assert not np.isfinite(run(emulated(lowered(model, "fp16")), images())).all()
    found = run(emulated(lowered(model, "bf16")), images())
    assert np.abs(found - expected).max() < 6 * EPSILON["bf16"] * np.abs(expected).max()
