"""The layouts of published sets.

BUSI (Al-Dhabyani et al., Data in Brief 28, 2020, 104863), BUS-BRA (Gomez-Flores et al., Medical Physics, 2023), and
BrEaST (Pawlowska et al., Scientific Data 11, 2024, 148), its table saved as CSV.
"""

from __future__ import annotations

import re
from pathlib import Path

from busigen.data.sources.files import Place, Tree, images_below, in_natural_order, is_image_name, name_key, natural_key
from busigen.data.sources.masks import masks_beside
from busigen.data.sources.records import UNKNOWN_CLASS, Layout, Listing, Record, read_rows
from busigen.errors import InputError
from busigen.registry import CLASSES, LESION_CLASSES

_BUSI_IMAGE = re.compile(r"^(?P<class>[a-z]+) \(\d+\)$", re.IGNORECASE)


def _is_busi(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether this folder holds the class folders."""
    return any(
        _is_busi_image(path, name) and is_image_name(path.name)
        for name, folder in _class_folders(place)
        for path in tree.at(folder).images
    )


def _read_busi(listing: Listing) -> None:
    """List every image of the class folders with all of its masks."""
    for name, folder in _class_folders(listing.tree.at(listing.folder)):
        _read_class_folder(listing, name, listing.tree.at(folder))


def _read_class_folder(listing: Listing, name: str, place: Place) -> None:
    files, images = masks_beside(place)
    for image, match in images.items():
        if match.rivals or not (listing.loose or _is_busi_image(image, name)):
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


def _is_busi_image(image: Path, name: str) -> bool:
    match = _BUSI_IMAGE.match(image.stem)
    return match is not None and match["class"].lower() == name


BUSI = Layout(
    name="BUSI",
    looks_like="folders normal, benign, malignant with 'benign (1).png' and 'benign (1)_mask.png'",
    is_root=_is_busi,
    read=_read_busi,
)

_TABLE = "bus_data.csv"
_IMAGES, _MASKS = "Images", "Masks"


def _is_busbra(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether this folder holds the table and both image folders; loosely, the table and the images."""
    return place.file(_TABLE) is not None and _has_folder(place, _IMAGES) and (loose or _has_folder(place, _MASKS))


def _read_busbra(listing: Listing) -> None:
    """List every row of the table; images without a row and rows without a known class are refused."""
    table = listing.tree.at(listing.folder).file(_TABLE) or listing.folder / _TABLE
    rows = read_rows(table, ("ID", "Case", "Pathology", "BIRADS"))
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: natural_key(row["ID"] or "")):
        name, pathology = row["ID"], (row["Pathology"] or "").lower()
        if name is None or not _is_plain(name):
            listing.refuse(table, f"The ID {name!r} is no file name.", "Give each row its image's name without '.png'.")
        elif name in seen:
            listing.refuse(table, f"The ID {name!r} stands in two rows.", "Keep the right one of them.")
        elif pathology not in LESION_CLASSES:
            listing.refuse(
                listing.folder / _IMAGES / f"{name}.png",
                f"Its Pathology is {row['Pathology']!r}.",
                f"Set it to one of {', '.join(LESION_CLASSES)}.",
                [_busbra_mask(listing.folder, name)],
            )
        else:
            listing.records.append(_busbra_record(listing.folder, name, pathology, row))
        seen.add(name or "")
    for path in images_below(listing.tree, listing.folder / _IMAGES):
        if path.stem not in seen:
            masks = [_busbra_mask(listing.folder, path.stem)]
            listing.refuse(path, f"{_TABLE} has no row for it.", "Add the row or remove the image.", masks)


def _busbra_record(folder: Path, name: str, pathology: str, row: dict[str, str | None]) -> Record:
    return Record(
        id=f"busbra/{name}",
        image_class=pathology,
        source="busbra",
        image=folder / _IMAGES / f"{name}.png",
        masks=(_busbra_mask(folder, name),),
        patient=f"busbra/{row['Case']}" if row["Case"] else None,
        birads=row["BIRADS"],
    )


def _busbra_mask(folder: Path, name: str) -> Path:
    return folder / _MASKS / f"{name.replace('bus_', 'mask_', 1)}.png"


def _is_plain(name: str) -> bool:
    """Whether a name from the table stays inside the folder it is looked up in."""
    return Path(name).name == name and "\\" not in name and "\0" not in name


def _has_folder(place: Place, name: str) -> bool:
    return any(folder.name == name for folder in place.folders)


BUSBRA = Layout(
    name="BUS-BRA",
    looks_like="Images/bus_0001-l.png, Masks/mask_0001-l.png and bus_data.csv",
    is_root=_is_busbra,
    read=_read_busbra,
)

_TUMOR, _OTHER = "_tumor", "_other"
_COLUMNS = ("Image_filename", "Classification")


def _is_breast(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether images lie beside their masks, named as BrEaST's are."""
    stems = {path.stem for path in place.images}
    return any(stem.endswith(_TUMOR) and stem.removesuffix(_TUMOR) in stems for stem in stems)


def _read_breast(listing: Listing) -> None:
    """List every image with the mask of its tumour, and its class by the table."""
    place = listing.tree.at(listing.folder)
    rows = {name_key(Path(row["Image_filename"] or "").stem): row for row in _breast_rows(place)}
    _, images = masks_beside(place)
    other = {path for path in images if path.stem.rstrip("0123456789").endswith(_OTHER)}
    without: list[Path] = []
    for image in in_natural_order(images.keys() - other, listing.folder):
        row = rows.get(name_key(image.stem), {})
        image_class = (row.get("Classification") or "").lower()
        if image_class not in CLASSES and not listing.unlabelled:
            without.append(image)
            continue
        listing.records.append(
            Record(
                id=f"breast/{image.stem}",
                image_class=image_class if image_class in CLASSES else UNKNOWN_CLASS,
                source="breast",
                image=image,
                masks=images[image].masks,
                patient=f"breast/{row['CaseID']}" if row.get("CaseID") else None,
                birads=row.get("BIRADS"),
            )
        )
    listing.refuse_all(
        without,
        "No table gives their class.",
        "Save the sheet of BrEaST's .xlsx file as a CSV file beside the images, with its columns Image_filename and "
        "Classification.",
        [mask for image in without for mask in images[image].masks],
    )
    listing.note(in_natural_order(other, listing.folder), "masks of other structures than the tumour, passed over")


def _breast_rows(place: Place) -> list[dict[str, str | None]]:
    """The rows of the first CSV file that has BrEaST's columns; none where there is no such file."""
    for name in place.others:
        if name.lower().endswith(".csv"):
            try:
                return read_rows(place.path / name, _COLUMNS)
            except InputError:
                continue  # Another table, of which nothing is known.
    return []


BREAST = Layout(
    name="BrEaST",
    looks_like="case001.png, case001_tumor.png and the table as CSV (Image_filename,Classification)",
    is_root=_is_breast,
    read=_read_breast,
)
