"""Target shapes as constants: what PyTorch traces for any batch, said with the one size that is left open.

A tracer that keeps the batch open computes every reshape's target from the shapes of what flows there: a third of a
UNet's nodes. All of it depends on the batch alone, and a reshape with one open size needs no computation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx import ModelProto
from onnxscript import ir, optimizer

_BATCHES = (2, 3)
"""Two batches: sizes that differ between them grow with the batch."""

Shapes = dict[str, list[int]]


def folded(graph: ir.Model, weights: set[str]) -> None:
    """Fold what is constant but for the weights, which keep their names: those are how others' are put in and read."""
    optimizer.fold_constants(graph, onnx_shape_inference=True, should_fold=_leaves_alone(weights))
    optimizer.remove_unused_nodes(graph)


def with_constant_shapes(model: ModelProto, weights: set[str]) -> ModelProto:
    """A copy whose reshapes have constant targets, wherever only one size grows with the batch.

    Args:
        model: its inputs have their batch axis open and nothing else.
        weights: initialisers that are left as they are.
    """
    first, second = (_shapes_at(model, batch, weights) for batch in _BATCHES)
    graph = ir.from_proto(model)
    for node in graph.graph:
        name = node.outputs[0].name or ""
        if node.op_type != "Reshape" or node.domain or name not in first or name not in second:
            continue
        grows = [one != other for one, other in zip(first[name], second[name], strict=True)]
        if sum(grows) > 1:
            continue
        sizes = [-1 if open_ else size for open_, size in zip(grows, first[name], strict=True)]
        target = ir.Value(name=f"{name}/shape", const_value=ir.tensor(np.array(sizes), name=f"{name}/shape"))
        graph.graph.register_initializer(target)
        node.replace_input_with(1, target)
    optimizer.remove_unused_nodes(graph)
    return ir.to_proto(graph)


def _shapes_at(model: ModelProto, batch: int, weights: set[str]) -> Shapes:
    """What every reshape of the graph yields at one batch, as far as it can be told."""
    fixed = ModelProto()
    fixed.CopyFrom(model)
    del fixed.graph.value_info[:]
    for value in fixed.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if not size.HasField("dim_value"):
                size.dim_value = batch
    graph = ir.from_proto(fixed)
    folded(graph, weights)
    found: Shapes = {}
    for node in graph.graph:
        shape = node.outputs[0].shape
        if node.op_type == "Reshape" and shape is not None and all(isinstance(size, int) for size in shape):
            found[node.outputs[0].name or ""] = [int(size) for size in shape if isinstance(size, int)]
    return found


def _leaves_alone(weights: set[str]) -> Callable[[ir.Node], bool | None]:
    def decide(node: ir.Node) -> bool | None:
        return False if any(value is not None and value.name in weights for value in node.inputs) else None

    return decide
