"""Putting graphs together: the few-step sampling loop unrolled around one traced network evaluation.

Tracing a UNet takes half a minute, copying its nodes takes none; so the network is traced once and its nodes are
repeated per solver step, all of them reading the same initialisers. Everything that does not depend on the step (the
projections of context tokens) is the same expression in every copy, and ONNX Runtime computes it once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from busigen.solver import SolverStep


class Assembly:
    """A graph under construction, into which traced graphs are pasted under prefixes."""

    def __init__(self, opset: Sequence[onnx.OperatorSetIdProto], ir_version: int) -> None:
        self.nodes: list[NodeProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.inputs: dict[str, ValueInfoProto] = {}
        self._opset, self._ir_version = list(opset), ir_version

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add an initialiser and return its name."""
        self.constants[name] = numpy_helper.from_array(value, name)
        return name

    def add(self, kind: str, inputs: Sequence[str], output: str) -> str:
        """Add one node and return its output's name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output))
        return output

    def paste(self, model: ModelProto, prefix: str, wiring: Mapping[str, str], shared: str) -> list[str]:
        """Copy a model's nodes in.

        Args:
            model: what to copy.
            prefix: put before every name that the copy computes.
            shared: put before the names of its initialisers, so that further copies of the same model share them.
            wiring: the model's inputs by name, each with the value to read; inputs not named become inputs here.

        Returns:
            The names of the model's outputs in this graph.
        """
        graph = model.graph
        names = dict(wiring)
        for tensor in graph.initializer:
            names[tensor.name] = shared + tensor.name
            if names[tensor.name] not in self.constants:
                copy = TensorProto()
                copy.CopyFrom(tensor)
                copy.name = names[tensor.name]
                self.constants[copy.name] = copy
        for value in graph.input:
            if value.name not in names:
                self.inputs[value.name] = value
                names[value.name] = value.name
        for node in graph.node:
            twin = NodeProto()
            twin.CopyFrom(node)
            twin.name = prefix + node.name
            if any(attribute.HasField("g") for attribute in node.attribute):
                raise ValueError(f"node {node.name} has a subgraph, which cannot be unrolled")
            twin.input[:] = [names[name] if name else "" for name in node.input]
            for name in node.output:
                names[name] = prefix + name
            twin.output[:] = [names[name] if name else "" for name in node.output]
            self.nodes.append(twin)
        return [names[value.name] for value in graph.output]

    def build(self, output: str, like: ValueInfoProto, final_name: str, name: str) -> ModelProto:
        """Finish with one output, computed as ``output``, typed ``like`` and known outside as ``final_name``."""
        self.add("Identity", [output], final_name)
        final = ValueInfoProto()
        final.CopyFrom(like)
        final.name = final_name
        graph: GraphProto = helper.make_graph(
            self.nodes,
            name,
            list(self.inputs.values()),
            [final],
            list(self.constants.values()),
        )
        model = helper.make_model(graph, opset_imports=self._opset, ir_version=self._ir_version)
        onnx.checker.check_model(model)
        return model


def unroll(
    step: ModelProto,
    steps: Sequence[SolverStep],
    label: int,
    *,
    name: str,
    output: str,
    before: ModelProto | None = None,
    after: ModelProto | None = None,
) -> ModelProto:
    """Build the whole sampler of one stage.

    Args:
        step: traced ``(x, t, label, tokens, keep, *condition)`` to velocity; ``t`` and ``label`` have shape (1,).
        steps: the solver's constants.
        label: class index.
        name: the graph's name.
        output: its output's name.
        before: traced computation of some of ``step``'s inputs, whose names its outputs have.
        after: traced sample to output.
    """
    assembly = Assembly(step.opset_import, step.ir_version)
    wiring = {"label": assembly.constant("class_label", np.array([label], dtype=np.int64))}
    if before is not None:
        computed = assembly.paste(before, "before/", {}, "before/")
        wiring |= {value.name: source for value, source in zip(before.graph.output, computed, strict=True)}
    x = "noise"
    noise = ValueInfoProto()
    noise.CopyFrom(step.graph.input[0])
    noise.name = x
    assembly.inputs.setdefault(x, noise)
    for number, constants in enumerate(steps):
        if constants.c:
            raise ValueError("stochastic steps need a noise input per step, which no stage has")
        prefix = f"step{number}/"
        t = assembly.constant(f"{prefix}t", np.array([constants.t], dtype=np.float32))
        (velocity,) = assembly.paste(step, prefix, {**wiring, "x": x, "t": t}, "")
        scaled = assembly.add(
            "Mul", [velocity, assembly.constant(f"{prefix}b", np.array([constants.b], dtype=np.float32))], f"{prefix}bv"
        )
        kept = assembly.add(
            "Mul", [x, assembly.constant(f"{prefix}a", np.array([constants.a], dtype=np.float32))], f"{prefix}ax"
        )
        x = assembly.add("Add", [kept, scaled], f"{prefix}x")
    if after is not None:
        (x,) = assembly.paste(after, "after/", {after.graph.input[0].name: x}, "after/")
    return assembly.build(x, (after or step).graph.output[0], output, name)


def with_weights(model: ModelProto, weights: Mapping[str, np.ndarray]) -> ModelProto:
    """A copy of a traced graph with another checkpoint's weights.

    Raises:
        ValueError: the two do not have the same floating-point weights.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    replaced = set()
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            value = weights[tensor.name]
            if list(tensor.dims) != list(value.shape):
                raise ValueError(f"weight {tensor.name} has shape {value.shape}, the graph has {list(tensor.dims)}")
            tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
            replaced.add(tensor.name)
    left = set(weights) - replaced
    if left:
        raise ValueError(f"the traced graph lacks {len(left)} weights, for example {min(left)}")
    return copy
