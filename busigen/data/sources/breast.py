"""The layout of BrEaST (Pawlowska et al., Scientific Data 11, 2024, 148), its table saved as CSV."""

from __future__ import annotations

from pathlib import Path

from busigen.data.sources.csvfile import read_rows
from busigen.data.sources.files import Place, Tree, in_natural_order, name_key
from busigen.data.sources.masks import masks_beside
from busigen.data.sources.records import UNKNOWN_CLASS, Layout, Listing, Record
from busigen.errors import InputError
from busigen.registry import CLASSES

_WORD = "_tumor"
_OTHER = "_other"
_COLUMNS = ("Image_filename", "Classification")


def is_root(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether images lie beside their masks, named as BrEaST's are."""
    stems = {path.stem for path in place.images}
    return any(stem.endswith(_WORD) and stem.removesuffix(_WORD) in stems for stem in stems)


def read(listing: Listing) -> None:
    """List every image with the mask of its tumour, and its class by the table."""
    place = listing.tree.at(listing.folder)
    rows = {name_key(Path(row["Image_filename"] or "").stem): row for row in _rows(place)}
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


def _rows(place: Place) -> list[dict[str, str | None]]:
    """The rows of the first CSV file that has BrEaST's columns; none where there is no such file."""
    for name in place.others:
        if name.lower().endswith(".csv"):
            try:
                return read_rows(place.path / name, _COLUMNS)
            except InputError:
                continue  # Another table, of which nothing is known.
    return []


LAYOUT = Layout(
    name="BrEaST",
    looks_like="case001.png, case001_tumor.png and the table as CSV (Image_filename,Classification)",
    is_root=is_root,
    read=read,
)
