"""What an ONNX graph from anywhere would do if it were loaded: which files it would read, and whether it would end.

A graph names its weights' files itself, anywhere in its nested graphs. ONNX Runtime opens what is named, so a graph
that names a file which nobody hashed would run weights that nobody proved. And a loop takes as many turns as the graph
says, where no signal reaches. The graph is walked here as the plain protobuf message that it is: the runtime has no
onnx package.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from busigen.foreign import read_file

MAX_GRAPH_BYTES = 8 << 20
"""Largest graph that is read. Its weights lie in files beside it; what is left is some 200 KB."""

# Fields, by number, through which a tensor can be reached from each message of ONNX's schema (onnx.proto).
_FIELDS: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "external": {1: "key", 2: "value"},
}
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def external_files(path: Path) -> set[str]:
    """Every file name that a graph's tensors are said to lie in.

    Args:
        path: an ONNX graph.

    Raises:
        ValueError: the file is no protobuf message, or a name in it is no text.
        OSError: the file cannot be read, or is larger than ``MAX_GRAPH_BYTES``.
    """
    data = read_file(path, MAX_GRAPH_BYTES)
    found: set[bytes] = set()
    # A stack of its own, because graphs may be nested deeper than Python's.
    stack = [("model", 0, len(data))]
    while stack:
        kind, start, end = stack.pop()
        inner = _FIELDS[kind]
        fields = [
            (inner[number], first, last) for number, first, last in _messages(data, start, end) if number in inner
        ]
        if kind != "external":
            stack += fields
        # Where a field is given twice, readers differ in which one counts.
        elif any(name == "key" and data[first:last] == b"location" for name, first, last in fields):
            found.update(data[first:last] for name, first, last in fields if name == "value")
    return {name.decode() for name in found}


def operators(path: Path) -> set[str]:
    """The operators of a graph's own nodes; what loops and branches hold inside is not looked at.

    Args:
        path: an ONNX graph.

    Raises:
        ValueError: the file is no protobuf message, or a name in it is no text.
        OSError: the file cannot be read, or is larger than ``MAX_GRAPH_BYTES``.
    """
    data = read_file(path, MAX_GRAPH_BYTES)
    level = [(0, len(data))]
    # Model, graph, node, operator, by the fields' numbers in onnx.proto.
    for field in (7, 1, 4):
        found = [message for start, end in level for message in _messages(data, start, end)]
        level = [(start, end) for number, start, end in found if number == field]
    return {data[start:end].decode() for start, end in level}


def refuse_endless(path: Path, most: int) -> None:
    """Refuse a graph that may compute for longer than its nodes and a bounded number of turns account for.

    What export writes has one ``Loop`` at most, whose number of turns is a constant and whose body holds no further
    graph. All else that repeats nodes is refused: other operators that hold graphs, loops in loops, and functions,
    of which each may call the one before it twice.

    Args:
        path: an ONNX graph.
        most: turns that a loop may take.

    Raises:
        ValueError: it is refused, or no protobuf message.
        OSError: the file cannot be read, or is larger than ``MAX_GRAPH_BYTES``.
    """
    data = read_file(path, MAX_GRAPH_BYTES)
    # ONNX Runtime tells its own format by these letters, and would read another graph than the one walked here.
    if data[4:8] == b"ORTM":
        raise ValueError("it is in ONNX Runtime's own format")
    model = _messages(data, 0, len(data))
    if any(number == 25 for number, _, _ in model):
        raise ValueError("it defines functions, which may call one another without end")
    # A graph that is given in several pieces is the sum of them.
    graph = [field for piece in _of(model, 7) for field in _messages(data, *piece)]
    turns: set[bytes] = set()
    # Names that get their value while the graph runs.
    computed = {data[a:b] for value in _of(graph, 11) for a, b in _of(_messages(data, *value), 1)}
    for node in _of(graph, 1):
        fields = _messages(data, *node)
        inputs, outputs, kinds, domains = ([data[a:b] for a, b in _of(fields, number)] for number in (1, 2, 4, 7))
        computed.update(outputs)
        if bodies := _graphs(data, fields):
            if kinds != [b"Loop"] or any(domains):
                raise ValueError(f"its operator {b''.join(kinds).decode(errors='replace')!r} repeats other nodes")
            if any(_graphs(data, _messages(data, *inner)) for body in bodies for inner in _of(body, 1)):
                raise ValueError("one of its loops holds another graph")
            turns.add(inputs[0] if inputs else b"")
    tensors = [_messages(data, *tensor) for tensor in _of(graph, 5)]
    sparse = [_messages(data, *values) for tensor in _of(graph, 15) for values in _of(_messages(data, *tensor), 1)]
    for name in turns:
        # All that anybody could take for this one, where one may be given twice, or with two names.
        found = [tensor for tensor in tensors + sparse if name in (data[a:b] for a, b in _of(tensor, 8))]
        if not name or name in computed or len(found) != 1 or (count := _number(data, found[0])) is None:
            raise ValueError("one of its loops has no fixed number of turns")
        if count > most:
            raise ValueError(f"one of its loops takes {count} turns; at most {most} are run")


def _of(fields: list[tuple[int, int, int]], wanted: int) -> list[tuple[int, int]]:
    return [(first, last) for number, first, last in fields if number == wanted]


def _graphs(data: bytes, node: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """The graphs that a node holds as attributes, as their fields."""
    attributes = [field for attribute in _of(node, 5) for field in _messages(data, *attribute)]
    return [_messages(data, *graph) for graph in _of(attributes, 6) + _of(attributes, 11)]


def _number(data: bytes, tensor: list[tuple[int, int, int]]) -> int | None:
    """The value of a tensor of one integer that is stored as eight bytes; None for any other tensor."""
    raw = [data[first:last] for first, last in _of(tensor, 9)]
    # But for dimensions and a comment, one name and the bytes are all that it has.
    others = [number for number, _, _ in tensor if number not in (1, 9, 12)]
    if len(raw) != 1 or len(raw[0]) != 8 or others != [8]:
        return None
    return int.from_bytes(raw[0], "little", signed=True)


def _messages(data: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """Number, first and last byte of all fields of a message that have a length."""
    found = []
    while at < end:
        # Nearly every tag and size is one byte, and a call for each would take most of the time.
        tag, at = (data[at], at + 1) if data[at] < 128 else read_varint(data, at, end)
        wire = tag & 7
        if tag >> 32:  # Some readers would drop the bits beyond, and see another field.
            raise ValueError("it is no protobuf message")
        if wire == _BYTES:
            size, at = (data[at], at + 1) if at < end and data[at] < 128 else read_varint(data, at, end)
            found.append((tag >> 3, at, at + size))
            at += size
        elif wire == _VARINT:
            _, at = read_varint(data, at, end)
        elif wire in (_FIXED64, _FIXED32):
            at += 8 if wire == _FIXED64 else 4
        else:
            raise ValueError("it is no protobuf message")
        if at > end:
            raise ValueError("it is cut short")
    return found


def read_varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    """A number, and where what follows it begins."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError("it is cut short")


@contextmanager
def openable(graph: Path, files: Iterable[str]) -> Iterator[Path]:
    """A graph's path as ONNX and ONNX Runtime open it, for as long as the block runs.

    Both refuse weights of which the file system has a second name, and installers that link packages from a cache (uv,
    conda) leave them so. Then the graph's files are copied for the block. Weights handed over in memory are no way out:
    ONNX Runtime 1.31 looks for those of a loop's body on the disk all the same.

    Args:
        graph: the graph's file.
        files: names of the files that it needs, itself among them, all in its folder.

    Raises:
        OSError: there is no room for a copy, or a file cannot be read.
    """
    if all((graph.parent / name).stat().st_nlink == 1 for name in files):
        yield graph
        return
    # On Windows, what a session has mapped into its memory cannot be removed before that ends.
    with tempfile.TemporaryDirectory(prefix="busigen-", ignore_cleanup_errors=True) as folder:
        for name in files:
            shutil.copyfile(graph.parent / name, Path(folder) / name)
        yield Path(folder) / graph.name
