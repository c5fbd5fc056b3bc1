"""Reading a dataset folder from anywhere: all of it is checked, and nothing is unpacked to disk."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from busigen.errors import BusigenError, InputError, IntegrityError
from busigen.foreign import looking, names_in, open_file
from busigen.records import Record, Text, Whole, checked, parse_json, read_json
from busigen.registry import RESOLUTION
from busigen.runtime.dataset.format import (
    DATASET_FILE,
    EXTRA_PICTURES,
    FINISHED_FILES,
    FIRST_SCHEMA_VERSION,
    MANIFEST_FILE,
    MEMBER_LIMIT,
    OWN_FILE,
    RUN_FILE,
    SCHEMA_VERSION,
    SHARD_FOLDER,
    TISSUE,
    Plan,
    Sample,
    key_of,
    member_suffixes,
    picture_columns,
    shard_path,
)
from busigen.runtime.dataset.run_record import DatasetRecord
from busigen.runtime.dataset.shards import FIXED_COLUMNS, ShardRecord, read_table
from busigen.runtime.storage.url import Address

_VERIFY = "Run `busigen verify` on the dataset to see what is damaged, then get or generate it again."


class _SampleRow(Record):
    index: Whole
    attempt: Whole
    label: Text = Field(alias="class")


@dataclass(frozen=True)
class Member:
    """One sample as it lies in a shard's tar: key, PNG files' bytes, decoded row; ``extra`` pictures by their kind."""

    key: str
    image: bytes
    mask: bytes
    row: dict[str, Any]
    extra: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def pictures(self) -> dict[str, bytes]:
        """The PNG files by their kind, in the order of a shard."""
        return {"image": self.image, "mask": self.mask, **self.extra}

    def decoded(self, kind: str) -> NDArray[Any]:
        """Its "image" or "tissue", (256, 256) uint8, or a mask, bool; a ValueError if that is no such PNG."""
        marks = kind not in ("image", TISSUE)
        mode = "1" if marks else "L"
        try:
            # Pillow imports the code for a format here, which opens files.
            with looking(), Image.open(io.BytesIO(self.pictures[kind]), formats=("PNG",)) as image:
                if image.size != (RESOLUTION, RESOLUTION) or image.mode != mode:
                    size = f"size {image.size}, not {mode} and {RESOLUTION} squared"
                    raise ValueError(f"a PNG of mode {image.mode} and {size}")
                image.load()
                pixels = np.array(image)
                # Pillow's true is the byte 255, which not all code takes for true as numpy does.
                return pixels.view(np.uint8) > 0 if marks else pixels
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"not a readable PNG ({error})") from error

    def lesion_masks(self) -> tuple[NDArray[np.bool_], ...]:
        """The mask of each lesion, where its dataset has them apart; raises what :meth:`decoded` does."""
        masks = (self.decoded(kind) for kind in self.extra if kind != TISSUE)
        return tuple(mask for mask in masks if mask.any())

    def sample(self) -> Sample:
        """It, decoded; an IntegrityError for damage."""
        row = checked(_SampleRow, self.row, f"The row of sample {self.key}", fix=_VERIFY)
        not_own = FIXED_COLUMNS.keys() | picture_columns(self.row)
        own = {name: value for name, value in self.row.items() if name not in not_own}
        try:
            image, mask, masks = self.decoded("image"), self.decoded("mask"), self.lesion_masks()
            tissue = self.decoded(TISSUE) if TISSUE in self.extra else None
        except ValueError as error:
            raise IntegrityError(f"Sample {self.key} is damaged: {error}.", fix=_VERIFY) from error
        return Sample(row.index, row.attempt, row.label, image, mask, own, tissue, masks)


@dataclass(frozen=True)
class Dataset:
    """A finished dataset folder. ``info`` is the content of ``dataset.json``."""

    folder: Path
    info: dict[str, Any]
    plan: Plan

    @classmethod
    def open(cls, folder: Path) -> Dataset:
        """Open a finished dataset; an IntegrityError if ``dataset.json`` is damaged.

        An InputError says that it is missing, unfinished, no dataset, newer than this busigen, or has links.
        """
        path = folder / DATASET_FILE
        if linked := links(folder):
            raise link_refused(linked[0])
        read_object(folder / RUN_FILE)  # For its schema alone.
        try:
            info = read_json(path, shards=len(recorded_shards(folder)), root=folder)
        except (FileNotFoundError, NotADirectoryError) as error:
            problem = f"{folder} is no busigen dataset: it has no {DATASET_FILE}."
            fix = "Give the folder of `--out`."
            if (folder / RUN_FILE).is_file():
                problem = f"{folder} is not finished: it has {RUN_FILE} but no {DATASET_FILE}."
                fix = "Run `busigen generate` with the same options again to finish it."
            raise InputError(problem, fix=fix) from error
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.", fix="Check its permissions.") from error
        except ValueError as error:
            raise _damaged(path) from error
        if not isinstance(info, dict) or not refuse_newer(info, path):
            raise _damaged(path)
        checked(DatasetRecord, info, path, fix=_VERIFY)
        return cls(folder=folder, info=info, plan=plan_of(info, path))

    def shards(self) -> list[ShardRecord]:
        """Every shard's record, in order; an IntegrityError where one is missing or damaged."""
        try:
            return [ShardRecord.read(self.folder, number) for number in self.plan.numbers]
        except FileNotFoundError as error:
            raise IntegrityError(f"{error.filename} is missing.", fix=_VERIFY) from error

    def manifest(self) -> pl.DataFrame:
        """All rows in index order, or an IntegrityError; columns are ``shards.FIXED_COLUMNS`` and the source's own."""
        path = self.folder / MANIFEST_FILE
        try:
            return read_table(path, self.plan.count)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise IntegrityError(f"{path} cannot be read: {error}.", fix=_VERIFY) from error

    def samples(self, indices: Sequence[int]) -> list[Sample]:
        """The samples of these indices, in the order asked for; an IndexError, or an IntegrityError for damage."""
        if outside := [index for index in indices if index not in self.plan.span]:
            raise IndexError(f"index {outside[0]} is outside {self.plan.span[0]} to {self.plan.span[-1]}")
        found: dict[int, Sample] = {}
        for number in sorted({index // self.plan.shard_size for index in indices}):
            for member in read_members(
                self.folder / shard_path(number, "tar"), self.plan.indices(number), only=indices
            ):
                found[int(member.key)] = member.sample()
        return [found[index] for index in indices]


def recorded_shards(folder: Path) -> list[int]:
    """Numbers of the shards that have a record, in order: a number in a file must not decide how much is read."""
    found = map(OWN_FILE.fullmatch, names_in(folder / SHARD_FOLDER))
    return sorted(int(name["number"]) for name in found if name and name["number"] and name[0].endswith(".json"))


def refuse_newer(record: Mapping[str, Any], path: Path | Address) -> bool:
    """Whether a ``run.json`` or ``dataset.json`` names a schema; an InputError for a newer one. All readers call it."""
    version = record.get("schema_version")
    if type(version) is int and version > SCHEMA_VERSION:
        problem = f"{path} has schema version {version}; this busigen reads up to {SCHEMA_VERSION}."
        raise InputError(problem, fix="Upgrade: `pip install --upgrade busigen`.")
    return type(version) is int and version >= FIRST_SCHEMA_VERSION


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a ``run.json`` or ``dataset.json``; None without one or for a link; an InputError if newer."""
    try:
        found = read_json(path, shards=len(recorded_shards(path.parent)), root=path.parent)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and refuse_newer(found, path) else None


@looking()
def links(folder: Path) -> list[Path]:
    """Links among a dataset's files and folders, in order; its own folder may be one, and does not count."""
    shards = folder / SHARD_FOLDER
    found = [path for path in (*(folder / name for name in FINISHED_FILES), shards) if path.is_symlink()]
    if shards in found or not shards.is_dir():
        return found
    with os.scandir(shards) as entries:
        return found + sorted(shards / entry.name for entry in entries if entry.is_symlink())


def refuse_unreadable(folder: Path) -> None:
    """Raise an InputError on a dataset, finished or not, that has links or a newer schema."""
    if linked := links(folder):
        raise link_refused(linked[0])
    for name in (RUN_FILE, DATASET_FILE):
        read_object(folder / name)


def link_refused(path: Path, kind: type[BusigenError] = InputError) -> BusigenError:
    """The error about a dataset with a link, for the caller to raise."""
    fix = "Put the file or folder itself there, or remove the link and run `busigen verify --repair` on the dataset."
    return kind(f"{path} is a link, and links in a dataset are not followed.", fix=fix)


def plan_of(info: dict[str, Any], path: Path) -> Plan:
    """The plan of a ``run.json`` or ``dataset.json``; an IntegrityError where it names none."""
    try:
        return Plan.of(info.get("config"))
    except ValueError as error:
        raise _damaged(path) from error


def _damaged(path: Path) -> IntegrityError:
    return IntegrityError(f"{path} is damaged: it is not what busigen writes.", fix=_VERIFY)


def read_members(path: Path, indices: range, only: Sequence[int] | None = None) -> Iterator[Member]:
    """Read a shard's tar, whose members must be exactly those of ``indices``, in order, or it is an IntegrityError.

    With ``only``, these alone are yielded: the names of all others are checked, their content is skipped.
    """
    wanted = set(indices if only is None else only)
    with _reading(path), open_headers(path) as tar:
        for index, headers in _headers(path, tar, indices):
            if index in wanted:
                yield _member(path, index, {kind: (one.size, tar.read(one)) for kind, one in headers.items()})


@dataclass(frozen=True)
class Places:
    """Where a shard's tar holds its samples' members: ``(N, K, 2)``, offset and size, of ``K`` ``suffixes``."""

    indices: range
    suffixes: tuple[str, ...]
    places: NDArray[np.int64]


def find_members(path: Path, indices: range) -> Places:
    """Where a shard's tar, checked as by `read_members`, holds each index's members, which are as many for each."""
    kinds: set[tuple[str, ...]] = set()
    found = []
    with _reading(path), open_headers(path) as tar:
        for _, headers in _headers(path, tar, indices):
            kinds.add(tuple(headers))
            found.append([(one.offset_data, one.size) for one in headers.values()])
    if len(kinds) > 1:
        most, least = max(kinds, key=len), min(kinds, key=len)
        some = next(suffix for suffix in most if suffix not in least)
        raise IntegrityError(f"{path}: only some of its samples have a {some}.", fix=_VERIFY)
    return Places(indices, kinds.pop(), np.array(found, np.int64))


def read_member(path: Path, index: int, found: Places) -> Member:
    """Read one sample of those that `find_members` found; an IntegrityError if it is not there."""
    contents = {}
    with _reading(path), open_file(path) as file:
        for suffix, (offset, size) in zip(
            found.suffixes, found.places[index - found.indices.start].tolist(), strict=True
        ):
            file.seek(offset)
            contents[suffix] = (size, file.read(size))
    return _member(path, index, contents)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, tarfile.TarError) as error:
        raise IntegrityError(f"{path} cannot be read: {error}.", fix=_VERIFY) from error


def _headers(path: Path, tar: TarHeaders, indices: range) -> Iterator[tuple[int, dict[str, tarfile.TarInfo]]]:
    """Each index with its members' headers by suffix, in order, and an IntegrityError where others follow."""
    image, mask, *extra, text = member_suffixes(EXTRA_PICTURES)
    for index in indices:
        key = key_of(index)
        found = {suffix: _next_member(path, tar, key, suffix) for suffix in (image, mask)}
        left = extra
        while text not in found:
            # What comes first is what a dataset without extra pictures has.
            member = _next_member(path, tar, key, text, *left)
            suffix = member.name.removeprefix(f"{key}.")
            found[suffix] = member
            left = left[left.index(suffix) + 1 :] if suffix in left else left
        yield index, found
    if (surplus := tar.next()) is not None:
        raise IntegrityError(f"{path}: unexpected member {surplus.name[:100]!r} at the end.", fix=_VERIFY)


def _member(path: Path, index: int, contents: Mapping[str, tuple[int, bytes]]) -> Member:
    """A sample from its members by suffix, in the order of `_headers`, each with the size that it should have."""
    key = key_of(index)
    for suffix, (size, content) in contents.items():
        if len(content) != size:
            raise IntegrityError(f"{path}: {key}.{suffix} is cut short.", fix=_VERIFY)
    image, mask, *pictures, text = (content for _, content in contents.values())
    _, _, *extra, _ = (suffix.removesuffix(".png") for suffix in contents)
    try:
        row = parse_json(text, key)
    except ValueError:
        row = None
    if not isinstance(row, dict) or row.get("key") != key:
        raise IntegrityError(f"{path}: {key}.json is not the row of its sample.", fix=_VERIFY)
    return Member(key=key, image=image, mask=mask, row=row, extra=dict(zip(extra, pictures, strict=True)))


def _next_member(path: Path, tar: TarHeaders, key: str, suffix: str, *others: str) -> tarfile.TarInfo:
    """The next member's header, which has to be the sample's of that suffix, or of one of ``others``."""
    expected = f"{key}.{suffix}"
    if (member := tar.next()) is None:
        raise IntegrityError(f"{path} ends before {expected}.", fix=_VERIFY)
    # Names are only compared, so an absolute path, a "..", a link or a device fails here and does no harm.
    plain = member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
    if member.name not in (expected, *(f"{key}.{other}" for other in others)) or not plain:
        raise IntegrityError(f"{path}: expected the file {expected}, found {member.name[:100]!r}.", fix=_VERIFY)
    if not 0 < member.size <= MEMBER_LIMIT:
        problem = f"{path}: {expected} has {member.size} bytes; 1 to {MEMBER_LIMIT} are allowed."
        raise IntegrityError(problem, fix=_VERIFY)
    return member


HEADER_LIMIT = 16 << 10
"""Most bytes that the headers of one member may take; a plain one takes 512. A long name or a set of PAX records can
claim any size, and tarfile reads all of it at once; what tarfiles before Python 3.12.6 make of overlapping records
grows with their square: 16 KiB into some 70 MB."""


class TarHeaders:
    """An uncompressed tar file's members, one after another. Open one with ``open_headers``."""

    def __init__(self, file: _BoundedFile, tar: tarfile.TarFile) -> None:
        self._file = file
        self._tar = tar

    @property
    def offset(self) -> int:
        """Where in the file the next member's header should lie, in bytes."""
        return self._tar.offset

    def next(self) -> tarfile.TarInfo | None:
        """The next member; None at the end or a damaged header; a TarError for malformed or too large ones."""
        self._file.left = HEADER_LIMIT
        with _malformed_as_tar_error():
            member = self._tar.next()
        # tarfile keeps every header that it has read, and every record of the global ones, in memory.
        vars(self._tar)["members"] = []
        self._tar.pax_headers = {}
        return member

    def read(self, member: tarfile.TarInfo) -> bytes:
        """A plain member's content, shorter than its size if the file is cut short. Callers check the size before."""
        self._file.left = member.size
        self._file.seek(member.offset_data)
        return self._file.read(member.size)


@contextmanager
def open_headers(path: Path) -> Iterator[TarHeaders]:
    """The headers of an uncompressed tar file; a few kilobytes of a compressed one could unpack to terabytes.

    A TarError says that it is no tar file, an OSError that it cannot be read, or is no regular file.
    """
    with _BoundedFile(open_file(path).detach()) as file:
        with _malformed_as_tar_error():
            tar = tarfile.TarFile(fileobj=file)
        with tar:
            yield TarHeaders(file, tar)


class _BoundedFile(io.BufferedReader):
    """A file that refuses to read more than ``left`` bytes; the reader sets ``left`` for each member."""

    left = HEADER_LIMIT

    def read(self, size: int | None = -1, /) -> bytes:
        # A negative size means all that is left; tarfile also computes one from a header with a negative size.
        if size is None or not 0 <= size <= self.left:
            raise tarfile.ReadError(f"the headers of one member claim more than {HEADER_LIMIT:,} bytes")
        self.left -= size
        return super().read(size)


@contextmanager
def _malformed_as_tar_error() -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, ValueError, OverflowError, RecursionError) as error:
        # Errors that tarfile raises on malformed records; their text is a bare key, or does not name the file.
        raise tarfile.ReadError(f"one of its headers is malformed ({type(error).__name__})") from error
