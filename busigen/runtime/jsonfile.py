"""Reading JSON files that may have come from anywhere: no pipe is waited for, and no file fills the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from busigen.foreign import ForeignFileError, read_file

MAX_BYTES = 64 << 20
"""Largest file that is read. A shard's record takes some 100 bytes for each refused draw, and so holds half a million;
such a shard would not fit into memory."""

BYTES_PER_SHARD = 1 << 10
"""Room that ``dataset.json`` has for each shard beyond that; it needs a third."""

MAX_DEPTH = 100
"""Levels of nesting that are read; honest files have less than ten."""


def read_json(path: Path, *, shards: int = 0) -> Any:
    """What a JSON file holds.

    Args:
        path: the file.
        shards: number of shards that really are there, each of which may take its room in the file.

    Raises:
        OSError: the file is missing or cannot be read.
        ValueError: it is no regular file, too large, no JSON, or nested too deeply.
    """
    try:
        content = read_file(path, MAX_BYTES + BYTES_PER_SHARD * shards)
    except ForeignFileError as error:
        raise ValueError(f"{path} {error.strerror}") from error
    return parse_json(content, path)


def parse_json(content: bytes, name: object) -> Any:
    """What JSON stands for that was read already.

    Args:
        content: the JSON.
        name: what to call it.

    Raises:
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    # Some Pythons read more levels than they can compare.
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
        if not level:
            return value
    raise ValueError(f"{name} is nested too deeply")


def _parts(value: Any) -> list[Any]:
    """The lists and objects that lie directly in a value."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [part for part in inside if isinstance(part, (dict, list))]
