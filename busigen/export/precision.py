"""Graphs of one evaluation in half precision: which nodes are computed in it, and the same graph for any CPU.

A graph is traced in fp32 once and lowered here, so that a component that fails in one precision is exported in the
next without another trace. Inputs and outputs stay fp32, and so does all around the evaluation: the solver adds up
steps in fp32, because what a step adds may be smaller than half precision's spacing at ``x``; and stage 1's outline
space computes positions in fp32, because 256 pixels in steps of a hundredth need more than fp16's eleven bits.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

TYPES = {
    "fp16": (TensorProto.FLOAT16, np.dtype(np.float16)),
    "bf16": (TensorProto.BFLOAT16, np.dtype(ml_dtypes.bfloat16)),
}
"""ONNX's and NumPy's name of each half precision."""

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

_FIXED_INPUTS = {"Resize": (1, 2)}
"""Inputs that an operator reads in fp32 whatever the others are."""

_BATCHLESS = ("t", "label")


class _Lowering:
    """One pass over a graph; every value is there in fp32, in half precision, or in both."""

    def __init__(self, model: ModelProto, precision: str) -> None:
        self._kind, self._numpy = TYPES[precision]
        self._suffix = f"as-{precision}"
        inferred = onnx.shape_inference.infer_shapes(model).graph
        values = (*inferred.input, *inferred.value_info, *inferred.output)
        self._floats = {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._floats |= {name for name, tensor in self._weights.items() if tensor.data_type == TensorProto.FLOAT}
        self._constant = {*self._weights, *_BATCHLESS}
        self._outputs = {value.name for value in model.graph.output}
        self._full = {name: name for name in self._floats & (set(self._weights) | _inputs(model))}
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
        twin = NodeProto()
        twin.CopyFrom(node)
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
            self._full.update({name: name for name in written})
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
                with np.errstate(over="ignore"):
                    value = numpy_helper.to_array(self._weights[name]).astype(self._numpy)
                self.halved[name] = numpy_helper.from_array(value, self._half[name])
            else:
                self.nodes.append(helper.make_node("Cast", [self._full[name]], [self._half[name]], to=self._kind))
        return self._half[name]

    def _whole(self, name: str) -> str:
        if name not in self._full:
            self._full[name] = name
            self.nodes.append(helper.make_node("Cast", [self._half[name]], [name], to=TensorProto.FLOAT))
        return self._full[name]


def lowered(model: ModelProto, precision: str) -> ModelProto:
    """A traced graph in half precision, its inputs and outputs in fp32.

    Args:
        model: fp32, without nested graphs.
        precision: a name in ``TYPES``.

    Returns:
        The graph; a weight ``w`` that is read in half precision is called ``w/as-<precision>``.
    """
    lowering = _Lowering(model, precision)
    for node in model.graph.node:
        lowering.add(node)
    result = ModelProto()
    result.CopyFrom(model)
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
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.value_info, *inferred.output)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    kinds |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    halves = {kind for kind, _ in TYPES.values()}
    result = ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:], result.graph.value_info[:]
    read: set[str] = set()
    for node in model.graph.node:
        written = [name for name in node.output if kinds.get(name) in halves]
        if node.op_type == "Cast" or not written:
            result.graph.node.append(node)
            continue
        twin = NodeProto()
        twin.CopyFrom(node)
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


def _inputs(model: ModelProto) -> set[str]:
    return {value.name for value in model.graph.input}
