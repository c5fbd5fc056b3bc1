"""The layouts of labelled folders that busigen reads, found by looking at the folder.

`read_source` lists labelled sets, for preparing and judging; `read_images` lists any images with what is known of them,
for folders of healthy ones. Both look at the same files, through the same layouts.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from busigen.data import breast, busbra, busi, pairs
from busigen.data.files import Place, Tree, is_mask_folder, natural_key
from busigen.data.masks import masks_beside
from busigen.data.records import UNKNOWN_CLASS, Layout, Listing, Record, Refusal, named
from busigen.errors import InputError
from busigen.registry import CLASSES, LESION_CLASSES

__all__ = ["LAYOUTS", "Layout", "Listing", "Record", "Refusal", "UnknownLayoutError", "read_images", "read_source"]

LAYOUTS: tuple[Layout, ...] = (
    busbra.LAYOUT,
    pairs.LAYOUT,
    pairs.UDIAT,
    pairs.NNUNET,
    busi.LAYOUT,
    breast.LAYOUT,
)
"""Every layout. BUS-BRA comes before pairs, whose ``images`` and ``masks`` it has, too; and pairs before BUSI, whose
file names they may have."""

_ABOVE = 4
"""Folders above one of healthy images in which its set's masks and table are looked for."""

_WORDS = re.compile(r"[^\W\d_]+")


class UnknownLayoutError(InputError):
    """A folder is laid out in no way that busigen knows."""


def read_source(folder: Path, *, unlabelled: bool = False) -> Listing:
    """List a labelled folder in whichever layout it has.

    Args:
        folder: A set's folder, or one that holds sets at any depth; all of them are listed then.
        unlabelled: List images that have no known class, too, as class ``unknown``.

    Returns:
        Its records in natural order, what is refused without opening an image, and what else was passed over, joined
        or guessed.

    Raises:
        InputError: The folder is missing, unreadable or laid out in no way that busigen knows.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        problem = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{folder} {problem}.", fix="Give the folder that holds the images and masks.")
    # A root given as "." has no name, and names are what the table records.
    tree = Tree(Path(os.path.realpath(folder)))
    _refuse_half(folder, tree.root)
    sets = list(_sets(tree, unlabelled=unlabelled))
    if not sets:
        accepted = "; ".join(f"{layout.name}: {layout.looks_like}" for layout in LAYOUTS)
        raise UnknownLayoutError(
            f"{folder} has none of the layouts that are read; it holds {tree.found()}.",
            fix=f"Arrange it as one of these. {accepted}.",
        )
    for one in sets:
        _refuse_namesakes(one)
    listing = sets[0] if len(sets) == 1 else _joined(tree, sets)
    _tell(listing, sets)
    return listing


def read_images(folder: Path, *, skip: Path | None = None) -> Listing:
    """List every image below a folder, whatever its layout, with the class and the masks that anything there names.

    The folder may also lie within a set, as ``normal`` does in BUSI's: the set's masks and its table count, too.

    Args:
        folder: The folder.
        skip: A folder below that is passed over.

    Returns:
        Its records in natural order, whose paths begin with ``folder``, of class ``unknown`` where nothing says one;
        what was passed over; and which images are doubtful, and why.

    Raises:
        InputError: The folder cannot be read, or a table of its set cannot.
    """
    tree = Tree(folder, skip)
    listing = Listing("images", folder, tree, unlabelled=True, loose=True)
    here = Path(os.path.realpath(folder))
    said: dict[Path, list[Record]] = {}
    for part in (*_set_above(here), *_sets(tree, unlabelled=True, loose=True)):
        # A set above was looked at by the folder's real name.
        root = folder if part.tree is tree else here
        for record in part.records:
            if record.image.is_relative_to(root):
                said.setdefault(folder / record.image.relative_to(root), []).append(record)
        for path, problem in part.doubtful.items():
            if path.is_relative_to(root):
                listing.doubtful[folder / path.relative_to(root)] = problem
    masks: list[Path] = []
    for place in tree.below():
        if any(is_mask_folder(name) for name in place.path.relative_to(folder).parts):
            masks.extend(place.images)
            continue
        files, images = masks_beside(place)
        masks.extend(files.all)
        for image, match in images.items():
            if match.rivals:
                listing.doubtful[image] = "Nobody can tell which of several masks is its own."
            listing.records.append(_whatever_is_said(image, folder, said.get(image, ()), match.masks))
    listing.records.sort(key=lambda record: natural_key(record.id))
    listing.refused.extend(tree.refused())
    listing.notes.extend(tree.notes())
    marking = {mask for record in listing.records for mask in record.masks}
    listing.note([path for path in masks if path not in marking], "files are masks by name, but of no image here")
    return listing


def _sets(tree: Tree, *, unlabelled: bool, loose: bool = False) -> Iterator[Listing]:
    """The sets below a folder; loosely also those that lack masks, and sets within sets."""
    layouts = (*LAYOUTS, pairs.BESIDE) if loose else LAYOUTS
    waiting = [tree.root]
    while waiting:
        place = tree.at(waiting.pop())
        layout = _layout_of(tree, place, layouts, loose=loose)
        if layout is not None:
            listing = Listing(layout.name, place.path, tree, unlabelled=unlabelled, loose=loose)
            layout.read(listing)
            yield listing
        if layout is None or loose:
            waiting.extend(reversed(place.folders))


def _layout_of(tree: Tree, place: Place, layouts: Iterable[Layout], *, loose: bool) -> Layout | None:
    return next((layout for layout in layouts if layout.is_root(tree, place, loose)), None)


def _set_above(folder: Path) -> Iterator[Listing]:
    """The set that a folder is a part of, if there is one near above it."""
    for above in folder.parents[:_ABOVE]:
        tree = Tree(above)
        try:
            layout = _layout_of(tree, tree.at(above), LAYOUTS, loose=True)
        except InputError:  # There is nothing above that busigen may look at.
            return
        if layout is not None:
            listing = Listing(layout.name, above, tree, unlabelled=True, loose=True)
            layout.read(listing)
            yield listing
            return


def _whatever_is_said(image: Path, folder: Path, said: Iterable[Record], masks: Iterable[Path]) -> Record:
    """An image with the masks of all that lists it, and the worst class."""
    inside = image.relative_to(folder)
    classes = {record.image_class for record in said}
    for name in (Path(os.path.realpath(folder)).name, *inside.with_suffix("").parts):
        words = {word.lower() for word in _WORDS.findall(name)} & set(CLASSES)
        # "benign or normal" says nothing.
        classes.update(words if len(words) == 1 else ())
    lesion = next((name for name in LESION_CLASSES if name in classes), None)
    known = "normal" if "normal" in classes else UNKNOWN_CLASS
    found = (*masks, *(mask for record in said for mask in record.masks if mask.is_file()))
    return Record(
        id=inside.as_posix(), image_class=lesion or known, source=folder.name, image=image, masks=_once(found)
    )


def _once(paths: Iterable[Path]) -> tuple[Path, ...]:
    return tuple({os.path.realpath(path): path for path in paths}.values())


def _refuse_half(given: Path, folder: Path) -> None:
    """Refuse the folder of images alone of a set, whose masks would all be missed."""
    try:
        place = Tree(folder.parent).at(folder.parent)
    except InputError:
        return
    if folder in pairs.images_of(place):
        raise InputError(
            f"{given} holds the images of a set whose masks lie beside it.", fix=f"Give the set: {folder.parent}."
        )


def _joined(tree: Tree, sets: list[Listing]) -> Listing:
    """Several sets as one listing. Images of one name in two of them get their set's folder into their id."""
    times = Counter(record.id for one in sets for record in one.records)
    listing = Listing(", ".join(dict.fromkeys(one.layout for one in sets)), tree.root, tree)
    for one in sets:
        part = one.folder.relative_to(tree.root).as_posix()
        for record in one.records:
            name = record.id.removeprefix(f"{record.source}/")
            unique = record.id if times[record.id] == 1 else f"{record.source}/{part}/{name}"
            listing.records.append(replace(record, id=unique))
        listing.refused.extend(one.refused)
        listing.notes.extend(one.notes)
        listing.doubtful.update(one.doubtful)
    parts = "; ".join(
        f"{one.folder.relative_to(tree.root).as_posix()} ({one.layout}, {len(one.records):,} images)" for one in sets
    )
    listing.notes.insert(0, f"{len(sets)} sets are read as one, and splits are made anew: {parts}")
    return listing


def _tell(listing: Listing, sets: list[Listing]) -> None:
    """Add what no layout says: what was passed over below the folder that was given, and which masks were joined."""
    tree = listing.tree
    images = [path for place in tree.below() for path in place.images]
    known = set().union(*(one.knows() for one in sets))
    if strangers := [path for path in images if path not in known]:
        layouts = ", ".join(dict.fromkeys(one.layout for one in sets))
        listing.refused.append(
            Refusal(
                named(map(tree.name, strangers)),
                f"They are no images or masks of the layout that was found here ({layouts}).",
                "Give each set's own folder, or move them to where the layout has them.",
                count=len(strangers),
            )
        )
    listing.refused.extend(tree.refused())
    listing.notes.extend(tree.notes())
    several = [record.image for record in listing.records if len(record.masks) > 1]
    listing.note(several, "images have several masks, which are joined")


def _refuse_namesakes(listing: Listing) -> None:
    """Keep the first of the images that share an id, such as ``scan1.png`` and ``scan1.jpg``."""
    first: dict[str, Record] = {}
    for record in listing.records:
        if first.setdefault(record.id, record) is not record:
            twin = listing.relative(first[record.id].image)
            listing.refuse(record.image, f"It has the same name as {twin}.", "Rename it and its mask.")
    listing.records = list(first.values())
