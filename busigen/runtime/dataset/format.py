"""What a dataset is: its files' names, versions and limits, samples and their sources, how they are cut into shards."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from busigen.errors import UsageError
from busigen.records import Text, Whole
from busigen.registry import MAX_LESIONS
from busigen.runtime.storage.lock import LOCK_FILE

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST_SCHEMA_VERSION, SCHEMA_VERSION = 1, 2
"""Oldest and newest version of the folder's layout and JSON files that are read. A file records the oldest one that
describes it: 2 stands for datasets that do not begin at index 0 and for those in several parts."""

RUN_FILE = "run.json"
DATASET_FILE = "dataset.json"
MANIFEST_FILE = "manifest.parquet"
PREVIEW_FILE = "preview.png"
CARD_FILE = "README.md"
CROISSANT_FILE = "croissant.json"
SHARD_FOLDER = "shards"
FINISHED_FILES = (RUN_FILE, DATASET_FILE, MANIFEST_FILE, PREVIEW_FILE, CARD_FILE, CROISSANT_FILE)
MEMBER_SUFFIXES = ("image.png", "mask.png", "json")  # after ``<key>.`` in a shard's tar, in their order
TISSUE = "tissue"  # the kind of picture that maps tissues
EXTRA_PICTURES = (*(f"mask_{number}" for number in range(1, MAX_LESIONS + 1)), TISSUE)
"""Kinds of pictures that some datasets have: each is ``<key>.<kind>.png``, in this order before the JSON, where the
dataset's columns hold ``<kind>_sha256``."""
TISSUE_COLUMN = f"{TISSUE}_sha256"
MEMBER_LIMIT = 1 << 20  # bytes of a tar member that a reader accepts; an honest one holds less than a tenth of this

OWN_FILE = re.compile(
    "|".join(map(re.escape, FINISHED_FILES)) + rf"|(?:{SHARD_FOLDER}/)?(?P<number>[0-9]{{6,10}})\.(?:tar|parquet|json)"
)  # a dataset's files, by names or paths: nothing else in its folder is this program's to remove

WRITTEN = re.compile(rf"{OWN_FILE.pattern}|{re.escape(LOCK_FILE)}(?:-marks)?")  # locks included
MAX_COUNT = 10**9  # keys have nine digits; beyond them their order as text would no longer be the order of the indices
MAX_SEED = 2**64 - 1


def extra_pictures(columns: Iterable[str]) -> tuple[str, ...]:
    """The kinds among ``EXTRA_PICTURES`` that samples with these columns have, in order."""
    there = set(columns)
    return tuple(kind for kind in EXTRA_PICTURES if f"{kind}_sha256" in there)


def member_suffixes(extra: Iterable[str]) -> tuple[str, ...]:
    """What stands after ``<key>.`` in a shard's tar, in order, where samples have these extra pictures."""
    *pictures, text = MEMBER_SUFFIXES
    return (*pictures, *(f"{kind}.png" for kind in extra), text)


def picture_columns(columns: Iterable[str]) -> set[str]:
    """The columns of these with hashes of extra pictures."""
    return {f"{kind}_sha256" for kind in extra_pictures(columns)}


def lesion_slots(columns: Iterable[str]) -> int:
    """How many lesions a sample with these columns may have, each with a mask of its own; 0 where it may not."""
    return len(set(extra_pictures(columns)) - {TISSUE})


def key_of(index: int) -> str:
    """WebDataset key of a sample: its index in nine digits."""
    return f"{index:09d}"


def shard_path(number: int, suffix: str) -> str:
    """Path of one of a shard's files relative to the dataset, with forward slashes; ``suffix`` has no dot."""
    return f"{SHARD_FOLDER}/{number:06d}.{suffix}"


def shard_files(number: int) -> set[str]:
    """Paths of a shard's files relative to the dataset."""
    return {shard_path(number, suffix) for suffix in ("tar", "parquet", "json")}


@dataclass(frozen=True)
class Plan:
    """Which samples a dataset, or a task's part of it, holds and how they are cut into shards, or a UsageError.

    Shards are numbered from index 0 whatever the first sample is, so the same samples lie in the same shards, byte for
    byte, whether one run makes them or several.
    """

    count: int  # of samples
    seed: int
    shard_size: int  # in samples; the last shard may be short
    first: int = 0  # index, a multiple of the shard size

    def __post_init__(self) -> None:
        for option, value, low, high in (
            ("--count", self.count, 1, MAX_COUNT),
            ("--seed", self.seed, 0, MAX_SEED),
            ("--shard-size", self.shard_size, 1, MAX_COUNT),
        ):
            if not low <= value <= high:
                raise UsageError(f"{option} is {value}.", fix=f"Give a whole number from {low} to {high}.")
        if self.first % self.shard_size or not 0 <= self.first <= MAX_COUNT - self.count:
            fix = f"Begin at a multiple of --shard-size ({self.shard_size}) and end at {MAX_COUNT} at most."
            raise UsageError(f"--index-range begins at {self.first}.", fix=fix)

    @property
    def span(self) -> range:
        """Indices of all samples."""
        return range(self.first, self.first + self.count)

    @property
    def numbers(self) -> range:
        """Numbers of all shards."""
        return range(self.first // self.shard_size, -(-self.span.stop // self.shard_size))

    @property
    def shards(self) -> int:
        """Number of shards."""
        return len(self.numbers)

    @property
    def schema_version(self) -> int:
        """Schema version that a dataset of this plan records."""
        return SCHEMA_VERSION if self.first else FIRST_SCHEMA_VERSION

    def indices(self, number: int) -> range:
        """Sample indices of one shard."""
        first = number * self.shard_size
        return range(first, min(first + self.shard_size, self.span.stop))

    def part(self, numbers: range) -> Plan:
        """The plan of some consecutive shards, of which there must be one at least."""
        first, last = self.indices(numbers[0]), self.indices(numbers[-1])
        return replace(self, first=first.start, count=last.stop - first.start)

    def config(self) -> dict[str, Any]:
        """The plan as JSON, for ``run.json``."""
        # An older reader would take a count to mean samples from index 0 on.
        samples = {"index_range": f"{self.first}:{self.span.stop}"} if self.first else {"count": self.count}
        return {**samples, "seed": self.seed, "shard_size": self.shard_size}

    @classmethod
    def of(cls, config: object) -> Plan:
        """The plan of a run record's ``config``, the inverse of :meth:`config`; a ValueError where it is none."""
        if not isinstance(config, dict):
            raise ValueError("no object")
        values: dict[str, Any] = {name: config.get(name) for name in ("count", "seed", "shard_size")}
        if isinstance(config.get("index_range"), str):
            first, stop = map(int, config["index_range"].split(":"))
            values |= {"first": first, "count": stop - first}
        for name, value in values.items():
            if type(value) is not int:
                raise ValueError(f"{name} is {value!r}")
        try:
            return cls(**values)
        except UsageError as error:
            raise ValueError(error.problem) from error


def differences(old: Any, new: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """Fields in which two JSON values differ, as (dotted name, old, new); a missing field counts as None."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted(old.keys() | new.keys()):
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    return [] if old == new and type(old) is type(new) else [(name, old, new)]


def shard_number(path: str) -> int | None:
    """The number of the shard that a file belongs to, by its path in the dataset; None for any other file."""
    found = OWN_FILE.fullmatch(path)
    number = int(found["number"]) if found and found["number"] else None
    return number if number is not None and path in shard_files(number) else None


def record_number(path: str) -> int | None:
    """The number of the shard whose record has this path in the dataset; None for any other file."""
    return shard_number(path) if path.endswith(".json") else None


FIELDS = {
    "--count": ("config", "count"),
    "--index-range": ("config", "index_range"),
    "--bundle": ("fingerprint", "bundle"),
    "--healthy": ("fingerprint", "healthy"),
    "--frames": ("fingerprint", "frames"),
    "--masks": ("fingerprint", "masks"),
    "--jitter": ("fingerprint", "jitter"),
    "--vary": ("fingerprint", "vary"),
    "--normals": ("fingerprint", "normals"),
    "--lesions": ("fingerprint", "lesions"),
    "--classes": ("fingerprint", "classes"),
    "--seed": ("config", "seed"),
    "--shard-size": ("config", "shard_size"),
    "--size": ("fingerprint", "size"),
    "--depth": ("fingerprint", "depth"),
    "--across": ("fingerprint", "across"),
    "--height-width": ("fingerprint", "height_width"),
    "--birads": ("fingerprint", "birads"),
    "--scanner": ("fingerprint", "scanner"),
    "--density": ("fingerprint", "density"),
    "--chest-wall": ("fingerprint", "chest_wall"),
    "--tissue-maps": ("fingerprint", "tissue_maps"),
    "--provider": ("fingerprint", "provider"),
}  # where a run record keeps what each option decides: of a folder a hash, whose name ``options`` holds


def decided(record: Mapping[str, Any], option: str) -> Any:
    """The value in a run record that an option decides; None if the record's source has none."""
    section, name = FIELDS[option]
    return record.get(section, {}).get(name)


def as_typed(record: Mapping[str, Any], option: str) -> str | None:
    """The option's value as one would type it, folders by name alone; None where it is left out or unknown."""
    names = record.get("options") or {}
    value = names[option] if option in names else decided(record, option)
    if option == "--classes" and isinstance(value, Mapping):
        return ",".join(f"{name}={weight:g}" for name, weight in value.items())
    return None if value is None else str(value)


def command_line(record: Mapping[str, Any]) -> str:
    """The command that makes a dataset again, without ``--out`` and with folders by name alone."""
    # All options that decide which samples exist are named: a default may be another one in another version.
    typed = {option: as_typed(record, option) for option in FIELDS}
    command = "busigen generate"
    if cells := record.get("fingerprint", {}).get("cells"):
        command, count = "busigen grid", typed.pop("--count")
        typed = {"--backgrounds": str(int(count or 0) // cells), **typed}
    words = (
        option if value == str(True) else f"{option} {shlex.quote(value)}" for option, value in typed.items() if value
    )
    return " ".join([command, *words])


def changed_options(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, str]:
    """How two run records differ, as ``old -> new`` per option; the options that agree are absent."""
    changed = {}
    for option in FIELDS:
        if decided(old, option) != decided(new, option):
            before, now = (as_typed(record, option) or "the default" for record in (old, new))
            changed[option] = f"{before} -> {now}" if before != now else f"{now}, but its content is another"
    return changed


@dataclass(frozen=True)
class Sample:
    """One accepted sample: a grey image and the lesion's mask, both (256, 256)."""

    index: int  # position in the dataset, from 0
    attempt: int  # draws that the quality gates refused for this index before this one
    label: str  # one of registry.SAMPLE_CLASSES; a normal one's mask is empty
    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    row: dict[str, Any]  # further manifest fields: JSON-able scalars under the same keys in every sample of a source
    tissue: NDArray[np.uint8] | None = None  # of its background, by numbers of `busigen.phantoms.tissue`
    masks: tuple[NDArray[np.bool_], ...] = ()  # of each lesion, where there may be several; ``mask`` has them all

    @property
    def lesion_masks(self) -> tuple[NDArray[np.bool_], ...]:
        """The mask of each lesion, ``(256, 256)``."""
        return self.masks or ((self.mask,) if self.mask.any() else ())


@dataclass(frozen=True)
class Rejection:
    """One draw that a quality gate refused, and the gate's reason."""

    index: Whole
    attempt: Whole
    label: Text
    reason: Text


@dataclass(frozen=True)
class SampleBatch:
    """The samples of one request, one per index, in index order, and every refused draw on the way to them."""

    samples: list[Sample]
    rejections: list[Rejection]


class Source(Protocol):
    """A source of samples, which must be a pure function of its fingerprint, the seed and the index."""

    def fingerprint(self) -> dict[str, Any]:
        """Everything that decides which samples exist, nested and JSON-able (bundle, healthy images, classes)."""

    def options(self) -> Mapping[str, str | None]:
        """Names, never paths, of the folders that options gave, for people; None where the default was taken."""

    def row_types(self) -> Mapping[str, type]:
        """Type (``str``, ``int``, ``float`` or ``bool``) of each field of ``Sample.row``; any field may hold None."""
        # Declared, so that a shard whose column is all None gets the same table schema as its neighbours.

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        """Draw one accepted sample per index; call ``done(n)`` whenever ``n`` more samples have been accepted."""


@runtime_checkable
class Stream(Source, Protocol):
    """A source that draws ahead of the oldest request, so that its batches fill across shards."""

    def stream(
        self, seed: int, requests: Iterable[Sequence[int]], done: Callable[[int], None], stopping: Callable[[], bool]
    ) -> Generator[SampleBatch, None, None]:
        """Yield the samples of one request after the other, each as :meth:`Source.draw` would return them.

        ``requests`` are indices, read no further ahead than batches need. An empty one says that there is none for now;
        it may come only while another one is unanswered, and the next one is read later. ``done`` gets the number of
        newly accepted samples; ``stopping`` says whether to end with the oldest request that has been begun.
        """


def batches_of(
    source: Source,
    seed: int,
    requests: Iterable[Sequence[int]],
    done: Callable[[int], None],
    stopping: Callable[[], bool],
) -> Generator[SampleBatch, None, None]:
    """A source's samples for one request after the other; a :class:`Stream` draws ahead, other sources do not."""
    if isinstance(source, Stream):
        yield from source.stream(seed, requests, done, stopping)
    else:
        yield from (source.draw(seed, indices, done) for indices in requests if len(indices))
