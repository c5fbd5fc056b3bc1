"""Weights that stay on disk: graphs are made and changed without them, and written with them to a bundle, one by one.

A weight is an ONNX tensor. That of a trained network holds no numbers: its external data names a safetensors file of
the checkpoint and the tensor in it. Tables and whatever a file lacks hold their numbers themselves.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, TensorProto, helper, numpy_helper
from onnx.external_data_helper import ExternalDataInfo
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from busigen.errors import InputError
from busigen.files import sha256_of

SMALL = 64  # Weights of fewer elements stay inside the graph: halving them saves nothing.
# What the names of the solver's own weights begin with, which stay fp32: a transform and its inverse, rounded, would no
# longer cancel, at every step, and in whole images' brightness above all.
EXACT = "update/"

STORED = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16, TensorProto.INT8, TensorProto.UINT8)
"""Types of weights; integers of other types are shapes and indices, which engines want to see in the graph."""

ALIGNMENT = 64
LARGEST_FILE = 12 << 20  # Bytes of weights after which another file begins: code hosts warn of large ones.

PART_BYTES = 64 << 20  # Of weights that are written to be read again, in one file.

_PLACE = "busigen_place"  # Attribute of a parameter: the safetensors file that holds it, and its name there.


def emptied(module: nn.Module, folder: Path) -> None:
    """Take the numbers of a saved network's parameters out of memory; what reads them later finds them in its files."""
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if twice := files.keys() & file.keys():
                raise InputError(f"{path} holds {min(twice)} once more.", fix="Leave the file that training wrote.")
            files |= dict.fromkeys(file.keys(), path)
    for name, parameter in list(module.named_parameters()):
        if name in files:
            owner, _, own = name.rpartition(".")
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            setattr(empty, _PLACE, (files[name], name))
            setattr(module.get_submodule(owner), own, empty)


def save_in_parts(module: nn.Module, folder: Path) -> None:
    """Write a network's parameters as fp32 safetensors files of bounded size, so that no second copy is in memory."""
    folder.mkdir()
    part: dict[str, Tensor] = {}
    left = list(module.named_parameters())
    for number, (name, value) in enumerate(left, start=1):
        part[name] = value.detach().contiguous()
        if number == len(left) or sum(value.nbytes for value in part.values()) > PART_BYTES:
            save_file(part, folder / f"{number}.safetensors")
            part = {}


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy of a module with the very same parameters."""
    return copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})


def weight(name: str, value: Tensor) -> TensorProto:
    """A parameter or buffer as a graph's constant."""
    if (place := getattr(value, _PLACE, None)) is None:
        return numpy_helper.from_array(value.detach().cpu().numpy(), name)
    return on_disk(name, value.shape, TensorProto.FLOAT, location=place[0], tensor=place[1])


def on_disk(name: str, dims: tuple[int, ...], kind: int, **place: object) -> TensorProto:
    """A tensor of an ONNX type that lies elsewhere."""
    tensor = TensorProto(name=name, dims=dims, data_type=kind, data_location=TensorProto.EXTERNAL)
    for key, found in place.items():
        tensor.external_data.add(key=key, value=str(found))
    return tensor


def numbers(tensor: TensorProto) -> NDArray[Any]:
    """A constant's numbers, out of the checkpoint if need be; what its type cannot hold becomes infinite."""
    if not tensor.external_data:
        return numpy_helper.to_array(tensor)
    place = {entry.key: entry.value for entry in tensor.external_data}
    with safe_open(place["location"], "pt") as file:
        found = file.get_tensor(place["tensor"]).float().numpy()
    with np.errstate(over="ignore"):
        return found.astype(helper.tensor_dtype_to_np_dtype(tensor.data_type))


def as_type(tensor: TensorProto, name: str, kind: int) -> TensorProto:
    """A weight under another name, in another type; what that cannot hold becomes infinite."""
    if not tensor.external_data:
        with np.errstate(over="ignore"):
            return numpy_helper.from_array(numbers(tensor).astype(helper.tensor_dtype_to_np_dtype(kind)), name)
    result = copy.deepcopy(tensor)
    result.name, result.data_type = name, kind
    return result


def weights_of(model: ModelProto) -> list[TensorProto]:
    """Every initialiser of a graph, those of a loop's body among them; the tensors are the model's own."""
    found = list(model.graph.initializer)
    for node in model.graph.node:
        found += [tensor for attribute in node.attribute for tensor in attribute.g.initializer]
    return found


def whole(model: ModelProto) -> ModelProto:
    """A copy of a small model that holds all numbers itself."""
    result = copy.deepcopy(model)
    for tensor in weights_of(result):
        tensor.CopyFrom(numpy_helper.from_array(numbers(tensor), tensor.name))
    return result


class WeightFiles:
    """The weights of a bundle, each stored once whatever graphs read it, in files of bounded size."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[bytes, tuple[str, int, int]] = {}
        self._files: dict[str, int] = {}

    def place(self, component: str, data: bytes) -> tuple[str, int, int]:
        """File, offset and length of a weight's bytes; new ones are added to the component's files."""
        digest = hashlib.sha256(data).digest()
        if digest not in self._places:
            path = self._path(component)
            size = path.stat().st_size if path.exists() else 0
            if size and size + len(data) + ALIGNMENT > LARGEST_FILE:
                self._files[component] += 1
                path, size = self._path(component), 0
            start = size + -size % ALIGNMENT
            with path.open("ab") as file:
                file.write(b"\0" * (start - size))
                file.write(data)
            self._places[digest] = (path.name, start, len(data))
        return self._places[digest]

    def _path(self, component: str) -> Path:
        number = self._files.setdefault(component, 1)
        return self._folder / (f"{component}.weights" if number == 1 else f"{component}-{number}.weights")


def stored(model: ModelProto, component: str, files: WeightFiles) -> ModelProto:
    """A copy of a graph, its large weights in a component's files: fp32 ones as fp16, cast back where they are read.

    That halves what is stored and leaves arithmetic as it is; ONNX Runtime folds the casts when it loads the graph. A
    weight that fp16 would spoil stays fp32, and what is in half precision or int8 already stays as it is. One weight
    after the other is in memory.
    """
    result = copy.deepcopy(model)
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


def _fits_half(value: NDArray[Any]) -> bool:
    """Whether fp16 rounds a weight as it does ordinary numbers: nothing too large, and not all of it tiny."""
    with np.errstate(over="ignore"):
        error = np.abs(value.astype(np.float16).astype(np.float32) - value).max()
    return bool(error <= 2.0**-11 * np.abs(value).max())


def write_graphs(
    component: str, models: Mapping[str, ModelProto], folder: Path, files: WeightFiles
) -> dict[str, dict[str, Any]]:
    """Write the graphs of a component and their weights into a bundle's folder; ``files`` are its weights so far.

    ``models`` go by name, ``<component>`` or ``<component>@<window side>``; one may have several names. Gives the
    records for ``bundle.json`` by the same names: files with their sha256, inputs, output.
    """
    records: dict[str, dict[str, Any]] = {}
    written: dict[int, dict[str, Any]] = {}
    for name, model in models.items():
        if id(model) in written:
            records[name] = written[id(model)]
            continue
        alone = sum(model is other for other in models.values()) == 1
        file = f"{name.replace('@', '-') if alone else component}.onnx"
        graph = stored(model, component, files)
        (folder / file).write_bytes(graph.SerializeToString(deterministic=True))
        places = (ExternalDataInfo(tensor) for tensor in weights_of(graph) if tensor.external_data)
        parts = [file, *sorted({place.location for place in places})]
        inputs = [value.name for value in graph.graph.input]
        records[name] = {"file": file, "files": parts, "inputs": inputs, "output": graph.graph.output[0].name}
        written[id(model)] = records[name]
    for record in written.values():
        record["files"] = {part: sha256_of(folder / part) for part in record["files"]}
        onnx.checker.check_model(str(folder / record["file"]))
    return records
