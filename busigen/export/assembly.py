"""Putting graphs together: the few-step sampling loop around one traced network evaluation.

Tracing a UNet takes half a minute, so it is traced once. The loop is ONNX's own ``Loop``: with the steps unrolled, ONNX
Runtime 1.31 took 5 to 10 s of CPU time to open each graph of the shipped size (about 10,000 nodes), which nobody who
wants sixteen pictures should wait for.
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
                raise ValueError(f"node {node.name} has a subgraph, whose names would not be copied right")
            twin.input[:] = [names[name] if name else "" for name in node.input]
            for name in node.output:
                names[name] = prefix + name
            twin.output[:] = [names[name] if name else "" for name in node.output]
            self.nodes.append(twin)
        return [names[value.name] for value in graph.output]

    def loop(
        self,
        step: ModelProto,
        steps: Sequence[SolverStep],
        wiring: Mapping[str, str],
        start: str,
        update: ModelProto | None = None,
    ) -> str:
        """Add the solver's loop and return the name of its result.

        The loop's body is one evaluation and ``a x + b net(x, t)``, or ``update``, with the constants of its turn taken
        from tables; weights, tokens and condition are read from the graph around it.
        """
        tables = {
            name: self.constant(f"solver/{name}", np.array([[getattr(s, name)] for s in steps], dtype=np.float32))
            for name in (("t", "a", "b") if update is None else ("t", "s"))
        }
        turns = self.constant("solver/turns", np.array(len(steps), dtype=np.int64))
        outside, self.nodes = self.nodes, []
        turn, go_on, x = "solver/turn", "solver/go_on", "solver/x"
        now = {name: self.add("Gather", [table, turn], f"solver/{name}_now") for name, table in tables.items()}
        (velocity,) = self.paste(step, "step/", {**wiring, "x": x, "t": now["t"]}, "")
        if update is None:
            moved = self.add("Mul", [velocity, now["b"]], "solver/moved")
            kept = self.add("Mul", [x, now["a"]], "solver/kept")
            following = self.add("Add", [kept, moved], "solver/following")
        else:
            (following,) = self.paste(update, "update/", {"x": x, "velocity": velocity, **now}, "update/")
        going = self.add("Identity", [go_on], "solver/going")
        like = step.graph.input[0].type.tensor_type
        shape = [d.dim_value or None for d in like.shape.dim]
        body = helper.make_graph(
            self.nodes,
            "solver",
            [
                helper.make_tensor_value_info(turn, TensorProto.INT64, []),
                helper.make_tensor_value_info(go_on, TensorProto.BOOL, []),
                helper.make_tensor_value_info(x, TensorProto.FLOAT, shape),
            ],
            [
                helper.make_tensor_value_info(going, TensorProto.BOOL, []),
                helper.make_tensor_value_info(following, TensorProto.FLOAT, shape),
            ],
        )
        self.nodes = outside
        self.nodes.append(helper.make_node("Loop", [turns, "", start], ["solver/result"], name="solver", body=body))
        return "solver/result"

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


def with_solver(
    step: ModelProto,
    steps: Sequence[SolverStep],
    label: int,
    *,
    name: str,
    output: str,
    before: ModelProto | None = None,
    after: ModelProto | None = None,
    update: ModelProto | None = None,
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
        update: traced ``(x, velocity, t, s)`` to the following ``x``, instead of the steps' ``a x + b velocity``.
    """
    if any(constants.c for constants in steps):
        raise ValueError("stochastic steps need a noise input per step, which no stage has")
    assembly = Assembly(step.opset_import, step.ir_version)
    wiring = {"label": assembly.constant("class_label", np.array([label], dtype=np.int64))}
    if before is not None:
        computed = assembly.paste(before, "before/", {}, "before/")
        wiring |= {value.name: source for value, source in zip(before.graph.output, computed, strict=True)}
    noise = ValueInfoProto()
    noise.CopyFrom(step.graph.input[0])
    noise.name = "noise"
    assembly.inputs.setdefault("noise", noise)
    x = assembly.loop(step, steps, wiring, "noise", update)
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
