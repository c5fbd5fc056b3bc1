"""Which shards of a plan are complete already: by their records and sizes, or by their hashes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from busigen.errors import IntegrityError
from busigen.files import sha256_of
from busigen.runtime.dataset.format import Plan
from busigen.runtime.dataset.reader import recorded_shards
from busigen.runtime.dataset.shards import ShardRecord

_HASHERS = min(8, os.cpu_count() or 1)


def complete_shard(folder: Path, plan: Plan, number: int) -> ShardRecord | None:
    """A shard's record if its three files are there with their recorded sizes, else None: it must be made (again).

    Without its refused draws, as it is meant to be kept.
    """
    try:
        record = ShardRecord.read(folder, number)
        sizes = {file.file: (folder / file.file).stat().st_size for file in (record.tar, record.parquet)}
    except (FileNotFoundError, IntegrityError):
        return None
    return record.counted() if is_complete(record, plan, sizes) else None


def is_complete(record: ShardRecord, plan: Plan, sizes: Mapping[str, int]) -> bool:
    """Whether a record is that of the plan's shard, and its files are there with the recorded sizes.

    Args:
        record: of the shard.
        plan: of the dataset.
        sizes: bytes of the files that are there, by their names.
    """
    indices = plan.indices(record.number)
    fits = (record.first, record.count) == (indices.start, len(indices))
    return fits and all(sizes.get(file.file) == file.size for file in (record.tar, record.parquet))


def complete_shards(folder: Path, plan: Plan) -> dict[int, ShardRecord]:
    """The plan's complete shards by their numbers, in order; their files have the recorded sizes."""
    found = ((number, complete_shard(folder, plan, number)) for number in _recorded(folder, plan))
    return {number: record for number, record in found if record}


def sound_shards(folder: Path, plan: Plan) -> dict[int, ShardRecord]:
    """The plan's shards whose files have their recorded content, by number; a damaged one is to be made again."""

    def sound(number: int) -> ShardRecord | None:
        record = complete_shard(folder, plan, number)
        whole = record and all(sha256_of(folder / file.file) == file.sha256 for file in (record.tar, record.parquet))
        return record if whole else None

    numbers = _recorded(folder, plan)
    with ThreadPoolExecutor(_HASHERS) as pool:
        return {number: record for number, record in zip(numbers, pool.map(sound, numbers), strict=True) if record}


def _recorded(folder: Path, plan: Plan) -> list[int]:
    """Numbers of the shards that have a record. Looking is cheaper than asking for each of ten million in turn."""
    return [number for number in recorded_shards(folder) if number in plan.numbers]
