"""The layout of BUS-BRA (Gomez-Flores et al., Medical Physics, 2023)."""

from __future__ import annotations

from pathlib import Path

from busigen.data.sources.csvfile import read_rows
from busigen.data.sources.files import Place, Tree, images_below, natural_key
from busigen.data.sources.records import Layout, Listing, Record
from busigen.registry import LESION_CLASSES

_TABLE = "bus_data.csv"
_IMAGES, _MASKS = "Images", "Masks"


def is_root(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether this folder holds the table and both image folders; loosely, the table and the images."""
    return place.file(_TABLE) is not None and _child(place, _IMAGES) and (loose or _child(place, _MASKS))


def read(listing: Listing) -> None:
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
                [_mask(listing.folder, name)],
            )
        else:
            listing.records.append(_record(listing.folder, name, pathology, row))
        seen.add(name or "")
    for path in images_below(listing.tree, listing.folder / _IMAGES):
        if path.stem not in seen:
            masks = [_mask(listing.folder, path.stem)]
            listing.refuse(path, f"{_TABLE} has no row for it.", "Add the row or remove the image.", masks)


def _record(folder: Path, name: str, pathology: str, row: dict[str, str | None]) -> Record:
    return Record(
        id=f"busbra/{name}",
        image_class=pathology,
        source="busbra",
        image=folder / _IMAGES / f"{name}.png",
        masks=(_mask(folder, name),),
        patient=f"busbra/{row['Case']}" if row["Case"] else None,
        birads=row["BIRADS"],
    )


def _mask(folder: Path, name: str) -> Path:
    return folder / _MASKS / f"{name.replace('bus_', 'mask_', 1)}.png"


def _is_plain(name: str) -> bool:
    """Whether a name from the table stays inside the folder it is looked up in."""
    return Path(name).name == name and "\\" not in name and "\0" not in name


def _child(place: Place, name: str) -> bool:
    return any(folder.name == name for folder in place.folders)


LAYOUT = Layout(
    name="BUS-BRA",
    looks_like="Images/bus_0001-l.png, Masks/mask_0001-l.png and bus_data.csv",
    is_root=is_root,
    read=read,
)
