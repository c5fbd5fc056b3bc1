"""Bundles that are made of the shipped one without any training."""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, TensorProto, compose, helper, numpy_helper

from busigen.registry import SCANNERS
from busigen.runtime.backends.bundle import default_bundle

Info = dict[str, Any]

_OF_START = ("mixed/noise_share", "mixed/start_share", "solver/t", "solver/s")

DOUBLED = [1.0, 1.0, 2.0, 2.0]
"""Resize's scales for windows of 128 pixels that are shown at 256; the last two halves for the way back."""


@cache
def plain() -> Path:
    """The shipped bundle as one of schema 6: its prior starts from noise alone, and no graph is told a scanner."""
    folder = Path(tempfile.mkdtemp(prefix="busigen-plain-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = json.loads((default_bundle() / "bundle.json").read_text())
    for path in default_bundle().iterdir():
        # Copied, not linked: ONNX Runtime refuses weights that have a second name, and busigen copies them then.
        (folder / path.name).write_bytes(path.read_bytes())
    phantoms, _ = info.pop("phantoms", None), info.pop("scanners", None)
    for name, record in info["graphs"].items():
        model = onnx.load(os.fspath(folder / record["file"]), load_external_data=False)
        _forget_scanner(model.graph)
        if name == "prior" and phantoms is not None:
            _start_from_noise(model.graph, phantoms["start"])
        onnx.save(model, os.fspath(folder / record["file"]))
        record["inputs"] = [value.name for value in model.graph.input]
        record["files"][record["file"]] = hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(info | {"schema": 6}))
    return folder


def _without_input(graph: GraphProto, name: str) -> bool:
    """Take an input off a graph, if it is there."""
    left = [value for value in graph.input if value.name != name]
    found = len(left) < len(graph.input)
    del graph.input[:]
    graph.input.extend(left)
    return found


def _forget_scanner(graph: GraphProto) -> None:
    """Any scanner, for as many rows as there are, in the place of the input."""
    if not _without_input(graph, "scanner"):
        return
    graph.initializer.append(numpy_helper.from_array(np.array([SCANNERS]), "any/scanners"))
    nodes = [
        helper.make_node("Shape", [graph.input[0].name], ["any/rows"], start=0, end=1),
        helper.make_node("Concat", ["any/rows", "any/scanners"], ["any/shape"], axis=0),
        helper.make_node("ConstantOfShape", ["any/shape"], ["any/scanner"]),
    ]
    for node in graph.node:
        node.input[:] = ["any/scanner" if name == "scanner" else name for name in node.input]
    for number, node in enumerate(nodes):
        graph.node.insert(number, node)


def _start_from_noise(graph: GraphProto, start: float) -> None:
    """No phantom is mixed with the noise, and the times of the steps begin with 1."""
    _without_input(graph, "start")
    for node in graph.node:
        node.input[:] = ["noise" if name == "start" else name for name in node.input]
    (body,) = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    for one in [*graph.initializer, *body.initializer]:
        value = numpy_helper.to_array(one) if one.name in _OF_START else None
        if value is not None:
            changed = value / np.float32(start) if one.name.startswith("solver/") else one.name == "mixed/noise_share"
            one.CopyFrom(numpy_helper.from_array(np.asarray(changed, np.float32), one.name))


def stated() -> Info:
    """The record of `plain` with everything said that schema 6 says."""
    info = json.loads((plain() / "bundle.json").read_text())
    return {
        **info,
        "schema": 6,
        "resolution": 256,
        "latent_factor": 8,
        "windows": {"128": 128, "256": 256},
        "background": {"decoder": "decoder@256", "latent_channels": 8},
    }


def written(folder: Path, info: Info) -> Path:
    """A bundle of that record: files that are not there yet are those of `plain`, and all hashes are made right."""
    folder.mkdir(exist_ok=True)
    for path in plain().iterdir():
        if not (folder / path.name).exists():
            (folder / path.name).write_bytes(path.read_bytes())
    for record in info["graphs"].values():
        for file in {record["file"], *record["files"]}:
            record["files"][file] = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    (folder / "bundle.json").write_text(json.dumps(info))
    return folder


def loaded(info: Info, graph: str) -> ModelProto:
    """A graph of `plain`, its weights left in their files."""
    return onnx.load(os.fspath(plain() / info["graphs"][graph]["file"]), load_external_data=False)


def saved(folder: Path, model: ModelProto, file: str, weights: dict[str, str], **more: Any) -> Info:
    """The record of a graph that is written to ``file``; ``weights`` are files that it reads."""
    folder.mkdir(exist_ok=True)
    onnx.save(model, os.fspath(folder / file))
    names = {name: "" for name in (file, *weights) if name == file or name.endswith(".weights")}
    inputs = [value.name for value in model.graph.input]
    return {"file": file, "files": names, "inputs": inputs, "output": model.graph.output[0].name, **more}


def switched(info: Info, graphs: Sequence[str]) -> ModelProto:
    """Graphs with the same inputs as one, whose input ``adapter``, a one-hot row, says whose output comes out."""
    parts = [compose.add_prefix(loaded(info, graph), f"{number}/") for number, graph in enumerate(graphs)]
    names = info["graphs"][graphs[0]]["inputs"]
    plain = {value.name: value for value in loaded(info, graphs[0]).graph.input}
    nodes = [
        helper.make_node("Identity", [name], [f"{number}/{name}"]) for number in range(len(parts)) for name in names
    ]
    nodes += [node for part in parts for node in part.graph.node]
    terms = []
    for number, part in enumerate(parts):
        place = helper.make_tensor(f"place/{number}", TensorProto.INT64, [1], [number])
        axes = helper.make_tensor(f"axes/{number}", TensorProto.INT64, [2], [2, 3])
        parts[number].graph.initializer.extend([place, axes])
        nodes += [
            helper.make_node("Gather", ["adapter", place.name], [f"flat/{number}"], axis=1),
            helper.make_node("Unsqueeze", [f"flat/{number}", axes.name], [f"weight/{number}"]),
            helper.make_node("Mul", [part.graph.output[0].name, f"weight/{number}"], [f"term/{number}"]),
        ]
        terms.append(f"term/{number}")
    nodes.append(helper.make_node("Sum", terms, ["latents"]))
    inputs = [*plain.values(), helper.make_tensor_value_info("adapter", TensorProto.FLOAT, ["batch", 4])]
    output = helper.make_tensor_value_info("latents", TensorProto.FLOAT, None)
    tensors = [tensor for part in parts for tensor in part.graph.initializer]
    graph = helper.make_graph(nodes, "switched", inputs, [output], initializer=tensors)
    return helper.make_model(graph, opset_imports=parts[0].opset_import, ir_version=parts[0].ir_version)


def resized(model: ModelProto, inputs: Sequence[str], output: bool = False) -> ModelProto:
    """A graph for windows twice as large as it takes: named inputs are doubled, and the output is halved if asked."""
    graph = model.graph
    graph.initializer.append(helper.make_tensor("twice", TensorProto.FLOAT, [4], DOUBLED))
    for value in graph.input:
        if value.name in inputs:
            shown = f"shown/{value.name}"
            for node in graph.node:
                node.input[:] = [shown if name == value.name else name for name in node.input]
            resize = helper.make_node(
                "Resize", [value.name, "", "twice"], [shown], mode="nearest", nearest_mode="floor"
            )
            resize.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
            graph.node.insert(0, resize)
            for axis in (2, 3):
                value.type.tensor_type.shape.dim[axis].dim_value //= 2
    if output:
        old = graph.output[0].name
        for node in graph.node:
            node.output[:] = ["full" if name == old else name for name in node.output]
        graph.node.append(helper.make_node("AveragePool", ["full"], [old], kernel_shape=[2, 2], strides=[2, 2]))
        graph.output[0].CopyFrom(helper.make_tensor_value_info(old, TensorProto.FLOAT, None))
    return model


def read_afresh(model: ModelProto, number: int, count: int) -> ModelProto:
    """A graph that starts from array ``number`` of its input ``fresh``, and adds nothing of its input ``noise``."""
    graph = model.graph
    (noise,) = (value for value in graph.input if value.name == "noise")
    channels, cells = (noise.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 2))
    for node in graph.node:
        node.input[:] = ["started" if name == "noise" else name for name in node.input]
    graph.initializer.extend(
        [
            helper.make_tensor("fresh/number", TensorProto.INT64, [], [number]),
            helper.make_tensor("fresh/nothing", TensorProto.FLOAT, [], [0.0]),
        ]
    )
    for node in (
        helper.make_node("Add", ["fresh/one", "fresh/ignored"], ["started"]),
        helper.make_node("Gather", ["fresh", "fresh/number"], ["fresh/one"], axis=1),
        helper.make_node("Mul", ["noise", "fresh/nothing"], ["fresh/ignored"]),
    ):
        graph.node.insert(0, node)
    shape = ["batch", count, channels, cells, cells]
    graph.input.append(helper.make_tensor_value_info("fresh", TensorProto.FLOAT, shape))
    return model
