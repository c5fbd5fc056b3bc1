"""The layout of BUS-BRA (Gomez-Flores et al., Medical Physics, 2023)."""

from __future__ import annotations

from pathlib import Path

from busigen.data.csvfile import read_rows
from busigen.data.images import find_images, natural_key
from busigen.data.records import Layout, Listing, Record
from busigen.registry import LESION_CLASSES

_TABLE = "bus_data.csv"


def find(folder: Path) -> Path | None:
    """The folder with the table and both image folders: this one or one of its children."""
    children = sorted(child for child in folder.iterdir() if child.is_dir() and not child.name.startswith("."))
    return next((place for place in (folder, *children) if _is_busbra(place)), None)


def read(listing: Listing) -> None:
    """List every row of the table; images without a row and rows without a known class are refused."""
    table = listing.folder / _TABLE
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
                listing.folder / "Images" / f"{name}.png",
                f"Its Pathology is {row['Pathology']!r}.",
                f"Set it to one of {', '.join(LESION_CLASSES)}.",
            )
        else:
            listing.records.append(_record(listing.folder, name, pathology, row))
        seen.add(name or "")
    for path in find_images(listing.folder / "Images"):
        if path.stem not in seen:
            listing.refuse(path, f"{_TABLE} has no row for it.", "Add the row or remove the image.")


def mask_name(name: str) -> str:
    """The name of an image's mask, both without their ending: ``mask_0001-l`` is that of ``bus_0001-l``."""
    return name.replace("bus_", "mask_", 1)


def _record(folder: Path, name: str, pathology: str, row: dict[str, str | None]) -> Record:
    return Record(
        id=f"busbra/{name}",
        image_class=pathology,
        source="busbra",
        image=folder / "Images" / f"{name}.png",
        masks=(folder / "Masks" / f"{mask_name(name)}.png",),
        patient=f"busbra/{row['Case']}" if row["Case"] else None,
        birads=row["BIRADS"],
    )


def _is_plain(name: str) -> bool:
    """Whether a name from the table stays inside the folder it is looked up in."""
    return Path(name).name == name and "\\" not in name and "\0" not in name


def _is_busbra(folder: Path) -> bool:
    return (folder / _TABLE).is_file() and (folder / "Images").is_dir() and (folder / "Masks").is_dir()


LAYOUT = Layout(
    name="BUS-BRA",
    looks_like="Images/bus_0001-l.png, Masks/mask_0001-l.png and bus_data.csv",
    find=find,
    read=read,
)
