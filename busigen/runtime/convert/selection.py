"""Which pairs are converted: conditions on the manifest's columns, and splits and folds that part no group."""

from __future__ import annotations

import hashlib
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.errors import UsageError
from busigen.registry import SAMPLE_CLASSES

FOLDS = 5  # What nnU-Net and MONAI's Auto3DSeg make by default.

Columns = Mapping[str, str]  # The type of each column of the manifest: "str", "int", "float" or "bool".

_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "=": operator.eq,
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"""\s*(\w+)\s*(==|!=|<=|>=|=|<|>)\s*("[^"]*"|'[^']*'|[^\s"'<>=!]+)\s*""")
_AND = re.compile(r"and\b\s*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,31}")
_GRAMMAR = "Write conditions such as 'area_share>0.02 and class=malignant'; 'background!=none' asks for any value."


def parse_where(text: str, columns: Columns) -> pl.Expr:
    """The condition that a text states: comparisons of a column with a value, joined by ``and``; or a UsageError.

    A row whose column holds nothing fulfils none, but for ``column=none``. The case of text is ignored.
    """
    found: list[pl.Expr] = []
    at = 0
    while True:
        if (match := _CONDITION.match(text, at)) is None:
            raise UsageError(f"--where is {text!r}, which is unclear from {text[at:]!r} on.", fix=_GRAMMAR)
        found.append(_comparison(match, columns))
        if match.end() == len(text):
            return pl.all_horizontal(found)
        if (joint := _AND.match(text, match.end())) is None:
            raise UsageError(f"--where is {text!r}, which is unclear from {text[match.end() :]!r} on.", fix=_GRAMMAR)
        at = joint.end()


def _comparison(match: re.Match[str], columns: Columns) -> pl.Expr:
    column, sign, word = match.groups()
    if column not in columns:
        fix = f"The manifest has: {', '.join(columns)}."
        raise UsageError(f"--where names {column!r}, which is no column of the manifest.", fix=fix)
    kind, quoted = columns[column], word[0] in "\"'"
    equality = sign in ("=", "==", "!=")
    if word == "none" and equality:
        return pl.col(column).is_not_null() if sign == "!=" else pl.col(column).is_null()
    value = _value(word.strip("\"'"), kind if not quoted or kind == "str" else "")
    if value is None or not (equality or kind in ("int", "float")):
        kinds = {"str": "text, and is compared with = and !=", "bool": "true or false, and is compared with = and !="}
        fix = f"{column} holds {kinds.get(kind, f'numbers, and {word} is no number')}."
        raise UsageError(f"--where compares {column} with {sign}{word}.", fix=fix)
    held = pl.col(column).str.to_lowercase() if kind == "str" else pl.col(column)
    result: pl.Expr = _OPERATORS[sign](held, pl.lit(value))
    return result


def _value(word: str, kind: str) -> str | float | bool | None:
    """The word as a value of a column's type; None where it is none."""
    if kind == "str":
        return word.lower()
    if kind == "bool":
        return {"true": True, "false": False}.get(word.lower())
    try:
        number = float(word) if kind else math.nan
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_class_names(text: str) -> tuple[str, ...]:
    """Class names with commas between, in the registry's order; a UsageError for others."""
    names = {part.strip().lower() for part in text.split(",")}
    if wrong := sorted(names - set(SAMPLE_CLASSES)):
        raise UsageError(f"--classes names {wrong[0]!r}.", fix=f"Choose among: {', '.join(SAMPLE_CLASSES)}.")
    return tuple(name for name in SAMPLE_CLASSES if name in names)


def parse_split(text: str, allowed: Sequence[str] = ()) -> dict[str, float]:
    """Shares by name, such as ``train=0.8,val=0.2``, which sum to 1; a UsageError for others."""
    shares: dict[str, float] = {}
    fix = "Give names with shares that sum to 1, such as train=0.8,val=0.1,test=0.1."
    for part in text.split(","):
        name, _, share = (piece.strip() for piece in part.partition("="))
        if not _NAME.fullmatch(name) or name in shares or (allowed and name not in allowed):
            only = f" This format has: {', '.join(allowed)}." if allowed else ""
            problem = f"twice {name!r}" if name in shares else f"{name!r}"
            raise UsageError(f"--split names {problem}.", fix=f"{fix}{only}")
        try:
            shares[name] = float(share)
        except ValueError:
            shares[name] = math.nan
        if not 0 < shares[name] <= 1:
            raise UsageError(f"--split gives {name!r} the share {share!r}.", fix=fix)
    if abs(sum(shares.values()) - 1) > 1e-3:  # A third cannot be typed exactly.
        raise UsageError(f"--split is {text!r}, whose shares sum to {sum(shares.values()):g}.", fix=fix)
    return shares


def group_numbers(names: Iterable[str]) -> NDArray[np.uint64]:
    """A number for each group's name, the same in every run, whose order says nothing about the names'."""
    digests = (hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names)
    return np.frombuffer(b"".join(digests), dtype=">u8").astype(np.uint64)


def split_groups(groups: NDArray[np.uint64], shares: Sequence[float]) -> NDArray[np.int64]:
    """The part, 0 to ``len(shares) - 1``, that each row is in: all rows of a group in one, rows by their shares."""
    _, inverse, counts = np.unique(groups, return_inverse=True, return_counts=True)
    middles = np.cumsum(counts) - counts / 2
    ends = np.cumsum(shares) / sum(shares) * len(groups)
    parts = np.minimum(np.searchsorted(ends, middles, side="right"), len(shares) - 1)
    return np.asarray(parts[inverse], dtype=np.int64)


def fold_groups(groups: NDArray[np.uint64], among: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The fold, from 0, that each row is in: all rows of a group in one; `FOLDS` of them, or one a group if fewer.

    Rows that are not ``among`` those to share out get fold 0.
    """
    unique, inverse = np.unique(groups[among], return_inverse=True)
    folds = np.zeros(len(groups), dtype=np.int64)
    folds[among] = (np.arange(len(unique)) % FOLDS)[inverse]
    return folds
