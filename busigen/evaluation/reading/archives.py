"""Listing the samples of WebDataset shards that may have come from anywhere; nothing in them is believed."""

from __future__ import annotations

import contextlib
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.images import ImageFile, read_image
from busigen.data.sources.files import SUFFIXES
from busigen.data.sources.records import UNKNOWN_CLASS, Refusal
from busigen.errors import InputError
from busigen.evaluation.reading.items import Item, read_files
from busigen.foreign import open_file
from busigen.records import parse_json
from busigen.registry import CLASSES
from busigen.runtime.dataset.reader import open_headers
from busigen.text import printable

MEMBER_LIMIT = 32 << 20
"""Largest image or mask in bytes that is read from an archive."""

ROW_LIMIT = 1 << 20
"""Largest JSON row in bytes that is read from an archive."""

NAME_LIMIT = 512
"""Longest member name in characters."""

CLASS_LIMIT = 64
"""Largest ``.cls`` in bytes that is read from an archive."""

_IMAGE = "image|images|img|imgs|input|inputs"
_MASK = "mask|masks|seg|segmentation|segmentations|label|labels|gt|groundtruth|ground_truth|annotation|annotations"
_WORD = re.compile(rf"(?P<key>.+)[._ -](?:(?P<image>{_IMAGE})|(?:{_MASK}|tumou?r|lesion)[._ -]?\d*)", re.I | re.S)
"""What a name without its ending says of its role: ``a.mask``, ``a_mask_1``, ``a_image``."""

_BEFORE = re.compile(r"(?:(?P<image>image|img|bus)|mask|seg|label|gt)[_-](?P<key>.+)", re.I | re.S)
"""The same where the word comes first, as in BUS-BRA's ``mask_0001-l`` of ``bus_0001-l``."""

_FOLDERS = re.compile(rf"(?P<image>{_IMAGE})|{_MASK}", re.I)
_TEXTS = {"json": "row", "cls": "class"}
_LIMITS = {"image": MEMBER_LIMIT, "mask": MEMBER_LIMIT, "row": ROW_LIMIT, "class": CLASS_LIMIT}
_KINDS, _KINDS_SHOWN = 64, 5
"""Kinds of members without a role that are told apart, and named."""

_WHOLE = "Get the archive again, or write it anew."


@dataclass(frozen=True)
class Part:
    """Where one member's bytes lie in its archive."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            InputError: the archive was cut short or cannot be read.
        """
        try:
            with open_file(self.archive) as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.archive} cannot be read: {error.strerror}.", fix="Check the file.") from error
        if len(data) != self.size:
            raise InputError(f"{self.archive.name}: {self.name} is cut short.", fix=_WHOLE)
        return data


@dataclass
class _Sample:
    """The members of one key: one of each role, and perhaps several masks."""

    archive: Path
    key: str
    parts: dict[str, Part] = field(default_factory=dict)
    masks: dict[str, Part] = field(default_factory=dict)

    def add(self, part: Part, role: str) -> bool:
        """Take a member in; False where there is one like it already."""
        taken, name = (self.masks, part.name) if role == "mask" else (self.parts, role)
        return taken.setdefault(name, part) is part


@dataclass
class _Guesses:
    """What was read off names alone, and what could not be."""

    unknown: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    numbered: bool = False
    strange: Counter[str] = field(default_factory=Counter)

    def pass_over(self, name: str) -> None:
        """Note a member of which nothing says what it is, under what its name ends with."""
        last = name.rpartition("/")[2]
        words = [part for part in last.split(".")[1:] if not part[:1].isdigit()]
        kind = "hidden files" if last.startswith(".") else ".".join(["*", *words])[:NAME_LIMIT]
        if kind not in self.unknown and len(self.unknown) >= _KINDS:
            kind = "others"
        self.unknown[kind] += 1
        self.examples.setdefault(kind, name[:NAME_LIMIT])

    def notes(self) -> list[str]:
        """What a report says of it, one line a kind."""
        notes = []
        if self.unknown:
            kinds = [
                f"{kind}: {count}, such as {self.examples[kind]}"
                for kind, count in self.unknown.most_common(_KINDS_SHOWN)
            ]
            more = len(self.unknown) - len(kinds)
            notes.append(
                f"{self.unknown.total()} members of shards are passed over, because nothing in their names says what "
                f"they are ({'; '.join(kinds)}{f'; and {more} more kinds' if more > 0 else ''})"
            )
        if self.numbered:
            numbers = ", ".join(f"{number} {label}" for number, label in enumerate(CLASSES))
            notes.append(f"the numbers in .cls members are read as {numbers}")
        if self.strange:
            text, _ = self.strange.most_common(1)[0]
            notes.append(f"{self.strange.total()} .cls members name no known class, most of them {text!r}")
        return [printable(note) for note in notes]


def list_archives(archives: Sequence[Path], refused: list[Refusal], notes: list[str] | None = None) -> list[Item]:
    """List every sample of some tar files by their headers alone.

    A sample is an image, ``<key>.image.png`` or ``<key>.png``, its masks, ``<key>.mask.png``, and perhaps
    ``<key>.json`` with ``class``, or ``<key>.cls`` with a class's name or number. The words for image and mask that
    people use are known, before a dot, an underscore, or as a folder. Members of which nothing says what they are, such
    as ``<key>.left.png``, are no images. Links, devices, sparse and oversized members are refused; names serve as names
    only, never as paths.
    """
    items: list[Item] = []
    guesses = _Guesses()
    for archive in archives:
        samples: dict[str, _Sample] = {}
        for part, role, key in _members(archive, refused, guesses):
            if not samples.setdefault(key, _Sample(archive, key)).add(part, role):
                refused.append(_refusal(archive, part.name, "It is a second one of its sample."))
        for sample in samples.values():
            if "image" in sample.parts:
                items.append(_item(sample, refused, guesses))
            else:
                refused.append(_refusal(archive, sample.key, "The sample has no image."))
    if notes is not None:
        notes.extend(guesses.notes())
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


def _members(archive: Path, refused: list[Refusal], guesses: _Guesses) -> Iterator[tuple[Part, str, str]]:
    """Every usable member with its role and its sample's key."""
    try:
        with open_headers(archive) as tar:
            while (member := tar.next()) is not None:
                # A negative size leads back to where the header lies: without this it would be read for ever.
                if member.size < 0 or tar.offset <= member.offset:
                    problem = f"It claims {member.size} bytes; nothing behind it is read."
                    refused.append(_refusal(archive, member.name, problem))
                    return
                if member.isdir():
                    continue
                found = role_of(member.name[: NAME_LIMIT + 1])
                problem = _problem(member, found[0] if found else None)
                if problem:
                    refused.append(_refusal(archive, member.name, problem))
                elif found is None:
                    guesses.pass_over(member.name)
                else:
                    yield Part(archive, member.name, member.offset_data, member.size), *found
            # A tarfile takes a damaged header behind the first for the end, which is a block of zeros or nothing.
            with open_file(archive) as file:
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):
                    problem = f"Its header at byte {tar.offset} is damaged; nothing behind it is read."
                    refused.append(_refusal(archive, "", problem))
    except (OSError, tarfile.TarError) as error:
        refused.append(_refusal(archive, "", f"It cannot be read as a tar file: {error}."))


def _problem(member: tarfile.TarInfo, role: str | None) -> str:
    """What is wrong with a member, or nothing."""
    if len(member.name) > NAME_LIMIT:
        return f"Its name has {len(member.name)} characters; {NAME_LIMIT} are allowed."
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "It is no plain file."
    if role is not None and not 0 < member.size <= _LIMITS[role]:
        return f"It has {member.size} bytes; 1 to {_LIMITS[role]} are allowed."
    return ""


def _item(sample: _Sample, refused: list[Refusal], guesses: _Guesses) -> Item:
    row = _row(sample, refused)
    background = row.get("healthy_sha256") if row.get("background") == "real" else row.get("background")
    described = row.get("class") or row.get("label") or _stated_class(sample, guesses)
    label = str(described or _class_of(sample.parts["image"].name)).lower()
    shared = background if background != "synthetic" else None
    patient = row.get("patient") or shared

    def read() -> tuple[ImageFile, NDArray[np.bool_], int]:
        data = sample.parts["image"].read()
        image = read_image(Path(sample.parts["image"].name), data)
        if row.get("image_sha256") not in (None, image.sha256):
            raise InputError(f"{sample.key}: its image is not the one that its row names.", fix=_WHOLE)
        return read_files(image, ((Path(mask.name), mask.read()) for mask in sample.masks.values()))

    return Item(
        id=printable(sample.key),
        file=printable(f"{sample.archive.name}/{sample.parts['image'].name}"),
        image_class=label if label in CLASSES else UNKNOWN_CLASS,
        read=read,
        patient=None if patient is None else printable(str(patient)[:NAME_LIMIT]),
        background=None if background is None else printable(str(background)[:NAME_LIMIT]),
    )


def _row(sample: _Sample, refused: list[Refusal]) -> dict[str, Any]:
    part = sample.parts.get("row")
    if part is None:
        return {}
    try:
        row = parse_json(part.read(), part.name, nan=True)
    except (InputError, ValueError):
        row = None
    if isinstance(row, dict):
        return row
    refused.append(_refusal(sample.archive, part.name, "It is no JSON object; its sample is read without it."))
    return {}


def _stated_class(sample: _Sample, guesses: _Guesses) -> str | None:
    """The class that a ``.cls`` member names, or numbers as the registry does."""
    part = sample.parts.get("class")
    if part is None:
        return None
    with contextlib.suppress(InputError, ValueError):
        text = part.read().decode().strip().strip("\"'").lower()
        if re.fullmatch("[0-9]", text) and int(text) < len(CLASSES):
            guesses.numbered = True
            return CLASSES[int(text)]
        if text in CLASSES:
            return text
        guesses.strange[text] += 1
        return None
    guesses.strange["unreadable"] += 1
    return None


def _class_of(key: str) -> str:
    return next((part for part in key.lower().split("/")[:-1] if part in CLASSES), "")


def _refusal(archive: Path, name: str, problem: str) -> Refusal:
    return Refusal(f"{archive.name}/{name[:NAME_LIMIT]}" if name else archive.name, problem, _WHOLE)
