"""Which files an ONNX graph reads its weights from, without loading it: hashes vouch for recorded files alone.

A graph names its weights' files itself, anywhere in its nested graphs. ONNX Runtime opens what is named, so a graph
that names a file which nobody hashed would run weights that nobody proved. The graph is walked here as the plain
protobuf message that it is: the runtime has no onnx package.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

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
        path: an ONNX graph small enough to be read into memory.

    Raises:
        ValueError: the file is no protobuf message, or a name in it is no text.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
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
        path: an ONNX graph small enough to be read into memory.

    Raises:
        ValueError: the file is no protobuf message, or a name in it is no text.
        OSError: the file cannot be read.
    """
    data = path.read_bytes()
    level = [(0, len(data))]
    # Model, graph, node, operator, by the fields' numbers in onnx.proto.
    for field in (7, 1, 4):
        found = [message for start, end in level for message in _messages(data, start, end)]
        level = [(start, end) for number, start, end in found if number == field]
    return {data[start:end].decode() for start, end in level}


def _messages(data: bytes, at: int, end: int) -> list[tuple[int, int, int]]:
    """Number, first and last byte of all fields of a message that have a length."""
    found = []
    while at < end:
        # Nearly every tag and size is one byte, and a call for each would take most of the time.
        tag, at = (data[at], at + 1) if data[at] < 128 else read_varint(data, at, end)
        wire = tag & 7
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
