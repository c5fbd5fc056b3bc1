"""Pairs of image and mask as Python sees them: drawn by the engine, or read from a dataset, wherever that lies."""

from __future__ import annotations

import bisect
import copy
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any, overload

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.errors import InputError, IntegrityError
from busigen.files import sha256_of
from busigen.foreign import refuse_costly
from busigen.registry import SAMPLE_CLASSES
from busigen.runtime.dataset import reader
from busigen.runtime.dataset.format import DATASET_FILE, MANIFEST_FILE, Sample, key_of, shard_path
from busigen.runtime.dataset.shards import row_of
from busigen.runtime.execution.run import SourceOptions
from busigen.runtime.maintenance.merge import PARTS_FOLDER, open_parts
from busigen.runtime.maintenance.remote import fetch, viewed
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.sampler import Sampler
from busigen.runtime.storage.object_store import RetryingCaller, Store
from busigen.runtime.storage.url import Address, place_of

_KEPT_SHARDS = 8  # of a dataset at a URL, in a folder of each process
_PART = re.compile(rf"({PARTS_FOLDER}/[0-9]{{3,10}})/{re.escape(DATASET_FILE)}")
_VERIFY = "Run `busigen verify` on the dataset to see what is damaged, then get or generate it again."


@dataclass(frozen=True, eq=False)
class Pair:
    """A grey image with a lesion, and that lesion's mask; without one, the mask is empty."""

    image: NDArray[np.uint8]  # (256, 256)
    mask: NDArray[np.bool_]  # (256, 256), true on the lesion
    label: str  # one of registry.SAMPLE_CLASSES
    key: str  # unique in its dataset: "000000012", of a merged one "001/000000012", as `explain` takes it
    row: dict[str, Any]  # of the manifest; a pair that lies in no file has no hashes and no shard
    tissue: NDArray[np.uint8] | None = None  # (256, 256), by `busigen.phantoms.tissue.TISSUES`; with ``tissue_maps``
    masks: tuple[NDArray[np.bool_], ...] = ()  # (256, 256), of each lesion; ``mask`` has them all


def drawn(options: SourceOptions, indices: Iterable[int]) -> Iterator[Pair]:
    """The pairs of these indices, in their order, which may go on without an end.

    Raises at once what opening the source does, and from the iterator what it does when it draws.
    """
    return _stream(options.source(Progress()), options, iter(indices))


def _stream(source: Sampler, options: SourceOptions, indices: Iterator[int]) -> Iterator[Pair]:
    types = source.row_types()
    # An answer waits for its last sample, so requests are short; samples of later ones are drawn ahead.
    requests = iter(lambda: list(islice(indices, options.batch_size)), [])
    with closing(source.stream(options.seed, requests, lambda number: None)) as batches:
        for batch in batches:
            yield from (_pair(sample, row_of(sample, types, {})) for sample in batch.samples)


def _pair(sample: Sample, row: dict[str, Any], prefix: str = "") -> Pair:
    key = f"{prefix}{row['key']}"
    return Pair(sample.image, sample.mask, sample.label, key, row, sample.tissue, sample.lesion_masks)


class Dataset:
    """The pairs of a finished dataset, plain or merged, in a folder or at a URL.

    ``dataset[5]`` is a pair, ``dataset[5:10]`` a dataset of five; both count from 0 in the manifest's order, whatever
    the indices are. ``dataset["000000012"]`` is the pair of that key, of a merged one ``dataset["001/000000012"]``. An
    IndexError or a KeyError says what there is. Nothing but what is asked for is read. With ``check``, each shard is
    hashed before it is read from for the first time, and compared with ``dataset.json``. It can be pickled, and used in
    processes that fork.

    Raises:
        InputError: there is no finished dataset, or a newer one, or its store cannot be reached.
        IntegrityError: it is damaged; also when a pair is read.
    """

    def __init__(self, place: str | Path, *, check: bool = False) -> None:
        self.place: Path | Address = place_of(str(place))
        self._check = check
        with ExitStack() as stack:
            opened = _opened(self.place, stack)
            self._parts = [_Part(dataset, place, name, check) for dataset, place, name in opened]
        self._starts = [0, *accumulate(part.plan.count for part in self._parts)]
        self._positions = range(self._starts[-1])

    def __len__(self) -> int:
        return len(self._positions)

    @overload
    def __getitem__(self, position: int | str) -> Pair: ...
    @overload
    def __getitem__(self, position: slice) -> Dataset: ...
    def __getitem__(self, position: int | str | slice) -> Pair | Dataset:
        if isinstance(position, slice):
            view = copy.copy(self)
            view._positions = self._positions[position]
            return view
        try:
            place = self._place_of(position) if isinstance(position, str) else self._positions[position]
        except IndexError:
            raise IndexError(f"there is no position {position}: they go from 0 to below {len(self)}") from None
        part, within = self._located(place)
        return part.pair(within)

    def _located(self, place: int) -> tuple[_Part, int]:
        """The part of a place among all pairs, and the position there."""
        number = bisect.bisect_right(self._starts, place) - 1
        return self._parts[number], place - self._starts[number]

    def _place_of(self, key: str) -> int:
        """The place of a key among all pairs of the dataset; a KeyError if this one does not have it."""
        digits = key.rpartition("/")[2]
        index = int(digits) if re.fullmatch("[0-9]{9}", digits) else -1
        for part, start in zip(self._parts, self._starts, strict=False):
            place = start + index - part.plan.first
            if index in part.plan.span and key == f"{part.prefix}{digits}" and place in self._positions:
                return place
        ends = (self._located(self._positions[at]) for at in (0, -1)) if len(self) else ()
        said = " to ".join(f"{part.prefix}{key_of(part.plan.first + within)}" for part, within in ends)
        raise KeyError(f"there is no pair {key!r}: the keys are {said or 'none'}")

    def __iter__(self) -> Iterator[Pair]:
        return (self[position] for position in range(len(self)))

    def __repr__(self) -> str:
        return f"<busigen.Dataset of {len(self)} pairs, {self.place}>"

    def manifest(self) -> pl.DataFrame:
        """A row per pair, in order; of a merged dataset, its column ``part`` says in which part the pair lies."""
        with ExitStack() as stack:
            tables = [
                dataset.manifest().select(pl.lit(name).alias("part"), pl.all()) if name else dataset.manifest()
                for dataset, _, name in _opened(self.place, stack)
            ]
        try:
            table = pl.concat(tables)
        except pl.exceptions.PolarsError as error:
            raise IntegrityError(f"{self.place}: its parts have different columns: {error}.", fix=_VERIFY) from error
        return table if self._positions == range(len(table)) else table[list(self._positions)]

    def shards(self) -> list[range]:
        """The positions of each shard's pairs, which cost little to read one after the other."""
        starts = [
            start + max(number * part.plan.shard_size - part.plan.first, 0)
            for start, part in zip(self._starts, self._parts, strict=False)
            for number in part.plan.numbers
        ]
        numbers = np.searchsorted(starts, self._positions, side="right")
        cuts = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(self)]
        return [range(a, b) for a, b in pairwise(cuts) if a < b]


def _opened(place: Path | Address, stack: ExitStack) -> Iterator[tuple[reader.Dataset, Path | Address, str]]:
    """Each part with its place and its name, "" for a plain dataset; the stack holds the files of those at URLs."""
    if isinstance(place, Path):
        for part in open_parts(place):
            yield _bounded(part), part.folder, "" if part.folder == place else part.folder.relative_to(place).as_posix()
        return
    names = {found[1] for name in _store(place).sizes if (found := _PART.fullmatch(name))}
    for name in sorted(names, key=lambda name: int(name.rpartition("/")[2])) or [""]:
        address = place / name if name else place
        folder = stack.enter_context(viewed(address)).folder
        try:
            yield _bounded(reader.Dataset.open(folder)), address, name
        except (InputError, IntegrityError) as error:
            raise type(error)(error.problem.replace(str(folder), str(address)), fix=error.fix) from error


def _bounded(dataset: reader.Dataset) -> reader.Dataset:
    """It, or an IntegrityError where the manifest or the list of shards holds fewer than it claims to have."""
    path, plan = dataset.folder / MANIFEST_FILE, dataset.plan
    try:
        refuse_costly(path, plan.count)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.", fix=_VERIFY) from error
    listed = {shard["number"] for shard in dataset.info["shards"]}
    if len(listed) != plan.shards or not all(number in plan.numbers for number in listed):
        problem = f"{dataset.folder / DATASET_FILE} lists {len(listed)} shards, of which there should be {plan.shards}."
        raise IntegrityError(problem, fix=_VERIFY)
    return dataset


def _store(address: Address) -> Store:
    return Store(RetryingCaller(address, kind=InputError))


class _Part:
    """The pairs of one dataset that is no collection."""

    def __init__(self, dataset: reader.Dataset, place: Path | Address, name: str, check: bool) -> None:
        self.plan, self._check = dataset.plan, check
        self.prefix = f"{name.rpartition('/')[2]}/" if name else ""  # of its pairs' keys
        # The record itself takes megabytes, and is not needed any more.
        self._listed = {shard["number"]: shard["tar"] for shard in dataset.info["shards"]}
        self._place = place if isinstance(place, Path) else _Fetched(place)
        self._places: dict[int, reader.Places] = {}
        self._checked: set[int] = set()

    def pair(self, position: int) -> Pair:
        """The pair of a position, counted from the first sample."""
        index = self.plan.first + position
        number = index // self.plan.shard_size
        path = self._shard(number)
        if number not in self._places:
            self._places[number] = reader.find_members(path, self.plan.indices(number))
        member = reader.read_member(path, index, self._places[number])
        sample = member.sample()
        if sample.label not in SAMPLE_CLASSES or sample.index != index:
            problem = f"{path}: {member.key}.json names class {sample.label!r:.40} and index {sample.index}."
            raise IntegrityError(problem, fix=_VERIFY)
        return _pair(sample, member.row, self.prefix)

    def _shard(self, number: int) -> Path:
        """The path of a shard's tar, checked if that was asked for."""
        listed, name = self._listed[number], shard_path(number, "tar")
        path, fresh = self._place.path(name) if isinstance(self._place, _Fetched) else (self._place / name, False)
        if self._check and (fresh or number not in self._checked):
            try:
                found = sha256_of(path, limit=listed["size"])
            except OSError as error:
                raise IntegrityError(f"{path} cannot be read: {error.strerror}.", fix=_VERIFY) from error
            if found != listed["sha256"]:
                raise IntegrityError(f"{path} has another sha256 than {DATASET_FILE} records.", fix=_VERIFY)
            self._checked.add(number)
        return path


class _Fetched:
    """Shards of a dataset at a URL, of which each process keeps the last few in a temporary folder of its own."""

    def __init__(self, address: Address) -> None:
        self._address, self._process = address, 0
        self._make_base()

    def _make_base(self) -> None:
        # Of this process and those that it starts: they may be ended at any moment. A `weakref.finalize` would remove
        # it in a process that forked off, too.
        self._base = Path(tempfile.mkdtemp(prefix="busigen-"))
        Finalize(self, shutil.rmtree, (self._base,), {"ignore_errors": True}, exitpriority=0)

    def path(self, name: str) -> tuple[Path, bool]:
        """Where a file lies now, and whether it has just been fetched."""
        if self._process != os.getpid():
            if not self._base.is_dir():  # This is another machine, or the process that made it has ended.
                self._make_base()
            # No connection outlives a fork.
            self._store, self._folder = _store(self._address), Path(tempfile.mkdtemp(dir=self._base))
            self._held: list[str] = []
            self._process = os.getpid()
        path = self._folder / Path(name).name
        fresh = name not in self._held
        if fresh:
            while len(self._held) >= _KEPT_SHARDS:
                (self._folder / Path(self._held.pop(0)).name).unlink(missing_ok=True)
            if name not in self._store.sizes:
                raise IntegrityError(f"{self._address / name} is missing.", fix=_VERIFY)
            fetch(self._store, name, path)
        else:
            self._held.remove(name)
        self._held.append(name)
        return path, fresh

    def __getstate__(self) -> dict[str, Any]:
        return {"_address": self._address, "_base": self._base, "_process": 0}
