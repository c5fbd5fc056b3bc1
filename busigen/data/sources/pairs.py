"""The plain layouts: a folder of images, a folder of masks, and classes from folder names or a table."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

from busigen.data.sources.files import SUFFIXES, Place, Tree, images_below, is_mask_folder, name_key
from busigen.data.sources.masks import MaskFiles, masks_below
from busigen.data.sources.records import (
    CONTRADICTION,
    UNKNOWN_CLASS,
    Layout,
    Listing,
    Record,
    by_file,
    counted,
    named,
    read_rows,
)
from busigen.registry import CLASSES
from busigen.text import printable

_TABLE = "labels.csv"
_IMAGES_OR_MASKS = re.compile(r"(.*[\W_])?(image|mask)s?", re.IGNORECASE)
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_CHANNEL = re.compile(r"_0000$")

Halves = Callable[[Place, bool], list[tuple[Path, list[Path]]]]
"""Gives the folders of images in a place, each with its folders of masks; loosely also images without any masks."""


def _of_words(place: Place, loose: bool) -> list[tuple[Path, list[Path]]]:
    """``images`` and ``masks``, also with the same words before them, as in ``USG Images`` and ``USG Masks``."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    for folder in place.folders:
        if match := _IMAGES_OR_MASKS.fullmatch(folder.name):
            kinds.setdefault((name_key(match[1] or ""), match[2].lower()), []).append(folder)
    table = loose and place.file(_TABLE) is not None
    return [
        (images, kinds.get((words, "mask"), []))
        for (words, kind), folders in kinds.items()
        for images in folders
        if kind == "image" and (table or (words, "mask") in kinds)
    ]


def _beside(place: Place, loose: bool) -> list[tuple[Path, list[Path]]]:
    """Folders of masks, or a table, beside images that lie in no folder of their own."""
    masks = [folder for folder in place.folders if is_mask_folder(folder.name)]
    return [(place.path, masks)] if masks or place.file(_TABLE) else []


def _of_names(names: dict[str, str], place: Place, loose: bool) -> list[tuple[Path, list[Path]]]:
    """Folders of images and of masks that have these names, given in lower case."""
    folders = {name_key(folder.name): folder for folder in place.folders}
    return [(folders[one], [folders[other]]) for one, other in names.items() if one in folders and other in folders]


_of_udiat = partial(_of_names, {"original": "gt"})
_of_nnunet = partial(_of_names, {"imagestr": "labelstr", "imagests": "labelsts"})


def _own_name(image: Path) -> str:
    return image.stem


def _without_channel(image: Path) -> str:
    return _CHANNEL.sub("", image.stem)


def _is_root(halves: Halves, _tree: Tree, place: Place, loose: bool) -> bool:
    return bool(halves(place, loose))


def _read(halves: Halves, stem: Callable[[Path], str], listing: Listing) -> None:
    """List every image with its masks; those without a known class are refused, unless they may be."""
    labels = _labels(listing)
    used: set[str] = set()
    stems: set[str] = set()
    for images, masks in halves(listing.tree.at(listing.folder), listing.loose):
        found = images_below(listing.tree, images)
        files = MaskFiles(stem)
        files.add_images(found, images)
        for folder in masks:
            files.add_masks(masks_below(listing.tree, folder), folder)
        stems.update(name_key(image.stem) for image in found)
        used |= _list(listing, images, found, files, labels)
        _note_unused_masks(listing, files)
    for several, what in ((False, "have no image"), (True, "name several images, and are used for none")):
        if rows := [row["file"] or "" for key, row in labels.items() if key not in used and (key in stems) is several]:
            listing.notes.append(counted(f"rows of {_TABLE} {what}", rows))


def _list(
    listing: Listing, folder: Path, images: list[Path], files: MaskFiles, labels: dict[str, dict[str, str | None]]
) -> set[str]:
    """List the images of one folder; returns the keys of the rows that they have."""
    place = listing.folder
    # Parts of the set that was given are one source: a patient may be in several of them.
    part = place.name.lower() in _PARTS and place != listing.tree.root
    source = printable((place.parent if part else place).name)
    times = Counter(name_key(image.stem) for image in images)
    guessed: list[Path] = []
    rows: set[str] = set()
    for image in images:
        name = image.relative_to(folder).with_suffix("").as_posix()
        # As with masks: a name without its folders serves only where no other image has it.
        bare = name_key(image.stem)
        key = bare if name_key(name) not in labels and times[bare] == 1 else name_key(name)
        row = labels.get(key, {})
        rows.add(key)
        match = files.of(image, folder)
        if (contradiction := row.get(CONTRADICTION)) is not None:
            problem = f"{_TABLE} has two rows for it: {contradiction}."
            listing.refuse(image, problem, "Keep the right one of them.", match.masks)
            continue
        image_class = (row.get("class") or _class_from_folder(image.relative_to(folder))).lower()
        if image_class not in CLASSES and listing.unlabelled:
            image_class = UNKNOWN_CLASS
        elif image_class not in CLASSES:
            listing.refuse(
                image,
                f"Its class is {image_class or 'unknown'!r}.",
                f"Put it into {folder.name}/<class>/ or name it in {_TABLE} (columns file,class); "
                f"classes are {', '.join(CLASSES)}.",
                match.masks,
            )
            continue
        if match.rivals:
            rivals = named(path.relative_to(place).as_posix() for path in match.rivals)
            listing.refuse(
                image,
                f"Nobody can tell which mask is its own, by name: {rivals}.",
                "Put masks into folders like the images', or give each image a name of its own.",
                match.rivals,
            )
            continue
        guessed.extend([image] if match.guessed else [])
        patient = row.get("patient")
        listing.records.append(
            Record(
                id=printable(f"{source}/{name}"),
                image_class=image_class,
                source=source,
                image=image,
                masks=match.masks,
                patient=f"{source}/{patient}" if patient else None,
                birads=row.get("birads"),
            )
        )
    listing.note(guessed, "joined by name alone to a mask in a folder of another name")
    return rows


def _note_unused_masks(listing: Listing, files: MaskFiles) -> None:
    """Say which masks no image has."""
    other = [path for path in files.unused if files.belongs(path)]
    listing.note(other, "masks passed over, whose image has another one or lies in another folder")
    nobodys = [path for path in files.unused if not files.belongs(path)]
    listing.refuse_all(nobodys, "No image has the name that the mask's name says.", "Restore it, or remove the mask.")


def _labels(listing: Listing) -> dict[str, dict[str, str | None]]:
    """Rows of the table by key of the image's name without folder ``images`` and ending; empty if there is none."""
    table = listing.tree.at(listing.folder).file(_TABLE)
    if table is None:
        return {}
    return by_file(read_rows(table, ("file", "class")), lambda file: name_key(_plain_name(file)))


def _plain_name(file: str) -> str:
    path = Path(file.replace("\\", "/"))
    path = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    parts = path.parts[1:] if path.parts and path.parts[0].lower() == "images" else path.parts
    return "/".join(parts)


def _class_from_folder(image: Path) -> str:
    return next((part.lower() for part in image.parts[:-1] if part.lower() in CLASSES), "")


def _layout(name: str, looks_like: str, halves: Halves, stem: Callable[[Path], str] = _own_name) -> Layout:
    return Layout(name, looks_like, partial(_is_root, halves), partial(_read, halves, stem))


LAYOUT = _layout(
    "pairs",
    "images/ and masks/ with the same file names, classes from images/<class>/ or labels.csv (file,class)",
    _of_words,
)
UDIAT = _layout("UDIAT", "original/ and GT/, classes as for pairs", _of_udiat)
NNUNET = _layout(
    "nnU-Net", "imagesTr/X_0000.png and labelsTr/X.png, classes as for pairs", _of_nnunet, _without_channel
)
BESIDE = _layout("images", "images with masks/ or labels.csv beside them", _beside)
"""Only for folders of healthy images: what has masks is none."""


def images_of(place: Place) -> list[Path]:
    """The folders of images in a place whose masks lie beside them."""
    return [images for halves in (_of_words, _of_udiat, _of_nnunet) for images, _ in halves(place, False)]
