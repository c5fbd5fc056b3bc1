"""Writing a bundle: graphs with their weights in shared files, and hashes of all of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data

from busigen.files import sha256_of

SMALL = 64
"""Weights of fewer elements stay inside the graph: halving them saves nothing."""

EXACT = "update/"
"""What the names of the solver's own weights begin with, which stay fp32: a transform and its inverse, rounded, would
no longer cancel, at every step, and in whole images' brightness above all."""

ALIGNMENT = 64


LARGEST_FILE = 12 << 20
"""Bytes of weights after which another file begins: code hosts warn of large ones. A single weight is never split."""


class WeightFiles:
    """The weights that the graphs of a component share, whatever their window size, in files of bounded size."""

    def __init__(self, component: str) -> None:
        self.component = component
        self._contents = [bytearray()]
        self._places: dict[str, tuple[str, int, int]] = {}

    @property
    def names(self) -> list[str]:
        """The files begun so far."""
        numbers = range(1, len(self._contents) + 1)
        return [f"{self.component}.weights" if n == 1 else f"{self.component}-{n}.weights" for n in numbers]

    def place(self, data: bytes) -> tuple[str, int, int]:
        """Store a weight's bytes, once whatever its name, and return its file, offset and length."""
        digest = hashlib.sha256(data).hexdigest()
        if digest not in self._places:
            content = self._contents[-1]
            if content and len(content) + len(data) + ALIGNMENT > LARGEST_FILE:
                content = bytearray()
                self._contents.append(content)
            content += b"\0" * (-len(content) % ALIGNMENT)
            self._places[digest] = (self.names[-1], len(content), len(data))
            content += data
        return self._places[digest]

    def write(self, folder: Path) -> None:
        """Write the files."""
        for name, content in zip(self.names, self._contents, strict=True):
            (folder / name).write_bytes(bytes(content))


def stored(model: ModelProto, weights: WeightFiles) -> ModelProto:
    """Move a graph's large weights into ``weights``: fp32 ones as fp16, cast back to fp32 where they are read.

    That halves what is stored and leaves arithmetic as it is; ONNX Runtime folds the casts when it loads the graph. A
    weight that fp16 would spoil stays fp32, and what is in half precision or int8 already stays as it is.
    """
    result = ModelProto()
    result.CopyFrom(model)
    _store(result.graph, weights)
    _unnamed(result.graph)
    # Shapes that the tracer inferred would contradict the new types, and ONNX Runtime infers its own.
    del result.graph.value_info[:]
    return result


def _store(graph: GraphProto, weights: WeightFiles) -> None:
    casts = []
    for tensor in graph.initializer:
        value = numpy_helper.to_array(tensor)
        if value.size < SMALL or tensor.data_type not in _STORED:
            continue
        exact = tensor.name.startswith(EXACT)
        if tensor.data_type == TensorProto.FLOAT and not exact and _fits_half(value):
            name = tensor.name
            casts.append(helper.make_node("Cast", [f"{name}/fp16"], [name], to=TensorProto.FLOAT))
            tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f"{name}/fp16"))
        file, offset, length = weights.place(numpy_helper.to_array(tensor).tobytes())
        if not tensor.HasField("raw_data"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
        set_external_data(tensor, file, offset=offset, length=length)
        tensor.ClearField("raw_data")
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])
    # The nodes as they are in the graph now: those of the list were copied into it.
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _store(attribute.g, weights)


_STORED = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)
"""Types of weights; integers of other types are shapes and indices, which engines want to see in the graph."""


def _fits_half(value: np.ndarray) -> bool:
    """Whether fp16 rounds a weight as it does ordinary numbers: nothing too large, and not all of it tiny."""
    with np.errstate(over="ignore"):
        error = np.abs(value.astype(np.float16).astype(np.float32) - value).max()
    return bool(error <= 2.0**-11 * np.abs(value).max())


def weights_of(model: ModelProto) -> list[TensorProto]:
    """Every initialiser of a graph, those of a loop's body among them; the tensors are the model's own."""
    found = list(model.graph.initializer)
    for node in model.graph.node:
        found += [tensor for attribute in node.attribute for tensor in attribute.g.initializer]
    return found


def _unnamed(graph: GraphProto) -> None:
    """Drop the nodes' names, a fifth of a graph file; what a node writes still has one."""
    for node in graph.node:
        node.ClearField("name")
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _unnamed(attribute.g)


def write_graphs(folder: Path, component: str, models: Mapping[str, ModelProto]) -> dict[str, dict[str, object]]:
    """Write the graphs of a component and their common weights.

    Args:
        folder: the bundle.
        component: names the weight files.
        models: graphs by name, ``<component>`` or ``<component>@<window side>``.

    Returns:
        The records for ``bundle.json`` by graph name: files with their sha256, inputs, output.
    """
    weights = WeightFiles(component)
    written = {}
    for name, model in models.items():
        file = f"{name.replace('@', '-')}.onnx"
        graph = stored(model, weights)
        (folder / file).write_bytes(graph.SerializeToString(deterministic=True))
        places = (ExternalDataInfo(t) for t in weights_of(graph) if t.external_data)
        parts = [file, *sorted({place.location for place in places})]
        written[name] = (parts, [value.name for value in graph.graph.input], graph.graph.output[0].name)
    weights.write(folder)
    records: dict[str, dict[str, object]] = {}
    for name, (parts, inputs, output) in written.items():
        files = {part: sha256_of(folder / part) for part in parts}
        onnx.checker.check_model(str(folder / parts[0]))
        records[name] = {"file": parts[0], "files": files, "inputs": inputs, "output": output}
    return records
