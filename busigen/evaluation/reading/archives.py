"""Listing the samples of WebDataset shards that may have come from anywhere; nothing in them is believed."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.images import ImageFile, read_image, read_mask
from busigen.data.records import UNKNOWN_CLASS, Refusal
from busigen.errors import InputError
from busigen.evaluation.reading.items import Item
from busigen.foreign import open_file
from busigen.registry import CLASSES
from busigen.runtime.tar_headers import open_headers
from busigen.text import printable

MEMBER_LIMIT = 32 << 20
"""Largest image or mask in bytes that is read from an archive."""

ROW_LIMIT = 1 << 20
"""Largest JSON row in bytes that is read from an archive."""

NAME_LIMIT = 512
"""Longest member name in characters."""

_ROLES = {
    **{f"{prefix}{kind}": "image" for prefix in ("image.", "input.", "") for kind in ("png", "jpg", "jpeg", "bmp")},
    **{f"{prefix}{kind}": "mask" for prefix in ("mask.", "seg.", "label.") for kind in ("png", "bmp")},
    "json": "row",
}
"""What a member is, by its name from the first dot on."""

_LIMITS = {"image": MEMBER_LIMIT, "mask": MEMBER_LIMIT, "row": ROW_LIMIT}
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
    """The members of one key."""

    archive: Path
    key: str
    parts: dict[str, Part] = field(default_factory=dict)


def list_archives(archives: Sequence[Path], refused: list[Refusal]) -> list[Item]:
    """List every sample of some tar files by their headers alone.

    A sample is ``<key>.image.png`` or ``<key>.png`` (or JPEG, BMP), ``<key>.mask.png`` and perhaps ``<key>.json`` with
    ``class``. Links, devices, sparse and oversized members are refused; names serve as names only, never as paths.

    Args:
        archives: Uncompressed tar files.
        refused: Gets what is left out.
    """
    items: list[Item] = []
    for archive in archives:
        samples: dict[str, _Sample] = {}
        for part, role, key in _members(archive, refused):
            sample = samples.setdefault(key, _Sample(archive, key))
            if role in sample.parts:
                refused.append(_refusal(archive, part.name, "It is a second one of its sample."))
            else:
                sample.parts[role] = part
        for sample in samples.values():
            if "image" in sample.parts:
                items.append(_item(sample, refused))
            else:
                refused.append(_refusal(archive, sample.key, "The sample has no image."))
    return items


def _members(archive: Path, refused: list[Refusal]) -> Iterator[tuple[Part, str, str]]:
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
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                role = _ROLES.get(suffix.lower())
                problem = _problem(member, role)
                if problem:
                    refused.append(_refusal(archive, member.name, problem))
                elif role is not None and stem:
                    key = f"{folder}/{stem}" if folder else stem
                    yield Part(archive, member.name, member.offset_data, member.size), role, key
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


def _item(sample: _Sample, refused: list[Refusal]) -> Item:
    row = _row(sample, refused)
    background = row.get("healthy_sha256") if row.get("background") == "real" else row.get("background")
    label = str(row.get("class") or row.get("label") or _class_of(sample.key)).lower()
    shared = background if background != "synthetic" else None
    patient = row.get("patient") or shared

    def read() -> tuple[ImageFile, NDArray[np.bool_], int]:
        data = sample.parts["image"].read()
        image = read_image(Path(sample.parts["image"].name), data)
        if row.get("image_sha256") not in (None, image.sha256):
            raise InputError(f"{sample.key}: its image is not the one that its row names.", fix=_WHOLE)
        if "mask" not in sample.parts:
            return image, np.zeros(image.pixels.shape, np.bool_), 0
        mask = sample.parts["mask"]
        return image, read_mask(Path(mask.name), (image.width, image.height), mask.read()), 1

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
        row = json.loads(part.read())
    except (InputError, ValueError, RecursionError):
        row = None
    if isinstance(row, dict):
        return row
    refused.append(_refusal(sample.archive, part.name, "It is no JSON object; its sample is read without it."))
    return {}


def _class_of(key: str) -> str:
    return next((part for part in key.lower().split("/")[:-1] if part in CLASSES), "")


def _refusal(archive: Path, name: str, problem: str) -> Refusal:
    return Refusal(f"{archive.name}/{name[:NAME_LIMIT]}" if name else archive.name, problem, _WHOLE)
