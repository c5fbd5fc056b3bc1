"""The layout of BUSI (Al-Dhabyani et al., Data in Brief 28, 2020, 104863)."""

from __future__ import annotations

import re
from pathlib import Path

from busigen.data.images import is_image_name, natural_key
from busigen.data.records import Layout, Listing, Record
from busigen.registry import CLASSES

_IMAGE = re.compile(r"^(?P<class>[a-z]+) \(\d+\)$", re.IGNORECASE)
_MASK = re.compile(r"^(?P<stem>.+)_mask(_\d+)?$", re.IGNORECASE)


def find(folder: Path) -> Path | None:
    """The folder that holds the class folders: this one or one of its children."""
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return next((place for place in (folder, *children) if _holds_classes(place)), None)


def read(listing: Listing) -> None:
    """List every image of the class folders with all of its masks."""
    for name in CLASSES:
        place = listing.folder / name
        if place.is_dir():
            _read_class(listing, place)


def _read_class(listing: Listing, place: Path) -> None:
    files = sorted((path for path in place.iterdir() if path.is_file()), key=lambda path: natural_key(path.name))
    masks: dict[str, list[Path]] = {}
    for path in files:
        if match := _MASK.match(path.stem):
            masks.setdefault(match["stem"], []).append(path)
    images = [path for path in files if is_image_name(path.name)]
    for image in images:
        record = Record(
            id=f"busi/{image.stem}",
            image_class=place.name,
            source="busi",
            image=image,
            masks=tuple(masks.pop(image.stem, ())),
        )
        match = _IMAGE.match(image.stem)
        if match is None or match["class"].lower() != place.name:
            listing.refuse(
                image,
                f"The name is not of the form '{place.name} (N)'.",
                f"Rename it and its masks, or remove it from the {place.name} folder.",
            )
        else:
            listing.records.append(record)
    for stem, orphans in masks.items():
        for orphan in orphans:
            listing.refuse(orphan, f"There is no image '{stem}' for this mask.", "Restore it or remove the mask.")


def _holds_classes(folder: Path) -> bool:
    return any(
        (match := _IMAGE.match(path.stem)) is not None and match["class"].lower() == name and is_image_name(path.name)
        for name in CLASSES
        if (folder / name).is_dir()
        for path in (folder / name).iterdir()
    )


LAYOUT = Layout(
    name="BUSI",
    looks_like="folders normal, benign, malignant with 'benign (1).png' and 'benign (1)_mask.png'",
    find=find,
    read=read,
)
