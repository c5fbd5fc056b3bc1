"""Rewriting traced graphs: in half precision, for CPUs that lack it, and with sums whose order nothing changes.

A graph is traced in fp32 once and lowered here, so that a component that fails in one precision is exported in the
next without another trace. Inputs and outputs stay fp32, and so does all around the evaluation: the solver adds up
steps in fp32, because what a step adds may be smaller than half precision's spacing at ``x``; and stage 1's outline
space computes positions in fp32, because 256 pixels in steps of a hundredth need more than fp16's eleven bits.

Sums over inner axes become matrix products, because ONNX Runtime's own depend on the number of threads: its CPU
provider sums ``(B, C, N)`` over ``C`` in one order where ``B`` is at least the number of compute threads (and at least
two), and in another order where it is not. Outputs then move by 1e-6 from machine to machine, which tips a grey level
now and then. A product with a row of ones is summed in one order, whatever the batch and the threads, and takes as
long: it is what the first of the two orders does inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper

from busigen.export.weights import as_type

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}  # ONNX's name of each half precision.

HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Computed in half precision: nearly all the arithmetic, summed in fp32 by the hardware that has half precision."""

LIGHT = frozenset(
    {
        *("Add", "AveragePool", "Clip", "Concat", "Expand", "Flatten", "Gather", "Gelu", "Identity", "MaxPool", "Mul"),
        *("Neg", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Sub", "Transpose"),
        *("Tanh", "Unsqueeze", "Where"),
    }
)
"""Computed in the precision of what they read: moving, adding and gating values costs memory traffic alone."""

NORMS = frozenset({"GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization", "Softmax"})
"""Computed in fp32, and handed on in the precision that they were handed. A norm's sum of squares over 20,000 values
passes fp16's 65,504 at a deviation of 1.8, and softmax's sum over 1,024 terms loses the small ones in eleven bits.

All other operators (powers, roots, quotients, sums: the parts of norms that were taken apart) are computed in fp32,
and so is what depends on time and class alone: sines of angles up to 1,000 need more bits than half precision has, and
they are constants, or next to nothing, anyway."""

_OPSETS = {"fp16": 0, "bf16": 22}
"""The opset from which on convolutions and pools may be in each. No operator that is traced changed otherwise."""

_FIXED_INPUTS = {"Resize": (1, 2)}  # Inputs that an operator reads in fp32 whatever the others are.

_BATCHLESS = ("t", "label")


def _types(model: ModelProto) -> dict[str, TypeProto.Tensor]:
    """Every value's type, as far as it can be told."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {value.name: value.type.tensor_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}


class _Lowering:
    """One pass over a graph; every value is there in fp32, in half precision, or in both."""

    def __init__(self, model: ModelProto, precision: str) -> None:
        self._kind, self._suffix = TYPES[precision], f"as-{precision}"
        self._floats = {name for name, kind in _types(model).items() if kind.elem_type == TensorProto.FLOAT}
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._floats |= {name for name, tensor in self._weights.items() if tensor.data_type == TensorProto.FLOAT}
        self._constant = {*self._weights, *_BATCHLESS}
        self._outputs = {value.name for value in model.graph.output}
        self._full = self._floats & {*self._weights, *(value.name for value in model.graph.input)}
        self._half: dict[str, str] = {}
        self._low: set[str] = set()
        self.nodes: list[NodeProto] = []
        self.halved: dict[str, TensorProto] = {}

    def add(self, node: NodeProto) -> None:
        """Take over a node in the precision that suits it."""
        read = [name for name in node.input if name]
        fixed = set(self._constant).issuperset(read)
        if fixed:
            self._constant.update(node.output)
        written = [name for name in node.output if name in self._floats]
        flowing = [name for name in read if name in self._floats and name not in self._constant]
        low = bool(flowing) and self._low.issuperset(flowing)
        half = bool(written) and not fixed and (node.op_type in HEAVY or (node.op_type in LIGHT and low))
        twin = deepcopy(node)
        exempt = _FIXED_INPUTS.get(node.op_type, ())
        twin.input[:] = [
            (self._halved(name) if half and place not in exempt else self._whole(name))
            if name in self._floats
            else name
            for place, name in enumerate(node.input)
        ]
        if half:
            twin.output[:] = [f"{name}/{self._suffix}" if name in self._floats else name for name in node.output]
            self._half.update({name: f"{name}/{self._suffix}" for name in written})
        else:
            self._full.update(written)
        if half or (node.op_type in NORMS and low):
            self._low.update(written)
        self.nodes.append(twin)
        for name in self._outputs.intersection(written):
            self._whole(name)

    def _halved(self, name: str) -> str:
        if name not in self._half:
            self._half[name] = f"{name}/{self._suffix}"
            if name in self._weights:
                # What does not fit becomes infinite, and the comparison with the checkpoint finds it.
                self.halved[name] = as_type(self._weights[name], self._half[name], self._kind)
            else:
                self.nodes.append(helper.make_node("Cast", [name], [self._half[name]], to=self._kind))
        return self._half[name]

    def _whole(self, name: str) -> str:
        if name not in self._full:
            self._full.add(name)
            self.nodes.append(helper.make_node("Cast", [self._half[name]], [name], to=TensorProto.FLOAT))
        return name


def lowered(model: ModelProto, precision: str) -> ModelProto:
    """A traced graph, fp32 and without nested ones, in a precision of ``TYPES``, its inputs and outputs in fp32.

    A weight ``w`` that is read in half precision is called ``w/as-<precision>``.
    """
    lowering = _Lowering(model, precision)
    for node in model.graph.node:
        lowering.add(node)
    result = deepcopy(model)
    del result.graph.node[:], result.graph.initializer[:], result.graph.value_info[:]
    result.graph.node.extend(lowering.nodes)
    read = {name for node in lowering.nodes for name in node.input}
    whole = [tensor for tensor in model.graph.initializer if tensor.name in read]
    result.graph.initializer.extend([*whole, *lowering.halved.values()])
    for opset in result.opset_import:
        if not opset.domain:
            opset.version = max(opset.version, _OPSETS[precision])
    return result


def emulated(model: ModelProto) -> ModelProto:
    """A lowered graph for processors without half precision, which rounds where it would be rounded.

    ONNX Runtime's CPU provider has no kernels for bf16, and runs graphs in fp16 with fp32 between most nodes, where
    nothing overflows. Here every node that is computed in half precision reads values that were rounded to it, is
    computed in fp32, and is rounded again: what hardware does that multiplies halves and adds in fp32.
    """
    kinds = {name: kind.elem_type for name, kind in _types(model).items()}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    halves = set(TYPES.values())
    result = deepcopy(model)
    del result.graph.node[:], result.graph.value_info[:]
    read: set[str] = set()
    for node in model.graph.node:
        written = [name for name in node.output if kinds.get(name) in halves]
        if node.op_type == "Cast" or not written:
            result.graph.node.append(node)
            continue
        twin = deepcopy(node)
        for place, name in enumerate(node.input):
            if kinds.get(name) in halves:
                twin.input[place] = f"{name}/read"
                if name not in read:
                    read.add(name)
                    result.graph.node.append(helper.make_node("Cast", [name], [f"{name}/read"], to=TensorProto.FLOAT))
        twin.output[:] = [f"{name}/unrounded" if name in written else name for name in node.output]
        result.graph.node.append(twin)
        result.graph.node.extend(
            helper.make_node("Cast", [f"{name}/unrounded"], [name], to=kinds[name]) for name in written
        )
    return result


_WEIGHT = {"ReduceSum": lambda length: 1.0, "ReduceMean": lambda length: 1.0 / length}
"""What each value is multiplied by, for an axis of a length."""

Sizes = list[int | None]


@dataclass(frozen=True)
class _Sum:
    """A sum over ``axes`` of ``source``; ``undone`` is a permutation of the node's own input that is to be undone."""

    source: str
    sizes: Sizes
    axes: list[int]
    undone: list[int] | None = None


def make_sums_deterministic(model: ModelProto) -> ModelProto:
    """A copy of a graph whose sums and means over inner axes are matrix products.

    Sums over the last axes stay as they are, because ONNX Runtime has one order for them, and so do sums of two values,
    which have one order at all. But where the last axis was transposed there from within, as in a norm of channels,
    ONNX Runtime takes the transposition away and sums over the inner axis: such a sum is an inner one, too. Nodes
    within loops are not looked at: what goes into a loop is rewritten before. The opset is 18 or later.

    A ValueError says that a sum over inner axes has a size that is not fixed, or leaves axes between its own.
    """
    types = _types(_with_loops_shaped(model))
    makers = {name: node for node in model.graph.node for name in node.output}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    known |= {name: node.attribute[0].t for name, node in makers.items() if node.op_type == "Constant"}
    result = deepcopy(model)
    del result.graph.node[:]
    axes_read = set()
    for node in model.graph.node:
        added = [node]
        if node.op_type in _WEIGHT and len(node.input) > 1 and node.input[1] in known:
            kind = types[node.input[0]]
            if not kind.HasField("shape"):
                raise ValueError(f"the number of axes of {node.input[0]} is not known")
            sizes = [size.dim_value if size.HasField("dim_value") else None for size in kind.shape.dim]
            axes = sorted(int(axis) % len(sizes) for axis in numpy_helper.to_array(known[node.input[1]]))
            found = _before_transposition(_Sum(node.input[0], sizes, axes), makers)
            if kind.elem_type == TensorProto.FLOAT and _order_varies(found):
                added, constants = _as_product(node, sizes, axes, found)
                result.graph.initializer.extend(constants)
                axes_read.add(node.input[1])
        result.graph.node.extend(added)
    # Axes that were read by what is gone: ONNX Runtime would warn of them.
    unread = axes_read - _read(result.graph)
    initializers = [tensor for tensor in result.graph.initializer if tensor.name not in unread]
    nodes = [node for node in result.graph.node if not unread.intersection(node.output)]
    del result.graph.initializer[:], result.graph.node[:]
    result.graph.initializer.extend(initializers)
    result.graph.node.extend(nodes)
    return result


def _with_loops_shaped(model: ModelProto) -> ModelProto:
    """A copy that says of the solver's result that it is shaped like its start, which shape inference does not see."""
    result = deepcopy(model)
    inputs = {value.name: value.type for value in result.graph.input}
    for node in result.graph.node:
        if node.op_type == "Loop":
            for name, start in zip(node.output, node.input[2:], strict=False):
                if start in inputs:
                    result.graph.value_info.add(name=name, type=inputs[start])
    return result


def _read(graph: GraphProto) -> set[str]:
    """Every name that a node of the graph, or of a loop in it, reads."""
    read = {name for node in graph.node for name in node.input}
    inner = (attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g"))
    return read.union(*map(_read, inner))


def _before_transposition(found: _Sum, makers: Mapping[str, NodeProto]) -> _Sum:
    """The same sum over the axes as they were before what is summed was transposed and perhaps squared."""
    maker = makers.get(found.source)
    if maker is not None and maker.op_type in ("Pow", "Mul"):
        maker = makers.get(maker.input[0])
    if maker is None or maker.op_type != "Transpose":
        return found
    order = list(maker.attribute[0].ints)
    rest = [order[axis] for axis in range(len(order)) if axis not in found.axes]
    if rest != sorted(rest):
        # Another order of the axes that are left cannot be had by a change of shape alone.
        return found
    undone = [order.index(axis) for axis in range(len(order))]
    return _Sum(found.source, [found.sizes[axis] for axis in undone], sorted(order[a] for a in found.axes), undone)


def _order_varies(found: _Sum) -> bool:
    axes, sizes = found.axes, found.sizes
    inner = bool(axes) and axes[0] > 0 and axes[-1] + 1 < len(sizes)
    return inner and not (len(axes) == 1 and sizes[axes[0]] in (1, 2))


def _as_product(
    node: NodeProto, sizes: Sizes, axes: Sequence[int], found: _Sum
) -> tuple[list[NodeProto], list[TensorProto]]:
    first, last = found.axes[0], found.axes[-1] + 1
    fixed = [size for size in found.sizes[first:] if size is not None]
    if len(fixed) < len(found.sizes) - first or found.axes != list(range(first, last)):
        raise ValueError(
            f"{node.output[0]} is over axes {found.axes} of {found.sizes}: only neighbouring axes of fixed size can be"
        )
    keep = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
    length, rest = math.prod(fixed[: last - first]), fixed[last - first :]
    # 0 stands for the size that the axis had: leading axes, the batch among them, are left as they are.
    final = [0 if a < first else 1 if a in axes else sizes[a] for a in range(len(sizes)) if keep or a not in axes]
    name, weight = node.output[0], _WEIGHT[node.op_type](length)
    constants = [numpy_helper.from_array(np.full((1, length), weight, dtype=np.float32), f"{name}/row")]
    nodes, source = [], found.source
    if found.undone is not None:
        nodes.append(helper.make_node("Transpose", [source], [f"{name}/undone"], perm=found.undone))
        source = f"{name}/undone"

    def shaped(source: str, shape: Sequence[int | None], output: str) -> str:
        constants.append(numpy_helper.from_array(np.array(shape, dtype=np.int64), f"{output}/shape"))
        nodes.append(helper.make_node("Reshape", [source, f"{output}/shape"], [output]))
        return output

    leading = [0] * first
    if last - first > 1 or len(rest) > 1:
        source = shaped(source, [*leading, length, math.prod(rest)], f"{name}/flat")
    as_is = final == [*leading, 1, math.prod(rest)]
    nodes.append(helper.make_node("MatMul", [f"{name}/row", source], [name if as_is else f"{name}/product"]))
    if not as_is:
        shaped(f"{name}/product", final, name)
    return nodes, constants
