"""Writing a bundle: graphs with their weights in shared files, and hashes of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo

from busigen.export.weights import WeightFiles, numbers, on_disk, weights_of
from busigen.files import sha256_of

SMALL = 64
"""Weights of fewer elements stay inside the graph: halving them saves nothing."""

EXACT = "update/"
"""What the names of the solver's own weights begin with, which stay fp32: a transform and its inverse, rounded, would
no longer cancel, at every step, and in whole images' brightness above all."""

STORED = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)
"""Types of weights; integers of other types are shapes and indices, which engines want to see in the graph."""


def stored(model: ModelProto, component: str, files: WeightFiles) -> ModelProto:
    """A copy of a graph with its large weights in a component's files: fp32 ones as fp16, cast back where they are read.

    That halves what is stored and leaves arithmetic as it is; ONNX Runtime folds the casts when it loads the graph. A
    weight that fp16 would spoil stays fp32, and what is in half precision or int8 already stays as it is. One weight
    after the other is in memory.
    """
    result = ModelProto()
    result.CopyFrom(model)
    _store(result.graph, component, files)
    # Shapes that the tracer inferred would contradict the new types, and ONNX Runtime infers its own.
    del result.graph.value_info[:]
    return result


def _store(graph: GraphProto, component: str, files: WeightFiles) -> None:
    casts = []
    for tensor in graph.initializer:
        name, value, kind = tensor.name, numbers(tensor), tensor.data_type
        if value.size < SMALL or kind not in STORED:
            if tensor.external_data:
                tensor.CopyFrom(numpy_helper.from_array(value, name))
            continue
        if kind == TensorProto.FLOAT and not name.startswith(EXACT) and _fits_half(value):
            name, value, kind = f"{name}/fp16", value.astype(np.float16), TensorProto.FLOAT16
            casts.append(helper.make_node("Cast", [name], [tensor.name], to=TensorProto.FLOAT))
        file, offset, length = files.place(component, value.tobytes())
        tensor.CopyFrom(on_disk(name, value.shape, kind, location=file, offset=offset, length=length))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    # The nodes as they are in the graph now: those of the list were copied into it.
    for node in graph.node:
        # Names of nodes are a fifth of a graph file, and what a node writes still has one.
        node.ClearField("name")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _store(attribute.g, component, files)


def _fits_half(value: NDArray[np.generic]) -> bool:
    """Whether fp16 rounds a weight as it does ordinary numbers: nothing too large, and not all of it tiny."""
    with np.errstate(over="ignore"):
        error = np.abs(value.astype(np.float16).astype(np.float32) - value).max()
    return bool(error <= 2.0**-11 * np.abs(value).max())


def write_graphs(
    component: str, models: Mapping[str, ModelProto], folder: Path, files: WeightFiles
) -> dict[str, dict[str, Any]]:
    """Write the graphs of a component and their weights.

    Args:
        component: names the weight files.
        models: graphs by name, ``<component>`` or ``<component>@<window side>``.
        folder: the bundle.
        files: its weights so far.

    Returns:
        The records for ``bundle.json`` by graph name: files with their sha256, inputs, output.
    """
    records: dict[str, dict[str, Any]] = {}
    for name, model in models.items():
        file = f"{name.replace('@', '-')}.onnx"
        graph = stored(model, component, files)
        (folder / file).write_bytes(graph.SerializeToString(deterministic=True))
        places = (ExternalDataInfo(tensor) for tensor in weights_of(graph) if tensor.external_data)
        parts = [file, *sorted({place.location for place in places})]
        inputs = [value.name for value in graph.graph.input]
        records[name] = {"file": file, "files": parts, "inputs": inputs, "output": graph.graph.output[0].name}
    for record in records.values():
        record["files"] = {part: sha256_of(folder / part) for part in record["files"]}
        onnx.checker.check_model(str(folder / record["file"]))
    return records
