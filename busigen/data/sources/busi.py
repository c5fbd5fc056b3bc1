"""The layout of BUSI (Al-Dhabyani et al., Data in Brief 28, 2020, 104863)."""

from __future__ import annotations

import re
from pathlib import Path

from busigen.data.sources.files import Place, Tree, is_image_name, name_key
from busigen.data.sources.masks import masks_beside
from busigen.data.sources.records import Layout, Listing, Record
from busigen.registry import CLASSES

_IMAGE = re.compile(r"^(?P<class>[a-z]+) \(\d+\)$", re.IGNORECASE)


def is_root(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether this folder holds the class folders."""
    return any(
        _is_named(path, name) and is_image_name(path.name)
        for name, folder in _class_folders(place)
        for path in tree.at(folder).images
    )


def read(listing: Listing) -> None:
    """List every image of the class folders with all of its masks."""
    for name, folder in _class_folders(listing.tree.at(listing.folder)):
        _read_class(listing, name, listing.tree.at(folder))


def _read_class(listing: Listing, name: str, place: Place) -> None:
    files, images = masks_beside(place)
    for image, match in images.items():
        if match.rivals or not (listing.loose or _is_named(image, name)):
            listing.refuse(
                image,
                f"The name is not of the form '{name} (N)'.",
                f"Rename it and its masks, or remove it from the {name} folder.",
                (*match.masks, *match.rivals),
            )
            continue
        listing.records.append(
            Record(id=f"busi/{image.stem}", image_class=name, source="busi", image=image, masks=match.masks)
        )
    for orphan in files.unused:
        if not files.belongs(orphan):
            listing.refuse(orphan, "There is no image of this mask's name.", "Restore it or remove the mask.")


def _class_folders(place: Place) -> list[tuple[str, Path]]:
    return [(name, folder) for name in CLASSES for folder in place.folders if name_key(folder.name) == name]


def _is_named(image: Path, name: str) -> bool:
    match = _IMAGE.match(image.stem)
    return match is not None and match["class"].lower() == name


LAYOUT = Layout(
    name="BUSI",
    looks_like="folders normal, benign, malignant with 'benign (1).png' and 'benign (1)_mask.png'",
    is_root=is_root,
    read=read,
)
