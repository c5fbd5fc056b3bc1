"""Names, versions and limits of the dataset folder: the one place where they are written down."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from busigen.errors import UsageError

SCHEMA_VERSION = 1
"""Version of the folder's layout and of its JSON files. Raised when an older reader would misread a newer folder."""

RUN_FILE = "run.json"
DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
PREVIEW_FILE = "preview.png"
CARD_FILE = "README.md"
CROISSANT_FILE = "croissant.json"
LOCK_FILE = ".lock"
SHARD_FOLDER = "shards"

FINISHED_FILES = (RUN_FILE, DATASET_FILE, MANIFEST_FILE, PREVIEW_FILE, CARD_FILE, CROISSANT_FILE)
"""Top-level files of a finished dataset."""

IMAGE_SUFFIX = "image.png"
MASK_SUFFIX = "mask.png"
ROW_SUFFIX = "json"
MEMBER_SUFFIXES = (IMAGE_SUFFIX, MASK_SUFFIX, ROW_SUFFIX)
"""What follows ``<key>.`` in a shard's tar, in the order in which a sample's members are stored."""

MEMBER_LIMIT = 1 << 20
"""Largest tar member in bytes that a reader accepts; an honest one holds less than a tenth of this."""

TEMPORARY_PREFIX = ".tmp-"
"""Start of the names of files that are still being written. No finished dataset holds one."""

DEFAULT_SHARD_SIZE = 100
"""Samples per shard. A shard is what an interruption loses, so on a CPU it has to be minutes of work and not hours."""

MAX_COUNT = 10**9
"""Keys have nine digits; beyond them their order as text would no longer be the order of the indices."""

MAX_SEED = 2**64 - 1


def key_of(index: int) -> str:
    """WebDataset key of a sample: its index in nine digits."""
    return f"{index:09d}"


def shard_path(number: int, suffix: str) -> str:
    """Path of one of a shard's files relative to the dataset, with forward slashes; ``suffix`` has no dot."""
    return f"{SHARD_FOLDER}/{number:06d}.{suffix}"


@dataclass(frozen=True)
class Plan:
    """Which samples a run makes and how they are cut into shards."""

    count: int
    seed: int
    shard_size: int

    def __post_init__(self) -> None:
        """Refuse values that no dataset can have.

        Raises:
            UsageError: a value is out of range.
        """
        _require("--count", self.count, 1, MAX_COUNT)
        _require("--seed", self.seed, 0, MAX_SEED)
        _require("--shard-size", self.shard_size, 1, MAX_COUNT)

    @property
    def shards(self) -> int:
        """Number of shards; the last one may be short."""
        return -(-self.count // self.shard_size)

    def indices(self, number: int) -> range:
        """Sample indices of one shard."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.count))

    def config(self) -> dict[str, Any]:
        """The plan as JSON, for ``run.json``."""
        return {"count": self.count, "seed": self.seed, "shard_size": self.shard_size}


def _require(option: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise UsageError(f"{option} is {value}.", fix=f"Give a whole number from {low} to {high}.")
