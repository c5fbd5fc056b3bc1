"""Graphs whose shapes are constants, for any batch; and the solver's loop in both forms."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto

from busigen.export.assembly import with_solver
from busigen.export.graph_rewrites import make_sums_deterministic
from busigen.export.trace import Tracer
from busigen.export.weights import weights_of
from busigen.registry import CLASSES, LOOPS, OPSETS, PRESETS, SCANNERS
from busigen.solver import solver_steps
from busigen.training.networks.build import build
from busigen.training.networks.inference import Velocity, integrate

TINY = PRESETS["tiny"]
CHANNELS = TINY.latent_channels
CONDITIONS = (SCANNERS, CHANNELS, 4, 1)
STEPS = solver_steps("lesion", 3)


@pytest.fixture(scope="module")
def unet() -> torch.nn.Module:
    torch.manual_seed(0)
    unet = build("lesion", TINY).eval()
    for table in unet.spectrum.buffers():
        if table.ndim == 3:
            table.uniform_(0.2, 1.5)
    unet.spectrum.styles.normal_(0.0, 0.3)
    return unet


@pytest.fixture(scope="module")
def step(unet: torch.nn.Module) -> ModelProto:
    return make_sums_deterministic(Tracer(OPSETS[0]).step(unet, 16, TINY.tokens, CONDITIONS))


@pytest.fixture(scope="module")
def graphs(unet: torch.nn.Module, step: ModelProto) -> dict[str, ModelProto]:
    update = make_sums_deterministic(Tracer(OPSETS[0]).update(unet.spectrum, CHANNELS, 16, 16, conditions=CONDITIONS))
    label = CLASSES.index("benign")
    return {loop: with_solver(step, [STEPS], label, loop=loop, name="s", output="o", update=update) for loop in LOOPS}


def inputs(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    made = {
        "noise": torch.randn(7, CHANNELS, 16, 16, generator=generator),
        "tokens": torch.randn(7, TINY.tokens, TINY.context_dim, generator=generator),
        "keep": (torch.rand(7, TINY.tokens, generator=generator) < 0.8).float(),
        **{f"condition{k}": torch.randn(7, size, 16, 16, generator=generator) for k, size in enumerate(CONDITIONS)},
    }
    made |= {name: (made[name] > 0).float() for name in ("condition2", "condition3")}
    return {name: value[:batch] for name, value in made.items()}


def session(model: ModelProto, threads: int = 1, optimised: str = "") -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.optimized_model_filepath = optimised
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_no_shape_is_computed_for_a_reshape(step: ModelProto) -> None:
    kinds = Counter(node.op_type for node in step.graph.node)
    # What is left spreads the class over the batch, and is taken out with the loop.
    assert kinds["Shape"] <= 1 and kinds["Reshape"] > 10


@pytest.mark.parametrize("loop", LOOPS)
def test_a_graph_is_the_solver_for_every_batch(unet: torch.nn.Module, graphs: dict[str, ModelProto], loop: str) -> None:
    runner = session(graphs[loop])
    for batch in (1, 2, 7):
        v = inputs(batch)
        label = torch.full((batch,), CLASSES.index("benign"))
        expected = integrate(
            Velocity(unet), v["noise"], label, v["tokens"], v["keep"], STEPS, *(v[f"condition{k}"] for k in range(4))
        ).numpy()
        (found,) = runner.run(None, {name: value.numpy() for name, value in v.items()})
        # Two engines that add in other orders, three times over: some hundred times fp32's rounding.
        np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("loop", LOOPS)
def test_neither_threads_nor_batch_change_a_bit(graphs: dict[str, ModelProto], loop: str) -> None:
    whole = {name: value.numpy() for name, value in inputs(7).items()}
    (expected,) = session(graphs[loop], 1).run(None, whole)
    for threads in (2, 5):
        runner = session(graphs[loop], threads)
        for batch in (2, 3, 7):
            (found,) = runner.run(None, {name: value[:batch] for name, value in whole.items()})
            assert np.array_equal(found, expected[:batch])


def test_written_out_steps_share_weights_and_leave_no_embedding_of_time(
    step: ModelProto, graphs: dict[str, ModelProto], tmp_path: object
) -> None:
    def parameters(model: ModelProto) -> int:
        return sum(int(np.prod(tensor.dims)) for tensor in weights_of(model) if tensor.name.startswith("velocity."))

    assert parameters(graphs["unrolled"]) == parameters(graphs["loop"]) == parameters(step)
    path = f"{tmp_path}/optimised.onnx"
    session(graphs["unrolled"], optimised=path)
    kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
    # The embedding of time is made of sines and cosines, and nothing else is.
    assert kinds["Sin"] == kinds["Cos"] == 0 and kinds["Conv"] > 0


def test_what_is_alike_in_every_step_is_computed_once(step: ModelProto, graphs: dict[str, ModelProto]) -> None:
    (loop,) = (node for node in graphs["loop"].graph.node if node.op_type == "Loop")
    before = {weight for node in graphs["loop"].graph.node for weight in node.input}
    inside = {weight for node in loop.attribute[0].g.node for weight in node.input}
    keys = [tensor.name for tensor in step.graph.initializer if ".attn2.to_k" in tensor.name]
    # Keys of the context's tokens: their weights are transposed, and multiplied, before the loop.
    assert keys and not inside.intersection(keys) and before.issuperset(keys)
