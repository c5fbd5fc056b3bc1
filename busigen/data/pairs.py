"""The plain layout: a folder of images, a folder of masks, and classes from folder names or a table."""

from __future__ import annotations

from pathlib import Path

from busigen.data.csvfile import CONTRADICTION, by_file, read_rows
from busigen.data.images import SUFFIXES, find_images
from busigen.data.masks import masks_by_name
from busigen.data.records import UNKNOWN_CLASS, Layout, Listing, Record, counted
from busigen.registry import CLASSES
from busigen.text import printable

_TABLE = "labels.csv"


def find(folder: Path) -> Path | None:
    """This folder if it has both an image and a mask folder."""
    return folder if _child(folder, "images") and _child(folder, "masks") else None


def read(listing: Listing) -> None:
    """List every image with the masks of the same name; those without a known class are refused, unless they may be."""
    images, masks = _child(listing.folder, "images"), _child(listing.folder, "masks")
    if images is None or masks is None:  # The folder changed since `find`.
        return
    labels = _labels(listing)
    by_name = masks_by_name(masks)
    source = printable(listing.folder.name)
    found = find_images(images)
    known = {n for image in found for n in (image.stem, image.relative_to(images).with_suffix("").as_posix())}
    absent = [row["file"] or "" for name, row in labels.items() if name not in known]
    if absent:
        listing.notes.append(counted(f"rows of {_TABLE} have no image", absent))
    for image in found:
        name = image.relative_to(images).with_suffix("").as_posix()
        row = labels.get(name) or labels.get(image.stem) or {}
        if (contradiction := row.get(CONTRADICTION)) is not None:
            listing.refuse(image, f"{_TABLE} has two rows for it: {contradiction}.", "Keep the right one of them.")
            continue
        image_class = (row.get("class") or _class_from_folder(image.relative_to(images))).lower()
        if image_class not in CLASSES and listing.unlabelled:
            image_class = UNKNOWN_CLASS
        elif image_class not in CLASSES:
            listing.refuse(
                image,
                f"Its class is {image_class or 'unknown'!r}.",
                f"Put it into images/<class>/ or name it in {_TABLE} (columns file,class); "
                f"classes are {', '.join(CLASSES)}.",
            )
            continue
        patient = row.get("patient")
        listing.records.append(
            Record(
                id=printable(f"{source}/{name}"),
                image_class=image_class,
                source=source,
                image=image,
                masks=tuple(by_name.get(name) or by_name.get(image.stem) or ()),
                patient=f"{source}/{patient}" if patient else None,
                birads=row.get("birads"),
            )
        )


def _labels(listing: Listing) -> dict[str, dict[str, str | None]]:
    """Rows of the table by image name without folder ``images`` and ending; empty where there is no table."""
    table = listing.folder / _TABLE
    if not table.is_file():
        return {}
    return by_file(read_rows(table, ("file", "class")), _plain_name)


def _plain_name(file: str) -> str:
    path = Path(file.replace("\\", "/"))
    path = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    parts = path.parts[1:] if path.parts and path.parts[0].lower() == "images" else path.parts
    return "/".join(parts)


def _class_from_folder(image: Path) -> str:
    return next((part.lower() for part in image.parts[:-1] if part.lower() in CLASSES), "")


def _child(folder: Path, name: str) -> Path | None:
    return next((path for path in sorted(folder.iterdir()) if path.name.lower() == name and path.is_dir()), None)


LAYOUT = Layout(
    name="pairs",
    looks_like="images/ and masks/ with the same file names, classes from images/<class>/ or labels.csv (file,class)",
    find=find,
    read=read,
)
