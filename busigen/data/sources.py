"""The layouts of labelled folders that busigen reads, found by looking at the folder."""

from __future__ import annotations

from pathlib import Path

from busigen.data import busbra, busi, pairs
from busigen.data.records import Layout, Listing, Record, Refusal
from busigen.errors import InputError

__all__ = ["LAYOUTS", "Layout", "Listing", "Record", "Refusal", "read_source"]

LAYOUTS: tuple[Layout, ...] = (busbra.LAYOUT, busi.LAYOUT, pairs.LAYOUT)
"""Every layout, the most particular first: BUS-BRA's ``Images`` and ``Masks`` are pairs too."""


def read_source(folder: Path, *, unlabelled: bool = False) -> Listing:
    """List a labelled folder in whichever layout it has.

    Args:
        folder: The folder, or for BUSI also its parent.
        unlabelled: List images of ``images/`` and ``masks/`` that have no known class, too, as class ``unknown``.

    Returns:
        Its records in natural order, and the entries that are refused without opening an image.

    Raises:
        InputError: The folder is missing, unreadable or laid out in no way that busigen knows.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is a file, not a folder" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {problem}.", fix="Give the folder that holds the images and masks.")
    try:
        for layout in LAYOUTS:
            root = layout.find(folder)
            if root is not None:
                # A root given as "." has no name, and names are what the table records.
                listing = Listing(layout=layout.name, folder=root.resolve(), unlabelled=unlabelled)
                layout.read(listing)
                _refuse_namesakes(listing)
                return listing
    except OSError as error:
        raise InputError(f"{folder} cannot be read: {error}.", fix="Check the folder's permissions.") from error
    accepted = "; ".join(f"{layout.name}: {layout.looks_like}" for layout in LAYOUTS)
    raise InputError(f"{folder} has none of the layouts that are read.", fix=f"Arrange it as one of these. {accepted}.")


def _refuse_namesakes(listing: Listing) -> None:
    """Keep the first of the images that share an id, such as ``scan1.png`` and ``scan1.jpg``."""
    first: dict[str, Record] = {}
    for record in listing.records:
        if first.setdefault(record.id, record) is not record:
            twin = listing.relative(first[record.id].image)
            listing.refuse(record.image, f"It has the same name as {twin}.", "Rename it and its mask.")
    listing.records = list(first.values())
