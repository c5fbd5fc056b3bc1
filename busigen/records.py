"""Reads JSON from untrusted sources, within bounds, and validates it with pydantic models.

Every such file or text is read by `read_json` or `parse_json` and validated by `checked`. Models name what is used: a
record may hold more, and is kept as it was read.
"""

from __future__ import annotations

import json
import math
import reprlib
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field, Strict, TypeAdapter, ValidationError

from busigen.errors import InputError, IntegrityError
from busigen.foreign import ForeignFileError, read_file
from busigen.text import printable

MAX_BYTES = 64 << 20  # Largest file that is read. A shard's record takes some 100 bytes for each refused draw.
MAX_NODES = 1 << 21  # Most values in a file, counted by commas and brackets. Python takes up to 200 bytes for each.
BYTES_PER_SHARD, NODES_PER_SHARD = 1 << 10, 1 << 5  # Of ``dataset.json``, beyond that; it needs a third.
MAX_KEYS = 1 << 16  # Of one object: pydantic lists all that is wrong with one before the first is said.
MAX_DEPTH = 100  # Levels of nesting; real files have less than ten.

Text = Annotated[str, Strict(), Field(max_length=1 << 12)]
Whole = Annotated[int, Strict(), Field(ge=0, le=(1 << 63) - 1)]
Number = Annotated[float, Strict(), Field(allow_inf_nan=False)]


def _plain(name: str) -> str:
    if Path(name).name != name or "\\" in name or name.startswith("."):
        raise ValueError("is not a plain name")
    return name


# The name of a file in the record's folder.
FileName = Annotated[str, Strict(), Field(max_length=255), AfterValidator(_plain)]
_T = TypeVar("_T")

Many = Annotated[list[_T], FailFast()]  # A list of any length, refused at its first invalid item.


class Record(BaseModel):
    """What is used of a JSON object; other keys are ignored."""

    model_config = ConfigDict(extra="ignore", frozen=True)


def read_json(path: Path, *, shards: int = 0, root: Path | None = None, nan: bool = False) -> Any:
    """The content of a JSON file.

    ``shards`` is the number of shards that are there, each of which may take room in the file; ``root`` and ``nan`` are
    those of `busigen.foreign.open_file` and `parse_json`. An OSError says that the file is missing or cannot be read, a
    ValueError that it is no regular file, too large, or not what `parse_json` reads.
    """
    try:
        content = read_file(path, MAX_BYTES + BYTES_PER_SHARD * shards, root=root)
    except ForeignFileError as error:
        raise ValueError(f"{error.filename} {error.strerror}") from error
    return parse_json(content, path, nodes=MAX_NODES + NODES_PER_SHARD * shards, nan=nan)


def read_checked(model: type[Any], path: Path, *, fix: str, root: Path | None = None, nan: bool = False) -> Any:
    """The content of a JSON file that a model validates; arguments are those of `read_json` and `checked`.

    An OSError says that the file is missing or cannot be read, an IntegrityError that it is invalid.
    """
    try:
        found = read_json(path, root=root, nan=nan)
    except ValueError as error:
        raise IntegrityError(f"{error}.", fix=fix) from error
    checked(model, found, path, fix=fix)
    return found


def read_given(
    path: Path, what: str, *, schemas: tuple[int, ...], fix: str, limit: int = MAX_BYTES
) -> tuple[dict[str, Any], bytes]:
    """The record in a folder that a user named, which should be a ``what``, and its bytes, at most ``limit``.

    An InputError says that there is none, it cannot be read, or its ``schema`` is none of ``schemas``.
    """
    try:
        content = read_file(path, limit, root=path.parent)
        record = parse_json(content, "it", nan=True)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path.parent} is no {what}: it has no {path.name}.", fix=fix) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{path} cannot be read: {reason}.", fix=fix) from error
    schema = record.get("schema") if isinstance(record, dict) else None
    if type(schema) is not int or schema not in schemas:
        found, readable = printable(reprlib.repr(schema)), " or ".join(map(str, schemas))
        raise InputError(f"{path} has schema {found}; this busigen reads {readable}.", fix=fix)
    return record, content


def parse_json(content: bytes, name: object, *, nodes: int = MAX_NODES, nan: bool = False) -> Any:
    """The value of a JSON text.

    ``name`` is what errors call it, ``nodes`` the most values in it, and ``nan`` whether numbers may be NaN or
    infinite, as after a training that diverged. A ValueError says that it is no JSON, has too many values or keys, is
    nested too deeply, or holds text that is no Unicode.
    """
    # Counted in the text, because values take fifty times the room of their brackets.
    if sum(map(content.count, (b"[", b"{", b","))) > nodes:
        raise ValueError(f"{name} has more than {nodes} values")
    hooks: dict[str, Any] = {} if nan else {"parse_constant": _finite, "parse_float": _finite}
    try:
        text = content.decode(json.detect_encoding(content))
        value = json.loads(text, **hooks)
        if "\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # Half of a pair of surrogates could not be written again.
    except RecursionError as error:
        raise ValueError(f"{name} is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    # Some Pythons read more levels than they can compare.
    level: list[Any] = [[value]]
    for _ in range(MAX_DEPTH):
        level = [part for whole in level for part in _parts(whole)]
        if any(len(part) > MAX_KEYS for part in level if isinstance(part, dict)):
            raise ValueError(f"{name} has an object of more than {MAX_KEYS} keys")
        if not level:
            return value
    raise ValueError(f"{name} is nested too deeply")


def checked(model: type[_T], value: Any, place: object, *, fix: str) -> _T:
    """A JSON value as a `Record` or dataclass; an IntegrityError names the first invalid key and its value."""
    try:
        valid: _T = _adapter(model).validate_python(value)  # type: ignore[arg-type]  # mypy: a type is not hashable
    except ValidationError as error:
        # Not with its cause, which holds the whole value.
        raise IntegrityError(f"{place} {_fault(error)}.", fix=fix) from None
    return valid


@cache
def _adapter(model: Any) -> TypeAdapter[Any]:
    return TypeAdapter(model)


def _fault(error: ValidationError) -> str:
    """The first thing that is wrong, in one short line."""
    first = error.errors(include_url=False, include_context=False)[0]
    key = printable(".".join(str(part) for part in first["loc"] if part != "[key]"))[:200]
    if first["type"] == "missing":
        return f"lacks '{key}'"
    why = first["msg"].removeprefix("Value error, ").removeprefix("Input ")
    value = printable(reprlib.repr(first["input"]))[:80]
    return f"has no valid '{key}': {value} {why}" if key else f"is no record: {value} {why}"


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is no number")
    return value


def _parts(value: Any) -> list[Any]:
    """The lists and objects that lie directly in one of them."""
    return [part for part in (value.values() if isinstance(value, dict) else value) if isinstance(part, (dict, list))]
