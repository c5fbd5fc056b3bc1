"""Writing a bundle: graphs with fp16 weights in shared files, hashes, and ``bundle.json`` last."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo, set_external_data

SMALL = 64
"""Weights of fewer elements stay fp32 inside the graph: halving them saves nothing."""

ALIGNMENT = 64


LARGEST_FILE = 12 << 20
"""Bytes of weights after which another file begins: code hosts warn of large ones. A single weight is never split."""


class WeightFiles:
    """The fp16 weights that the graphs of a component share, whatever their window size, in files of bounded size."""

    def __init__(self, component: str) -> None:
        self.component = component
        self._contents = [bytearray()]
        self._places: dict[str, tuple[str, int, int]] = {}

    @property
    def names(self) -> list[str]:
        """The files begun so far."""
        numbers = range(1, len(self._contents) + 1)
        return [f"{self.component}.weights" if n == 1 else f"{self.component}-{n}.weights" for n in numbers]

    def place(self, name: str, value: np.ndarray) -> tuple[str, int, int]:
        """Store a weight, once whatever its name, and return its file, offset and length.

        Raises:
            ValueError: the value does not fit fp16.
        """
        half = value.astype(np.float16)
        if not np.isfinite(half).all():
            raise ValueError(f"weight {name} does not fit fp16: its largest magnitude is {np.abs(value).max():.3g}")
        data = half.tobytes()
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


def halved(model: ModelProto, weights: WeightFiles) -> ModelProto:
    """Move a graph's large fp32 weights into ``weights`` as fp16, cast back to fp32 where they are read.

    Storage is halved and arithmetic stays fp32: CPUs gain nothing from fp16, and ONNX Runtime folds the casts when it
    loads the graph.
    """
    result = ModelProto()
    result.CopyFrom(model)
    casts = []
    for tensor in result.graph.initializer:
        value = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or value.size < SMALL:
            continue
        stored = f"{tensor.name}/fp16"
        file, offset, length = weights.place(tensor.name, value)
        casts.append(helper.make_node("Cast", [stored], [tensor.name], to=TensorProto.FLOAT))
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), stored))
        set_external_data(tensor, file, offset=offset, length=length)
        tensor.ClearField("raw_data")
    nodes = list(result.graph.node)
    del result.graph.node[:]
    result.graph.node.extend([*casts, *nodes])
    _unnamed(result.graph)
    # Shapes that the tracer inferred would contradict the new types, and ONNX Runtime infers its own.
    del result.graph.value_info[:]
    return result


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
        graph = halved(model, weights)
        (folder / file).write_bytes(graph.SerializeToString(deterministic=True))
        places = (ExternalDataInfo(t) for t in graph.graph.initializer if t.external_data)
        parts = [file, *sorted({place.location for place in places})]
        written[name] = (parts, [value.name for value in graph.graph.input], graph.graph.output[0].name)
    weights.write(folder)
    records: dict[str, dict[str, object]] = {}
    for name, (parts, inputs, output) in written.items():
        files = {part: hashlib.sha256((folder / part).read_bytes()).hexdigest() for part in parts}
        onnx.checker.check_model(str(folder / parts[0]))
        records[name] = {"file": parts[0], "files": files, "inputs": inputs, "output": output}
    return records
