"""Sums over inner axes as matrix products, because ONNX Runtime's own depend on the number of threads.

Its CPU provider sums ``(B, C, N)`` over ``C`` in one order where ``B`` is at least the number of compute threads (and
at least two), and in another order where it is not. Outputs then move by 1e-6 from machine to machine, which tips a
grey level now and then. A product with a row of ones is summed in one order, whatever the batch and the threads, and
takes as long: it is what the first of the two orders does inside.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

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
    within loops are not looked at: what goes into a loop is rewritten before.

    Args:
        model: opset 18 or later; all but the leading axes of what is summed have fixed sizes.

    Raises:
        ValueError: a sum over inner axes has a size that is not fixed, or leaves axes between those that it is over.
    """
    inferred = onnx.shape_inference.infer_shapes(_with_loops_shaped(model), data_prop=True).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    types = {value.name: value.type.tensor_type for value in values}
    makers = {name: node for node in model.graph.node for name in node.output}
    known = {tensor.name: tensor for tensor in model.graph.initializer}
    known |= {name: node.attribute[0].t for name, node in makers.items() if node.op_type == "Constant"}
    result = ModelProto()
    result.CopyFrom(model)
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
    read = _read(result.graph)
    unread = axes_read - read
    initializers = [tensor for tensor in result.graph.initializer if tensor.name not in unread]
    nodes = [node for node in result.graph.node if not unread.intersection(node.output)]
    del result.graph.initializer[:], result.graph.node[:]
    result.graph.initializer.extend(initializers)
    result.graph.node.extend(nodes)
    return result


def _with_loops_shaped(model: ModelProto) -> ModelProto:
    """A copy that says of the solver's result that it is shaped like its start, which shape inference does not see."""
    result = ModelProto()
    result.CopyFrom(model)
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
