"""Loops as TensorRT's ONNX parser takes them.

ONNX lets a ``Loop`` go without a condition and still hands its body one, which the body must hand back. TensorRT's
parser (tensorrt-rtx 1.7.1) then leaves the body's condition unregistered and fails at the node that hands it back. Here
that node reads a constant instead. The graph is rewritten as the protobuf message that it is: the runtime has no onnx
package, and the shipped graphs stay the bytes that were proved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from busigen.runtime.backends.bundle import read_varint

# Field numbers in ONNX's schema (onnx.proto).
_MODEL_GRAPH = 7
_GRAPH_NODE, _GRAPH_INITIALIZER, _GRAPH_INPUT = 1, 5, 11
_NODE_INPUT, _NODE_KIND, _NODE_ATTRIBUTE = 1, 4, 5
_ATTRIBUTE_GRAPH = 6
_VALUE_NAME = 1
_TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW = 2, 8, 9

_BOOL = 9
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_ALWAYS = b"busigen/always"


def with_conditions(model: bytes) -> bytes:
    """The same graph with nothing that reads the condition of a loop which has none.

    Args:
        model: a serialised ONNX model.

    Raises:
        ValueError: it is no protobuf message.
    """
    return _mapped(model, _MODEL_GRAPH, _graph)


def _graph(graph: bytes) -> bytes:
    changed = _mapped(graph, _GRAPH_NODE, _node)
    if changed == graph:
        return graph
    always = bytes([_TENSOR_TYPE << 3 | _VARINT, _BOOL]) + _field(_TENSOR_NAME, _ALWAYS) + _field(_TENSOR_RAW, b"\1")
    return changed + _field(_GRAPH_INITIALIZER, always)


def _node(node: bytes) -> bytes:
    inputs = _values(node, _NODE_INPUT)
    if _values(node, _NODE_KIND) != [b"Loop"] or (len(inputs) > 1 and inputs[1]):
        return node
    return _mapped(node, _NODE_ATTRIBUTE, lambda attribute: _mapped(attribute, _ATTRIBUTE_GRAPH, _body))


def _body(body: bytes) -> bytes:
    _, condition, *_ = _values(body, _GRAPH_INPUT)
    (name,) = _values(condition, _VALUE_NAME)
    return _mapped(
        body,
        _GRAPH_NODE,
        lambda node: _mapped(node, _NODE_INPUT, lambda read: _ALWAYS if read == name else read),
    )


def _values(message: bytes, number: int) -> list[bytes]:
    return [message[first:end] for found, wire, _, first, end in _fields(message) if (found, wire) == (number, _BYTES)]


def _mapped(message: bytes, number: int, change: Callable[[bytes], bytes]) -> bytes:
    """The message with each value of one field changed, and every other byte as it was."""
    parts = []
    for found, wire, start, first, end in _fields(message):
        whole = message[start:end]
        if (found, wire) == (number, _BYTES):
            value = message[first:end]
            new = change(value)
            whole = whole if new == value else _field(number, new)
        parts.append(whole)
    return b"".join(parts)


def _field(number: int, value: bytes) -> bytes:
    return bytes([number << 3 | _BYTES]) + _varint(len(value)) + value


def _fields(message: bytes) -> Iterator[tuple[int, int, int, int, int]]:
    """Number, wire type, first byte, first byte of the value and end of each field."""
    at = 0
    while at < len(message):
        start = at
        tag, at = read_varint(message, at, len(message))
        wire, size = tag & 7, 0
        if wire == _BYTES:
            size, at = read_varint(message, at, len(message))
        first = at
        if wire == _VARINT:
            _, at = read_varint(message, at, len(message))
        elif wire in (_BYTES, _FIXED64, _FIXED32):
            at += {_BYTES: size, _FIXED64: 8, _FIXED32: 4}[wire]
        else:
            raise ValueError("it is no protobuf message")
        if at > len(message):
            raise ValueError("it is cut short")
        yield tag >> 3, wire, start, first, at


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes((*encoded, value))


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


def _tiny_graphs_varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


def _number(field: int, value: int) -> bytes:
    return _tiny_graphs_varint(field << 3) + _tiny_graphs_varint(value)


def _bytes(field: int, content: bytes) -> bytes:
    return _tiny_graphs_varint(field << 3 | 2) + _tiny_graphs_varint(len(content)) + content


def _text(field: int, content: str) -> bytes:
    return _bytes(field, content.encode())
