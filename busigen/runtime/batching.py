"""Cutting and sorting draws into the groups that an engine call takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

T = TypeVar("T")
K = TypeVar("K")


def batches(items: Sequence[T], size: int) -> Iterable[Sequence[T]]:
    """Consecutive pieces of at most ``size`` items."""
    return (items[start : start + size] for start in range(0, len(items), size))


def grouped(items: Sequence[T], key: Callable[[T], K]) -> list[tuple[K, list[T]]]:
    """Items that share a key, in the order in which keys and items first come."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.items())
