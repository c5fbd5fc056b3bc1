"""Weights that stay on disk: graphs are made and changed without them, and they are copied to a bundle one by one.

A weight is an ONNX tensor. That of a trained network holds no numbers: its external data names a safetensors file of
the checkpoint and the tensor in it. Tables and whatever a file lacks hold their numbers themselves.
"""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper, numpy_helper
from safetensors import safe_open
from torch import Tensor, nn

ALIGNMENT = 64

LARGEST_FILE = 12 << 20
"""Bytes of weights after which another file begins: code hosts warn of large ones. A single weight is never split."""

_PLACE = "busigen_place"
"""Attribute of a parameter: the safetensors file that holds it, and its name there."""


def emptied(module: nn.Module, folder: Path) -> None:
    """Take the numbers of a saved network's parameters out of memory; what reads them later finds them in its files."""
    files = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            files |= dict.fromkeys(file.keys(), path)
    for name, parameter in list(module.named_parameters()):
        if name in files:
            owner, _, own = name.rpartition(".")
            empty = nn.Parameter(parameter.to("meta"), requires_grad=False)
            setattr(empty, _PLACE, (files[name], name))
            setattr(module.get_submodule(owner), own, empty)


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


def numbers(tensor: TensorProto) -> NDArray[np.generic]:
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
    result = TensorProto()
    result.CopyFrom(tensor)
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
    result = ModelProto()
    result.CopyFrom(model)
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
                file.write(b"\0" * (start - size) + data)
            self._places[digest] = (path.name, start, len(data))
        return self._places[digest]

    def _path(self, component: str) -> Path:
        number = self._files.setdefault(component, 1)
        return self._folder / (f"{component}.weights" if number == 1 else f"{component}-{number}.weights")
