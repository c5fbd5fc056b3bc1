"""What a format of `busigen convert` is given, and what it has to do.

A format is a module in ``busigen/runtime/convert/formats/`` with a class ``Converter``, and a line in
`registry.FORMATS` under the module's name. ``convert`` gives it one pair after the other, in an order that never
changes; it writes their files to the `Target` and returns of each what it needs to know at the end, a JSON value. Every
few hundred pairs (`CHUNK`), these are put on the disk: a run that was killed continues after them. At the end, the
format gets all of them again, one at a time, and writes its index files. No format holds all pairs in memory.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busigen.data.prepared import Prepared
from busigen.errors import MissingDependencyError, UsageError
from busigen.files import make_folder, sync
from busigen.foreign import refuse_links
from busigen.records import read_json
from busigen.registry import FORMATS, SAMPLE_CLASSES
from busigen.runtime.progress import Progress
from busigen.text import install_command

CHUNK = 256  # Most pairs between two points from which a killed run continues; fewer where a shard ends.
_MANY = 10_000  # Pairs whose entries take a moment to read.
WORK_FOLDER = ".convert"  # In the target until it is finished: notes on what is done, and files being written.


@dataclass(frozen=True)
class Pair:
    """One sample of the dataset: its hash was checked, and its images are what a dataset holds."""

    name: str  # unique among all pairs, fit for a file's name: "000000012", of a merged dataset "001-000000012"
    label: str  # one of registry.SAMPLE_CLASSES; a normal one has an empty mask
    split: str  # one of Job.splits; "" without
    fold: int  # 0 to Job.folds - 1; pairs with one given background have one fold and one split
    number: int  # from 0, among the pairs of its split
    class_number: int  # from 1, among the pairs of its class
    image: NDArray[np.uint8]  # (256, 256)
    mask: NDArray[np.bool_]  # (256, 256), true on the lesion, or on all of them
    masks: tuple[NDArray[np.bool_], ...]  # (256, 256), of each lesion; none of a normal one
    image_png: bytes  # the dataset's own file: 8-bit grey
    mask_png: bytes  # the dataset's own file: 1 bit
    row: Mapping[str, Any]  # its row of the manifest (docs/architecture.md)

    @property
    def class_index(self) -> int:
        """Position of its class in `registry.SAMPLE_CLASSES`, from 0."""
        return SAMPLE_CLASSES.index(self.label)


@dataclass(frozen=True)
class Job:
    """What is converted, known before the first pair is read."""

    out: Path
    classes: tuple[str, ...]  # of the chosen pairs, in registry order
    splits: tuple[str, ...]  # empty where the pairs are not split
    counts: Mapping[str, int]  # pairs by split; by "" without
    folds: int  # selection.FOLDS, or fewer where there are not as many groups
    types: Mapping[str, str]  # of the columns of every row: "str", "int", "float" or "bool"; any value may be None
    info: Mapping[str, Any]  # content of dataset.json; of a merged dataset, of its first part's
    real: Prepared | None = None  # what to merge with, where the format takes it


class Target:
    """The folder that is written to: each file appears there whole."""

    def __init__(self, out: Path) -> None:
        self._out, self._work = out, out / WORK_FOLDER
        self._folders = {out}
        self._unsettled: list[Path] = []
        self._files = 0

    def begin(self) -> Path:
        """Make the folder for what is not finished, or empty an earlier run's of files half-written; returns it."""
        make_folder(self._work)
        refuse_links(self._work, self._out)
        for left in self._work.glob("new-*"):
            left.unlink()
        return self._work

    def write(self, name: str, content: bytes | memoryview) -> None:
        """Write a file; ``name`` is relative to the target, with forward slashes."""
        with self.file(name) as file:
            file.write(content)

    @contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        """A file opened for writing that appears under its name once it is complete."""
        self._files += 1
        path, temporary = self._out / name, self._work / f"new-{self._files}"
        if path.parent not in self._folders:
            make_folder(path.parent)
            refuse_links(path.parent, self._out)
            self._folders.add(path.parent)
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
        self._unsettled.append(path)

    def settle(self) -> None:
        """Flush to disk what was written since the last time."""
        # In threads: a journal takes many flushes in one go.
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(sync, self._unsettled))
            list(pool.map(sync, {path.parent for path in self._unsettled}))
        self._unsettled.clear()


class Format:
    """What a module's ``Converter`` derives from."""

    default_splits: ClassVar[Mapping[str, float]] = {}  # shares that are taken where --split is left out
    allowed_splits: ClassVar[tuple[str, ...]] = ()  # names that --split may have; all where it is empty
    takes_real: ClassVar[bool] = False  # whether --real means something to it

    def __init__(self, job: Job, target: Target, progress: Progress) -> None:
        self.job, self.target, self.progress = job, target, progress

    def begin(self) -> None:
        """Refuse what the format cannot say, with a BusigenError, before anything is written; called first."""

    def write(self, pair: Pair) -> Any:
        """Write one pair's files and return its entry, a JSON value but None; None leaves the pair out."""
        raise NotImplementedError

    def write_chunk(self, number: int, pairs: Iterable[Pair]) -> Iterator[Any]:
        """Write a chunk, whose number, from 0, is the same in every run, and yield an entry for each pair.

        For formats whose files hold many pairs; others leave it as it is.
        """
        for pair in pairs:
            yield self.write(pair)

    def finish(self, entries: Entries) -> None:
        """Write what describes all pairs; ``entries`` can be read several times, and lacks those that were left out."""

    def lines(self, left_out: int) -> Iterator[str]:
        """What to tell the user at the end: how the tool reads it, and why so many pairs were left out."""
        yield from ()


@dataclass(frozen=True)
class Entries:
    """What a format returned for each of the ``count`` pairs, in their order, read from the disk each time."""

    chunks: Sequence[Path]
    count: int
    progress: Progress

    def __iter__(self) -> Iterator[Any]:
        if many := self.count >= _MANY:
            self.progress.start("describing", self.count, unit="pair")
        for chunk in self.chunks:
            entries = read_json(chunk)
            yield from (entry for entry in entries if entry is not None)
            self.progress.advance(len(entries) if many else 0)


def converter_of(name: str) -> type[Format]:
    """The class of a format; a UsageError for an unknown name, a MissingDependencyError where it needs an extra."""
    if name not in FORMATS:
        raise UsageError(f"--to is {name!r}, which is no format.", fix=f"Choose one of: {', '.join(FORMATS)}.")
    try:
        found: type[Format] = import_module(f"busigen.runtime.convert.formats.{name}").Converter
    except ModuleNotFoundError as error:
        if not FORMATS[name].extra:
            raise
        problem = f"--to {name} needs {error.name}, which is not installed."
        raise MissingDependencyError(problem, fix=f"Run {install_command(FORMATS[name].extra)}.") from error
    return found


def write_stream(file: IO[bytes], value: Any) -> None:
    """Write a value as JSON, in which iterators stand for lists that need not fit into memory, one line an element.

    They may lie in mappings and tuples.
    """
    if isinstance(value, (Iterator, tuple)):
        file.write(b"[")
        for number, element in enumerate(value):
            file.write(b",\n" if number else b"\n")
            if isinstance(value, tuple):
                write_stream(file, element)
            else:
                file.write(json.dumps(element).encode())
        file.write(b"\n]")
    elif isinstance(value, Mapping):
        file.write(b"{")
        for number, (name, below) in enumerate(value.items()):
            file.write(f"{',' if number else ''}\n{json.dumps(name)}: ".encode())
            write_stream(file, below)
        file.write(b"\n}")
    else:
        file.write(json.dumps(value).encode())


def png(pixels: NDArray[np.uint8]) -> bytes:
    """An 8-bit grey PNG of (H, W) pixels, without metadata."""
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, "PNG")
    return file.getvalue()


def grey_mask(mask: NDArray[np.bool_]) -> bytes:
    """A mask as an 8-bit PNG, 255 on the lesion: many tools do not read one of a single bit."""
    return png(mask.astype(np.uint8) * 255)


def label_map(pair: Pair) -> bytes:
    """Its mask as an 8-bit PNG: 0 outside, from 1 on the lesion's class in the registry's order."""
    return png(pair.mask.astype(np.uint8) * np.uint8(pair.class_index + 1))
