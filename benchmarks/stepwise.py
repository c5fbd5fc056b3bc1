"""A bundle's graphs without their loop: ONNX Runtime is called from Python for every solver step, as scripts do.

The loop's body, what comes before it and what comes after it are cut out of the shipped graphs, so that nodes and
weights are the bundle's own.
"""

from __future__ import annotations

# isort: off
import busigen  # noqa: F401  # Before ONNX Runtime, which would report home.

# isort: on
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper

from busigen.export.weights import weights_of
from busigen.runtime.backends.base import Backend, usable_cores
from busigen.runtime.backends.bundle import Bundle
from busigen.solver import solver_steps

X, RESULT = "solver/x", "solver/result"
"""Names that ``busigen.export.assembly`` gives: the sample and the loop's end."""

NOW = {field: f"solver/{field}_now" for field in ("t", "s")}
"""The names of a turn's times."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Parts:
    """One stage's graphs: what is computed once before the steps, one solver step, what is computed after them."""

    before: ModelProto | None
    step: ModelProto
    after: ModelProto


class StepwiseBackend(Backend):
    """A backend with ONNX Runtime's default session and the loop in Python.

    Args:
        bundle: an opened bundle.
        folder: where the cut graphs and copies of the weights are written.
        threads: compute threads; ``None`` takes one per core.
    """

    name = "cpu"
    version = str(ort.__version__)

    def __init__(self, bundle: Bundle, folder: Path, threads: int | None = None) -> None:
        self._bundle, self._folder = bundle, folder
        self._options = ort.SessionOptions()
        self._options.intra_op_num_threads = threads or usable_cores()
        self._sessions: dict[str, ort.InferenceSession] = {}
        if not folder.exists():
            cut(bundle, folder)

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> Floats:
        """See :class:`busigen.runtime.backends.base.Backend`."""
        stage = graph.partition("@")[0].partition("-")[0]
        if stage not in self._bundle.info["solver_steps"]:
            (output,) = self._call(graph, inputs).values()
            return output
        values = dict(inputs)
        if self._file(f"{graph}.before").exists():
            values |= self._call(f"{graph}.before", values)
        x = values["noise"]
        for step in solver_steps(stage, self._bundle.info["solver_steps"][stage]):
            now = {name: np.array([getattr(step, field)], dtype=np.float32) for field, name in NOW.items()}
            (x,) = self._call(f"{graph}.step", {**values, **now, X: x}).values()
        (output,) = self._call(f"{graph}.after", {**values, RESULT: x}).values()
        return output

    def _call(self, name: str, values: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
        if name not in self._sessions:
            self._sessions[name] = ort.InferenceSession(
                str(self._file(name)), self._options, providers=["CPUExecutionProvider"]
            )
        session = self._sessions[name]
        outputs = session.run(None, {value.name: values[value.name] for value in session.get_inputs()})
        return {value.name: output for value, output in zip(session.get_outputs(), outputs, strict=True)}

    def _file(self, name: str) -> Path:
        return self._folder / f"{name}.onnx"


def cut(bundle: Bundle, folder: Path) -> None:
    """Write the parts of every graph that has a loop, and copies of the others."""
    folder.mkdir(parents=True)
    for file in {file for name in bundle.graph_names for file in bundle.info["graphs"][name]["files"]}:
        if not file.endswith(".onnx"):
            shutil.copy(bundle.folder / file, folder / file)
    for name in bundle.graph_names:
        model = onnx.load(str(bundle.graph(name)), load_external_data=False)
        if not any(node.op_type == "Loop" for node in model.graph.node):
            shutil.copy(bundle.graph(name), folder / f"{name}.onnx")
            continue
        parts = split(model)
        for part in ("before", "step", "after"):
            found = getattr(parts, part)
            if found is not None:
                (folder / f"{name}.{part}.onnx").write_bytes(found.SerializeToString())


def split(model: ModelProto) -> Parts:
    """Cut a graph at its loop."""
    outer = list(model.graph.node)
    (loop,) = (node for node in outer if node.op_type == "Loop")
    body: GraphProto = loop.attribute[0].g
    inputs = {value.name for value in model.graph.input}
    dependent = _dependent(outer[: outer.index(loop)], inputs)
    # What the loop reads of the graph around it: values that depend on the inputs, and weights, which stay constants.
    read = {name for node in body.node for name in node.input}
    conditions = sorted(read & dependent)
    given = [X, *NOW.values(), *sorted(read & inputs), *conditions]
    steps = _part(model, [*outer, *body.node], given, [body.output[1].name])
    before = _part(model, outer, sorted(inputs), conditions) if conditions else None
    after = _part(model, outer, [RESULT, *sorted(inputs)], [model.graph.output[0].name])
    return Parts(before, steps, after)


def _dependent(nodes: Iterable[NodeProto], inputs: set[str]) -> set[str]:
    """Values that nodes, in their order, compute from the inputs."""
    found: set[str] = set()
    for node in nodes:
        if (inputs | found) & set(node.input):
            found |= set(node.output)
    return found


def _part(model: ModelProto, nodes: Sequence[NodeProto], inputs: Sequence[str], outputs: Sequence[str]) -> ModelProto:
    """The model that computes ``outputs`` from as many of ``inputs`` as they need."""
    maker = {name: number for number, node in enumerate(nodes) for name in node.output}
    needed: set[int] = set()
    names: set[str] = set()
    todo = list(outputs)
    while todo:
        name = todo.pop()
        if name in names:
            continue
        names.add(name)
        if name not in inputs and name in maker:
            needed.add(maker[name])
            todo += [value for value in nodes[maker[name]].input if value]
    graph = helper.make_graph(
        [nodes[number] for number in sorted(needed)],
        model.graph.name,
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in inputs if name in names],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [tensor for tensor in weights_of(model) if tensor.name in names],
    )
    return helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
