"""Putting graphs together: the few-step sampling loop around one traced network evaluation.

Tracing a UNet takes many seconds, so it is traced once. The loop is either ONNX's own ``Loop`` or written out step by
step (``registry.LOOPS`` says what speaks for each).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from busigen.solver import SolverStep

Tables = Sequence[Sequence[SolverStep]]
"""The steps of a solver, or those of each adapter."""


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

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add one node and return its output's name."""
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, **attributes))
        return output

    def paste(
        self,
        model: ModelProto,
        prefix: str,
        wiring: Mapping[str, str],
        shared: str,
        nodes: Sequence[NodeProto] | None = None,
    ) -> dict[str, str]:
        """Copy a model's nodes in, all or the given ones, and return what its names are called here.

        ``prefix`` comes before every name that the copy computes, ``shared`` before those of its initialisers, which
        further copies share. ``wiring`` says what is read in place of some names; other inputs become inputs here.
        """
        graph = model.graph
        names = dict(wiring)
        for tensor in graph.initializer:
            names[tensor.name] = shared + tensor.name
            if names[tensor.name] not in self.constants:
                copy = self.constants[names[tensor.name]] = deepcopy(tensor)
                copy.name = names[tensor.name]
        for value in graph.input:
            if value.name not in names:
                self.inputs[value.name] = value
                names[value.name] = value.name
        for node in graph.node if nodes is None else nodes:
            twin = deepcopy(node)
            # Names of nodes say nothing that their outputs' do not, and two copies must not share one.
            twin.ClearField("name")
            if any(attribute.HasField("g") for attribute in node.attribute):
                raise ValueError(f"node {node.name} has a subgraph, whose names would not be copied right")
            twin.input[:] = [names[name] if name else "" for name in node.input]
            for name in node.output:
                names[name] = prefix + name
            twin.output[:] = [names[name] if name else "" for name in node.output]
            self.nodes.append(twin)
        return names

    def mixed(self, noise: ValueInfoProto, time: float) -> str:
        """Add the point of the straight path from ``noise`` to an input ``start`` at a time, and return its name."""
        start = self.inputs["start"] = deepcopy(noise)
        start.name = "start"
        shares = {"noise": time, "start": 1.0 - time}
        parts = [
            self.add("Mul", [name, self.constant(f"mixed/{name}_share", np.array(share, np.float32))], f"mixed/{name}")
            for name, share in shares.items()
        ]
        return self.add("Add", parts, "mixed/first")

    def loop(
        self, step: ModelProto, steps: Tables, wiring: Mapping[str, str], update: ModelProto, first: str = "noise"
    ) -> str:
        """Add the solver's loop from the sample ``first`` as one node and return the name of its result.

        The loop's body is one evaluation and ``update``, with the times of its turn taken from tables. What is alike in
        every turn is computed before it. Weights that only the body reads are the body's own: ONNX Runtime's CPU
        provider brings those of convolutions into its faster layout, but none from outside.
        """
        longest = max(map(len, steps))
        tables = {
            name: self.constant(
                f"solver/{name}",
                np.array(
                    [[[getattr(s, name)] for s in (*t, *[t[-1]] * (longest - len(t)))] for t in steps], np.float32
                ),
            )
            for name in TIMES
        }
        turns, always, count = self.constant("solver/turns", np.array(longest, dtype=np.int64)), "", ""
        if len({tuple(table) for table in steps}) == 1:
            for table in tables.values():
                self.constants[table] = numpy_helper.from_array(numpy_helper.to_array(self.constants[table])[0], table)
        else:
            # All rows of a batch have one adapter, whose steps these are.
            axis = self.constant("solver/batch", np.array([0], dtype=np.int64))
            self.add("ReduceMax", ["adapter", axis], "solver/adapter", keepdims=0)
            which = self.add("ArgMax", ["solver/adapter"], "solver/which", keepdims=0)
            tables = {name: self.add("Gather", [table, which], f"{table}_table") for name, table in tables.items()}
            counts = self.constant("solver/counts", np.array([len(table) for table in steps], dtype=np.int64))
            count = self.add("Gather", [counts, which], "solver/count")
            always = self.constant("solver/always", np.array(True))
        names, varying = self._invariant(step, wiring)
        outside, self.nodes = self.nodes, []
        turn, go_on, x = "solver/turn", "solver/go_on", "solver/x"
        now = {name: self.add("Gather", [table, turn], f"solver/{name}_now") for name, table in tables.items()}
        now |= self._fresh(update, longest, turn)
        names = self.paste(step, "step/", {**names, "x": x, "t": now["t"]}, "", varying)
        following = self.followed(x, names[step.graph.output[0].name], {**wiring, **now}, "solver/", update)
        if count:
            done = self.add("Add", [turn, self.constant("solver/one", np.array(1, dtype=np.int64))], "solver/done")
            going = self.add("Less", [done, count], "solver/going")
        else:
            going = self.add("Identity", [go_on], "solver/going")
        like = step.graph.input[0].type.tensor_type
        shape = [d.dim_value or None for d in like.shape.dim]
        read = {name for node in self.nodes for name in node.input}
        own = [name for name in read & set(self.constants) if not any(name in node.input for node in outside)]
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
            [self.constants.pop(name) for name in sorted(own)],
        )
        self.nodes = outside
        self.nodes.append(helper.make_node("Loop", [turns, always, first], ["solver/result"], name="solver", body=body))
        return "solver/result"

    def _fresh(self, update: ModelProto, steps: int, turn: str) -> dict[str, str]:
        """This turn's fresh noise, of the graph's input for all, by its name in ``update``; nothing if none is read."""
        value = next((value for value in update.graph.input if value.name == "fresh"), None)
        if value is None:
            return {}
        _, *shape = (size.dim_value for size in value.type.tensor_type.shape.dim)
        self.inputs["fresh"] = helper.make_tensor_value_info("fresh", TensorProto.FLOAT, ["batch", steps, *shape])
        return {"fresh": self.add("Gather", ["fresh", turn], f"{turn}/fresh", axis=1)}

    def unrolled(
        self, step: ModelProto, steps: Tables, wiring: Mapping[str, str], update: ModelProto, first: str = "noise"
    ) -> str:
        """Add the solver's steps from the sample ``first`` one after the other and return the name of the result.

        Weights, and all that is alike in every step, are there once. Times are constants, so that an engine that folds
        constants, as all do, is left without the embedding of time.
        """
        names, varying = self._invariant(step, wiring)
        x = first
        for number, constants in enumerate(steps[0]):
            here = f"solver/{number}/"
            now = {
                name: self.constant(here + name, np.array([getattr(constants, name)], dtype=np.float32))
                for name in TIMES
            }
            turn = self.constant(f"{here}turn", np.array(number, dtype=np.int64))
            now |= self._fresh(update, len(steps[0]), turn)
            found = self.paste(step, f"step{number}/", {**names, "x": x, "t": now["t"]}, "", varying)
            x = self.followed(x, found[step.graph.output[0].name], {**wiring, **now}, here, update)
        return x

    def followed(self, x: str, velocity: str, now: Mapping[str, str], prefix: str, update: ModelProto) -> str:
        """Add one solver step from a sample and its velocity; ``now`` names the step's times and the conditions."""
        wiring = {**now, "x": x, "velocity": velocity}
        return self.paste(update, f"{prefix}update/", wiring, "update/")[update.graph.output[0].name]

    def _invariant(self, step: ModelProto, wiring: Mapping[str, str]) -> tuple[dict[str, str], list[NodeProto]]:
        """Paste what depends on neither sample nor time, such as the keys and values of the context's tokens.

        Returns its names here, and the nodes that are left to every step.
        """
        moving, varying, invariant = {"x", "t"}, [], []
        for node in _without_expansion(step):
            if moving.intersection(node.input):
                moving.update(node.output)
                varying.append(node)
            else:
                invariant.append(node)
        names = self.paste(step, "every/", {**wiring, "x": "", "t": ""}, "", invariant)
        return names, varying

    def build(self, output: str, like: ValueInfoProto, final_name: str, name: str) -> ModelProto:
        """Finish with one output, computed as ``output``, typed ``like`` and known outside as ``final_name``."""
        self.add("Identity", [output], final_name)
        final = deepcopy(like)
        final.name = final_name
        constants = list(self.constants.values())
        graph = helper.make_graph(self.nodes, name, list(self.inputs.values()), [final], constants)
        return helper.make_model(graph, opset_imports=self._opset, ir_version=self._ir_version)


TIMES = ("t", "s")  # What a solver step reads of its :class:`SolverStep`.


def with_solver(
    step: ModelProto,
    steps: Tables,
    label: int | None,
    *,
    loop: str,
    name: str,
    output: str,
    update: ModelProto,
    before: ModelProto | None = None,
    after: ModelProto | None = None,
    start: float | None = None,
) -> ModelProto:
    """Build the whole sampler of one stage, a graph of that name with one ``output``.

    ``step`` is traced ``(x, t, label, tokens, keep, *condition)`` to velocity; ``t`` and ``label`` have shape (1,). In
    place of a label, which is a class index, it may read ``adapter``, ``(B, A)``; then ``label`` is None, and ``steps``
    has a table for each. ``update`` is traced ``(x, velocity, t, s)``, and condition channels if need be, to the
    following ``x``, ``before`` to some of ``step``'s inputs, by their names, and ``after`` from sample to output. At
    the time ``start``, that of the first step, an input of that name is mixed with the noise; None for noise alone.
    """
    assembly = Assembly(step.opset_import, step.ir_version)
    wiring = {}
    if label is not None:
        wiring["label"] = assembly.constant("class_label", np.array([label], dtype=np.int64))
    if before is not None:
        computed = assembly.paste(before, "before/", {}, "before/")
        wiring |= {value.name: computed[value.name] for value in before.graph.output}
    noise = deepcopy(step.graph.input[0])
    noise.name = "noise"
    assembly.inputs.setdefault("noise", noise)
    first = "noise" if start is None else assembly.mixed(noise, start)
    x = (assembly.loop if loop == "loop" else assembly.unrolled)(step, steps, wiring, update, first)
    if after is not None:
        x = assembly.paste(after, "after/", {after.graph.input[0].name: x}, "after/")[after.graph.output[0].name]
    return assembly.build(x, (after or step).graph.output[0], output, name)


def _without_expansion(step: ModelProto) -> list[NodeProto]:
    """An evaluation's nodes, without those that repeat for the whole batch what depends on time and class alone.

    It is added to features, and an addition repeats it itself. Repeated before, the embedding of time is computed for
    every image of a batch, and is no constant where the time is one.
    """
    timed, constant = {"t", "label"}, {tensor.name for tensor in step.graph.initializer}
    instead: dict[str, str] = {}
    nodes = []
    for node in step.graph.node:
        copied = deepcopy(node)
        copied.input[:] = [instead.get(name, name) for name in node.input]
        read = {name for name in copied.input if name}
        if node.op_type == "Expand" and copied.input[0] in timed:
            instead[node.output[0]] = copied.input[0]
            continue
        if read <= timed | constant:
            (timed if read & timed else constant).update(node.output)
        nodes.append(copied)
    return nodes


def with_weights(model: ModelProto, weights: Mapping[str, TensorProto]) -> ModelProto:
    """A copy of a traced graph with another network's weights; a ValueError if the two do not have the same ones."""
    copy = deepcopy(model)
    left = dict(weights)
    for tensor in copy.graph.initializer:
        if (other := left.pop(tensor.name, None)) is not None:
            if tensor.dims != other.dims:
                raise ValueError(f"weight {tensor.name} has shape {other.dims}, the graph has {tensor.dims}")
            tensor.CopyFrom(other)
    if left:
        raise ValueError(f"the traced graph lacks {len(left)} weights, for example {min(left)}")
    return copy
