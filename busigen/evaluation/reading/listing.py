"""Which images a set of any layout holds, before any is opened. WebDataset shards may have come from anywhere."""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.images import ImageFile, read_image
from busigen.data.masks import read_mask_of
from busigen.data.sources.files import SUFFIXES
from busigen.data.sources.frames import Looked
from busigen.data.sources.read import UnknownLayoutError, read_source
from busigen.data.sources.records import UNKNOWN_CLASS, Listing, Record, Refusal
from busigen.errors import BusigenError, InputError
from busigen.foreign import open_file
from busigen.records import parse_json
from busigen.registry import CLASSES, SYNTHETIC
from busigen.runtime.dataset.format import DATASET_FILE, RUN_FILE, SHARD_FOLDER
from busigen.runtime.dataset.reader import open_headers, refuse_unreadable
from busigen.runtime.maintenance.merge import open_parts, parts_of
from busigen.runtime.sampling.grid import COLUMNS
from busigen.text import printable

GRID = GROUP, LEVEL = tuple(COLUMNS)  # Of a busigen grid: the background's number, and the sample's own levels
NAME_LIMIT = 512  # Longest member name in characters
_LIMITS = {"image": 32 << 20, "mask": 32 << 20, "row": 1 << 20, "class": 64}
"""Largest member in bytes that is read from an archive, by its role."""

_IMAGE = "image|images|img|imgs|input|inputs"
_MASK = "mask|masks|seg|segmentation|segmentations|label|labels|gt|groundtruth|ground_truth|annotation|annotations"
_WORD = re.compile(rf"(?P<key>.+)[._ -](?:(?P<image>{_IMAGE})|(?:{_MASK}|tumou?r|lesion)[._ -]?\d*)", re.I | re.S)
"""What a name without its ending says of its role: ``a.mask``, ``a_mask_1``, ``a_image``."""

_BEFORE = re.compile(r"(?:(?P<image>image|img|bus)|mask|seg|label|gt)[_-](?P<key>.+)", re.I | re.S)
"""The same where the word comes first, as in BUS-BRA's ``mask_0001-l`` of ``bus_0001-l``."""

_FOLDERS = re.compile(rf"(?P<image>{_IMAGE})|{_MASK}", re.I)
_TEXTS = {"json": "row", "cls": "class"}
_KINDS, _KINDS_SHOWN = 64, 5  # Kinds of members without a role that are told apart, and named
_WHOLE = "Get the archive again, or write it anew."


Opened = tuple[ImageFile, NDArray[np.bool_], int]


@dataclass(frozen=True)
class Item:
    """One listed image; ``background`` as in ``ImageSet.table``, ``patient`` is whatever several images share.

    ``columns``: Those of its row that were asked for and are there. ``read`` opens it: the image, its native lesion
    mask, the number of mask files, or an ``InputError``.
    """

    id: str
    file: str
    image_class: str
    read: Callable[[], Opened]
    patient: str | None = None
    background: str | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def list_set(
    path: Path,
    refused: list[Refusal],
    notes: list[str],
    frames: int = 1,
    looked: Looked | None = None,
    columns: Sequence[str] = (),
) -> tuple[str, list[Item]]:
    """The layout's name and the images of a set that is not prepared; what is refused or to be known is appended.

    ``frames`` and ``looked`` are those of `read_source`; ``columns`` are kept of the rows in shards.

    Raises `InputError` where the folder is missing or has no known layout.
    """
    if path.is_file() and path.suffix == ".tar":
        return "WebDataset shards", list_archives([path], refused, notes, columns)
    if not path.is_dir():
        problem = "is a file, but no .tar" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}.", fix="Give the folder that holds the images and masks.")
    if any((path / name).is_file() for name in (DATASET_FILE, RUN_FILE)):
        return "busigen dataset", _list_dataset(path, refused, notes, columns)
    archives = sorted([*path.glob("*.tar"), *(path / SHARD_FOLDER).glob("*.tar")])
    if archives:
        return "WebDataset shards", list_archives(archives, refused, notes, columns)
    try:
        listing = read_source(path, unlabelled=True, frames=frames, looked=looked)
    except UnknownLayoutError as error:
        raise InputError(
            error.problem,
            fix=f"Give a busigen dataset, a prepared folder, a folder of .tar shards, or a set. {error.fix}",
        ) from error
    refused.extend(listing.refused)
    notes.extend(listing.notes)
    return listing.layout, [_source_item(listing, record) for record in listing.records]


def _list_dataset(path: Path, refused: list[Refusal], notes: list[str], columns: Sequence[str]) -> list[Item]:
    """The samples of a busigen dataset, which may be unfinished or lack some: what is there can be judged."""
    places = parts_of(path) or [path]
    for place in places:
        refuse_unreadable(place)
    tars = [tar for at in places for tar in sorted((at / SHARD_FOLDER).glob("*.tar"))]
    items = list_archives(tars, refused, notes, columns)
    try:
        count = sum(part.plan.count for part in open_parts(path))
    except BusigenError as error:
        refused.append(Refusal(path.name, error.problem, error.fix))
    else:
        if count != len(items):
            problem = f"Its shards hold {len(items)} of {count} samples."
            refused.append(Refusal(path.name, problem, "Run `busigen verify`."))
    return items


def _source_item(listing: Listing, record: Record) -> Item:
    def read() -> Opened:
        return _with_masks(read_image(record.image), ((path, None) for path in record.masks))

    return Item(record.id, listing.relative(record.image), record.image_class, read, record.patient)


def _with_masks(image: ImageFile, masks: Iterable[tuple[Path, bytes | None]]) -> Opened:
    """The image with the notes on its masks, the lesions of all masks, and how many there are."""
    lesions, notes, count = np.zeros(image.pixels.shape, np.bool_), list(image.notes), 0
    for path, data in masks:
        lesions |= read_mask_of(path, image, data, notes=notes)
        count += 1
    return replace(image, notes=tuple(dict.fromkeys(notes))), lesions, count


def list_archives(
    archives: Sequence[Path], refused: list[Refusal], notes: list[str] | None = None, columns: Sequence[str] = ()
) -> list[Item]:
    """List every sample of some tar files by their headers alone.

    A sample is an image, ``<key>.image.png`` or ``<key>.png``, its masks, ``<key>.mask.png``, and perhaps
    ``<key>.json`` with ``class``, or ``<key>.cls`` with a class's name or number. People's other words for image and
    mask are known as well, also as a folder's name. Links, devices, sparse and oversized members are refused; names
    serve as names only, never as paths.
    """
    reader = _Archives(refused, columns)
    items = [item for archive in archives for item in reader.items(archive)]
    if notes is not None:
        notes.extend(reader.notes())
    return items


def role_of(name: str) -> tuple[str, str] | None:
    """What a member is (``image``, ``mask``, ``row``, ``class``) and its sample's key; None where its name tells none.

    WebDataset ends a key at the first dot, which cuts names such as ``case.0001.png`` short: parts that begin with a
    digit belong to the key here. A word before the ending that is not known (``0001.left.png``) may mean anything.
    """
    folder, _, last = name.rpartition("/")
    if last.startswith("."):
        return None
    stem, _, ending = last.rpartition(".")
    role: str | None = _TEXTS.get(ending.lower())
    folders = folder.split("/") if folder else []
    key = stem
    if role is None:
        if f".{ending.lower()}" not in SUFFIXES:
            return None
        word = _WORD.fullmatch(stem) or _BEFORE.fullmatch(stem)
        place = next((match for part in reversed(folders) if (match := _FOLDERS.fullmatch(part))), None)
        if word is not None:
            role, key = ("image" if word["image"] else "mask"), word["key"]
        elif re.match(r"[^\W\d]\w*$", stem.rpartition(".")[2]) and "." in stem:
            return None
        else:
            role = "image"
        if place is not None and not place["image"]:
            role = "mask"
    kept = [part for part in folders if not _FOLDERS.fullmatch(part)]
    return (role, "/".join([*kept, key])) if key else None


@dataclass(frozen=True)
class _Member:
    """Where one member's bytes lie in its archive."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes; an `InputError` where the archive was cut short or cannot be read."""
        try:
            with open_file(self.archive) as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.archive} cannot be read: {error.strerror}.", fix="Check the file.") from error
        if len(data) != self.size:
            raise InputError(f"{self.archive.name}: {self.name} is cut short.", fix=_WHOLE)
        return data


_Sample = dict[tuple[str, str], _Member]
"""The members of one key, by role and, for masks, of which there may be several, by name."""


class _Archives:
    """Lists archives, and counts what was guessed from names alone and what could not be."""

    def __init__(self, refused: list[Refusal], columns: Sequence[str] = ()) -> None:
        self._refused, self._columns = refused, (*columns, *GRID)
        self._unknown, self._strange = Counter[str](), Counter[str]()
        self._examples: dict[str, str] = {}
        self._numbered = False
        self._folders: dict[Path, int] = {}

    def items(self, archive: Path) -> Iterator[Item]:
        samples: dict[str, _Sample] = {}
        for member, role, key in self._members(archive):
            place = (role, member.name if role == "mask" else "")
            if samples.setdefault(key, {}).setdefault(place, member) is not member:
                self._refuse(archive, member.name, "It is a second one of its sample.")
        for key, sample in samples.items():
            if ("image", "") in sample:
                yield self._item(archive, key, sample)
            else:
                self._refuse(archive, key, "The sample has no image.")

    def notes(self) -> list[str]:
        """What a report says of the guesses, one line a kind."""
        notes = []
        if self._unknown:
            shown = self._unknown.most_common(_KINDS_SHOWN)
            kinds = [f"{kind}: {count}, such as {self._examples[kind]}" for kind, count in shown]
            more = len(self._unknown) - len(kinds)
            notes.append(
                f"{self._unknown.total()} members of shards are passed over, because nothing in their names says what "
                f"they are ({'; '.join(kinds)}{f'; and {more} more kinds' if more > 0 else ''})"
            )
        if self._numbered:
            numbers = ", ".join(f"{number} {label}" for number, label in enumerate(CLASSES))
            notes.append(f"the numbers in .cls members are read as {numbers}")
        if self._strange:
            text, _ = self._strange.most_common(1)[0]
            notes.append(f"{self._strange.total()} .cls members name no known class, most of them {text!r}")
        return [printable(note) for note in notes]

    def _members(self, archive: Path) -> Iterator[tuple[_Member, str, str]]:
        """Every usable member with its role and its sample's key."""
        try:
            with open_headers(archive) as tar:
                while (member := tar.next()) is not None:
                    # A negative size leads back to where the header lies: without this it would be read for ever.
                    if member.size < 0 or tar.offset <= member.offset:
                        problem = f"It claims {member.size} bytes; nothing behind it is read."
                        self._refuse(archive, member.name, problem)
                        return
                    if member.isdir():
                        continue
                    found = role_of(member.name[: NAME_LIMIT + 1])
                    if problem := _problem(member, found[0] if found else None):
                        self._refuse(archive, member.name, problem)
                    elif found is None:
                        self._pass_over(member.name)
                    else:
                        yield _Member(archive, member.name, member.offset_data, member.size), *found
                # A tarfile takes a damaged header behind the first for the end, which is a block of zeros or nothing.
                with open_file(archive) as file:
                    file.seek(tar.offset)
                    if any(file.read(tarfile.BLOCKSIZE)):
                        problem = f"Its header at byte {tar.offset} is damaged; nothing behind it is read."
                        self._refuse(archive, "", problem)
        except (OSError, tarfile.TarError) as error:
            self._refuse(archive, "", f"It cannot be read as a tar file: {error}.")

    def _pass_over(self, name: str) -> None:
        """Count a member of which nothing says what it is, under what its name ends with."""
        last = name.rpartition("/")[2]
        words = [part for part in last.split(".")[1:] if not part[:1].isdigit()]
        kind = "hidden files" if last.startswith(".") else ".".join(["*", *words])[:NAME_LIMIT]
        if kind not in self._unknown and len(self._unknown) >= _KINDS:
            kind = "others"
        self._unknown[kind] += 1
        self._examples.setdefault(kind, name[:NAME_LIMIT])

    def _item(self, archive: Path, key: str, sample: _Sample) -> Item:
        picture = sample["image", ""]
        row = self._row(sample.get(("row", "")))
        background = row.get("healthy_sha256") if row.get("background") == "real" else row.get("background")
        folders = picture.name.lower().split("/")[:-1]
        described = row.get("class") or row.get("label") or self._stated_class(sample.get(("class", "")))
        label = str(described or next((part for part in folders if part in CLASSES), "")).lower()
        columns = {name: row[name] for name in self._columns if name in row}
        if isinstance(number := columns.get(GROUP), int):
            # Parts of a merged dataset number their groups anew.
            part = self._folders.setdefault(archive.parent, len(self._folders))
            columns[GROUP] = f"part {part}, group {number}"
        patient = row.get("patient") or columns.get(GROUP) or (background if background != SYNTHETIC else None)

        def read() -> Opened:
            image = read_image(Path(picture.name), picture.read())
            if row.get("image_sha256") not in (None, image.sha256):
                raise InputError(f"{key}: its image is not the one that its row names.", fix=_WHOLE)
            masks = (part for (role, _), part in sample.items() if role == "mask")
            return _with_masks(image, ((Path(mask.name), mask.read()) for mask in masks))

        return Item(
            id=printable(key),
            file=printable(f"{archive.name}/{picture.name}"),
            image_class=label if label in CLASSES else UNKNOWN_CLASS,
            read=read,
            patient=None if patient is None else printable(str(patient)[:NAME_LIMIT]),
            background=None if background is None else printable(str(background)[:NAME_LIMIT]),
            columns=columns,
        )

    def _row(self, member: _Member | None) -> dict[str, Any]:
        if member is None:
            return {}
        try:
            row = parse_json(member.read(), member.name, nan=True)
        except (InputError, ValueError):
            row = None
        if isinstance(row, dict):
            return row
        self._refuse(member.archive, member.name, "It is no JSON object; its sample is read without it.")
        return {}

    def _stated_class(self, member: _Member | None) -> str | None:
        """The class that a ``.cls`` member names, or numbers as the registry does."""
        if member is None:
            return None
        text = "unreadable"
        with contextlib.suppress(InputError, ValueError):
            text = member.read().decode().strip().strip("\"'").lower()
            if re.fullmatch("[0-9]", text) and int(text) < len(CLASSES):
                self._numbered = True
                return CLASSES[int(text)]
        if text in CLASSES:
            return text
        self._strange[text] += 1
        return None

    def _refuse(self, archive: Path, name: str, problem: str) -> None:
        self._refused.append(Refusal(f"{archive.name}/{name[:NAME_LIMIT]}" if name else archive.name, problem, _WHOLE))


def _problem(member: tarfile.TarInfo, role: str | None) -> str:
    """What is wrong with a member, or nothing."""
    if len(member.name) > NAME_LIMIT:
        return f"Its name has {len(member.name)} characters; {NAME_LIMIT} are allowed."
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "It is no plain file."
    if role is not None and not 0 < member.size <= _LIMITS[role]:
        return f"It has {member.size} bytes; 1 to {_LIMITS[role]} are allowed."
    return ""
