"""Networks of one node, as ONNX files in memory: the runtime has no onnx package to write them with.

An ONNX file is a protobuf message (onnx.proto): fields of a number, a wire type and a content, nested.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

FLOAT, BOOL = 1, 9
"""Element types, as TensorProto.DataType numbers them."""

_IR_VERSION, _OPSET = 8, 17

Value = tuple[int, Sequence[int | str]]
"""Element type and dimensions: a number, or a name for one that is free."""


def one_node(operator: str, inputs: Mapping[str, Value], output: Value) -> bytes:
    """A model of one node without attributes, whose output is named ``y``.

    Args:
        operator: of ONNX's default domain, such as ``Conv``.
        inputs: names and types, in the operator's order.
        output: its type.
    """
    names = b"".join(_text(1, name) for name in inputs)
    node = names + _text(2, "y") + _text(4, operator)
    graph = _bytes(1, node) + _text(2, operator)
    graph += b"".join(_bytes(11, _value(name, value)) for name, value in inputs.items())
    graph += _bytes(12, _value("y", output))
    return _number(1, _IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, _OPSET))


def _value(name: str, value: Value) -> bytes:
    kind, dimensions = value
    shape = b"".join(_bytes(1, _number(1, d) if isinstance(d, int) else _text(2, d)) for d in dimensions)
    return _text(1, name) + _bytes(2, _bytes(1, _number(1, kind) + _bytes(2, shape)))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _bytes(field, content.encode())
