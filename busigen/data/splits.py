"""Which split an image belongs to: decided by group, from a hash, so that adding images moves none."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from busigen.data.files import natural_key
from busigen.registry import SPLITS

EXCLUDED = "excluded"
"""Split of an image that would link two splits; it takes part in nothing."""

_PROTECTED = ("test", "val", "train")
"""Whose images stay when two splits turn out to be linked: what a model is judged on must not change under it."""

Regroup = Callable[[NDArray[np.int64]], NDArray[np.int64]]
"""Given the indices of some images, their group numbers when the others do not exist."""


def draw_split(seed: int, key: str) -> str:
    """The split of a group that has none yet.

    Args:
        seed: The run's seed.
        key: The group's name: it must not change when images are added.

    Returns:
        A key of ``registry.SPLITS``, with the probability that stands there.
    """
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64 * sum(SPLITS.values())
    for name, share in SPLITS.items():
        position -= share
        if position < 0:
            return name
    return next(reversed(SPLITS))


def assign_splits(
    ids: Sequence[str],
    patients: Sequence[str | None],
    earlier: Sequence[str | None],
    regroup: Regroup,
    *,
    seed: int,
) -> tuple[list[str], NDArray[np.int64]]:
    """Give every image a split such that no group spans two.

    Images keep the split they had; a new one joins that of its group, or draws one if the group is new. A new image
    that links two splits is excluded. Where images that already have splits turn out to be linked (a patient's name
    was added, say), those of the test split stay and the others are excluded.

    Args:
        ids: N image ids.
        patients: N patient names or None.
        earlier: N splits of an earlier run, None for new images.
        regroup: Groups any subset of the images.
        seed: The run's seed.

    Returns:
        N split names and N group numbers; an excluded image is a group of its own.
    """
    count = len(ids)
    splits: list[str | None] = list(earlier)
    groups = regroup(np.arange(count))
    _exclude_bridges(splits, groups)
    groups = _regroup_rest(splits, regroup, groups)
    _exclude_unprotected(splits, groups)
    groups = _regroup_rest(splits, regroup, groups)
    return _fill(ids, patients, splits, groups, seed), groups


def _exclude_bridges(splits: list[str | None], groups: NDArray[np.int64]) -> None:
    for members in _members(groups):
        if len(_splits_of(members, splits)) > 1:
            for index in members:
                splits[index] = splits[index] or EXCLUDED


def _exclude_unprotected(splits: list[str | None], groups: NDArray[np.int64]) -> None:
    for members in _members(groups):
        present = _splits_of(members, splits)
        if len(present) > 1:
            kept = min(present, key=_PROTECTED.index)
            for index in members:
                if splits[index] != kept:
                    splits[index] = EXCLUDED


def _regroup_rest(splits: Sequence[str | None], regroup: Regroup, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups without the links that run through excluded images."""
    excluded = np.array([split == EXCLUDED for split in splits], dtype=np.bool_)
    if not excluded.any():
        return groups
    numbers = np.empty(len(splits), dtype=np.int64)
    rest = regroup(np.flatnonzero(~excluded))
    numbers[~excluded] = rest
    numbers[excluded] = np.arange(excluded.sum()) + (int(rest.max()) + 1 if rest.size else 0)
    return numbers


def _fill(
    ids: Sequence[str],
    patients: Sequence[str | None],
    splits: Sequence[str | None],
    groups: NDArray[np.int64],
    seed: int,
) -> list[str]:
    filled = list(splits)
    for members in _members(groups):
        present = {split for index in members if (split := filled[index]) is not None}
        split = present.pop() if present else draw_split(seed, _group_key(members, ids, patients))
        for index in members:
            filled[index] = split
    return [split for split in filled if split is not None]


def _group_key(members: Sequence[int], ids: Sequence[str], patients: Sequence[str | None]) -> str:
    named = sorted({patient for index in members if (patient := patients[index]) is not None}, key=natural_key)
    return named[0] if named else min((ids[index] for index in members), key=natural_key)


def _members(groups: NDArray[np.int64]) -> list[list[int]]:
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups.tolist()):
        members[group].append(index)
    return list(members.values())


def _splits_of(members: Sequence[int], splits: Sequence[str | None]) -> set[str]:
    return {split for index in members if (split := splits[index]) is not None and split != EXCLUDED}
