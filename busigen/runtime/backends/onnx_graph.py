"""ONNX graphs as protobuf messages: checks of graphs from anywhere, and small graphs that are written.

A graph names its weights' files and its loops' turns itself: weights that nobody hashed could run, or a loop without
end. The runtime has no onnx package: protobuf, which ONNX Runtime brings, reads the fields that are named here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from busigen.foreign import read_file

MAX_GRAPH_BYTES = 8 << 20  # of a graph, whose weights lie in files beside it; what is left is some 200 KB

_SCHEMA = {
    "ModelProto": "ir_version:1:int64 graph:7:GraphProto opset_import:8*:OperatorSetIdProto"
    " training_info:20*:TrainingInfoProto functions:25*:FunctionProto",
    "OperatorSetIdProto": "version:2:int64",
    "TrainingInfoProto": "initialization:1:GraphProto algorithm:2:GraphProto",
    "FunctionProto": "node:7*:NodeProto attribute_proto:11*:AttributeProto",
    "GraphProto": "node:1*:NodeProto name:2:string initializer:5*:TensorProto input:11*:ValueInfoProto"
    " output:12*:ValueInfoProto sparse_initializer:15*:SparseTensorProto",
    "NodeProto": "input:1*:string output:2*:string op_type:4:string attribute:5*:AttributeProto domain:7:string",
    "AttributeProto": "t:5:TensorProto g:6:GraphProto tensors:10*:TensorProto graphs:11*:GraphProto"
    " sparse_tensor:22:SparseTensorProto sparse_tensors:23*:SparseTensorProto",
    "SparseTensorProto": "values:1:TensorProto indices:2:TensorProto",
    "TensorProto": "dims:1*:int64 data_type:2:int32 name:8:string raw_data:9:bytes doc_string:12:string"
    " external_data:13*:StringStringEntryProto",
    "StringStringEntryProto": "key:1:string value:2:string",
    "ValueInfoProto": "name:1:string type:2:TypeProto",
    "TypeProto": "tensor_type:1:Tensor",
    "Tensor": "elem_type:1:int32 shape:2:TensorShapeProto",
    "TensorShapeProto": "dim:1*:Dimension",
    "Dimension": "dim_value:1:int64 dim_param:2:string",
}  # the fields of onnx.proto that are used, as ``name:number:type``, by message; ``*`` marks what is repeated

_LARGEST_FIELD = (1 << 29) - 1  # largest number that protobuf gives a field


@cache
def _model_class() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="busigen/onnx.proto", package="busigen.onnx")
    for name, fields in _SCHEMA.items():
        message = file.message_type.add(name=name)
        for field in fields.split():
            label, number, kind = field.split(":")
            added = message.field.add(name=label, number=int(number.rstrip("*")))
            added.label = kinds.LABEL_REPEATED if "*" in number else kinds.LABEL_OPTIONAL
            if kind in _SCHEMA:
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".{file.package}.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.ModelProto"))


def _parsed(content: bytes) -> Any:
    """The serialised model; a ``ValueError`` if it is none."""
    from google.protobuf.message import DecodeError

    try:
        return _model_class().FromString(content)
    except DecodeError as error:
        raise ValueError("it is no protobuf message") from error


def _messages(message: Any) -> Iterator[Any]:
    """A message and all that it holds, at any depth; a ``ValueError`` if a field has a number that none can have."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    # A stack of its own, because graphs may be nested deeper than Python's.
    stack = [iter([message])]
    while stack:
        if (message := next(stack[-1], None)) is None:
            stack.pop()
            continue
        yield message
        # ONNX Runtime drops what a field's number has beyond 32 bits, and would see another field. Protobuf refuses
        # such numbers, except where it is written in Python alone.
        if any(field.field_number > _LARGEST_FIELD for field in UnknownFieldSet(message)):
            raise ValueError("it is no protobuf message")
        for field, value in message.ListFields():
            if field.message_type:
                stack.append(iter(value if isinstance(value, Sequence) else [value]))


class Graph:
    """The graph in an ONNX file from anywhere: ``ValueError`` if it is none, ``OSError`` if unreadable or too large."""

    def __init__(self, path: Path) -> None:
        content = read_file(path, MAX_GRAPH_BYTES)
        # ONNX Runtime tells its own format by these letters, and would read another graph than this one.
        if content[4:8] == b"ORTM":
            raise ValueError("it is in ONNX Runtime's own format")
        self._model = _parsed(content)

    def external_files(self) -> set[str]:
        """Every file name that the graph's tensors are said to lie in; a ``ValueError`` if one is no text."""
        return {
            message.value
            for message in _messages(self._model)
            if message.DESCRIPTOR.name == "StringStringEntryProto" and message.key == "location"
        }

    def operators(self) -> set[str]:
        """The operators of the graph's own nodes; what loops and branches hold inside is not looked at."""
        return {node.op_type for node in self._model.graph.node}

    def refuse_endless(self, most: int) -> None:
        """Raise a ValueError for a graph that may compute for longer than its nodes and ``most`` turns account for.

        What export writes has one ``Loop`` at most, whose number of turns is a constant and whose body holds no further
        graph. All else that repeats nodes is refused: other operators that hold graphs, loops in loops, and functions,
        of which each may call the one before it twice.
        """
        if self._model.functions:
            raise ValueError("it defines functions, which may call one another without end")
        graph = self._model.graph
        # Names that get their value while the graph runs.
        computed = {value.name for value in graph.input}
        turns = set()
        for node in graph.node:
            computed.update(node.output)
            if bodies := _subgraphs(node):
                if node.op_type != "Loop" or node.domain:
                    raise ValueError(f"its operator {node.op_type!r} repeats other nodes")
                if any(_subgraphs(inner) for body in bodies for inner in body.node):
                    raise ValueError("one of its loops holds another graph")
                turns.add(node.input[0] if node.input else "")
        tensors = [*graph.initializer, *(sparse.values for sparse in graph.sparse_initializer)]
        for name in turns:
            # Every tensor of the name: a runtime may take any of them.
            found = [tensor for tensor in tensors if tensor.name == name]
            if not name or name in computed or len(found) != 1 or (count := _whole_number(found[0])) is None:
                raise ValueError("one of its loops has no fixed number of turns")
            if count > most:
                raise ValueError(f"one of its loops takes {count} turns; at most {most} are run")


def _subgraphs(node: Any) -> list[Any]:
    return [graph for one in node.attribute for graph in (*([one.g] if one.HasField("g") else []), *one.graphs)]


def _whole_number(tensor: Any) -> int | None:
    """The value of a tensor of one integer that is stored as eight bytes; None for any other tensor."""
    from google.protobuf.unknown_fields import UnknownFieldSet

    # Numbers that are stored otherwise are fields that the schema above leaves out.
    if len(tensor.raw_data) != 8 or tensor.external_data or len(UnknownFieldSet(tensor)):
        return None
    return int.from_bytes(tensor.raw_data, "little", signed=True)


def with_conditions(model: bytes) -> bytes:
    """The same serialised model with nothing that reads the condition of a loop which has none; or a ValueError.

    ONNX lets a ``Loop`` go without a condition and still hands its body one, which the body must hand back. TensorRT's
    parser (tensorrt-rtx 1.7.1) fails at the node that does so: here that node reads a constant.
    """
    always = "busigen/always"
    parsed = _parsed(model)
    if not (loops := [node for node in parsed.graph.node if node.op_type == "Loop" and not "".join(node.input[1:2])]):
        return model
    for body in (body for loop in loops for body in _subgraphs(loop)):
        condition = [value.name for value in body.input[1:2]]
        for node in body.node:
            node.input[:] = [always if name in condition else name for name in node.input]
    parsed.graph.initializer.add(name=always, data_type=BOOL, raw_data=b"\1")
    return bytes(parsed.SerializeToString())


FLOAT, BOOL = 1, 9  # element types, as TensorProto.DataType numbers them

Value = tuple[int, Sequence[int | str]]  # element type and dimensions: a number, or a name for one that is free


def one_node(operator: str, inputs: Mapping[str, Value], output: Value) -> bytes:
    """A serialised model of one node of ONNX's default domain, without attributes, whose output is named ``y``."""
    model = _model_class()(ir_version=8, opset_import=[{"version": 17}])
    graph = model.graph
    graph.name = operator
    graph.node.add(input=list(inputs), output=["y"], op_type=operator)
    for values, given in ((graph.input, inputs), (graph.output, {"y": output})):
        for name, (kind, dimensions) in given.items():
            shape = [{"dim_value": size} if isinstance(size, int) else {"dim_param": size} for size in dimensions]
            values.add(name=name, type={"tensor_type": {"elem_type": kind, "shape": {"dim": shape}}})
    return bytes(model.SerializeToString())
