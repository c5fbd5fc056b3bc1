"""What images a folder holds, in whichever layouts: those of labelled sets, or any, as in folders of healthy ones."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from busigen.data.sources import layouts
from busigen.data.sources.files import Tree, is_mask_folder, masks_beside, name_key, natural_key
from busigen.data.sources.frames import Looked, take_frames
from busigen.data.sources.records import UNKNOWN_CLASS, Listing, Record, Refusal, counted, named
from busigen.errors import InputError, MissingDependencyError
from busigen.registry import LESION_CLASSES
from busigen.text import install_command, printable

# BUS-BRA comes before pairs, whose ``images`` and ``masks`` it has; and pairs before BUSI, whose names they may have.
LAYOUTS = (layouts.BUSBRA, layouts.PAIRS, layouts.UDIAT, layouts.NNUNET, layouts.BUSI, layouts.BREAST)

_ABOVE = 4  # Folders above one of healthy images in which its set's masks and table are looked for.


class UnknownLayoutError(InputError):
    """A folder is laid out in no way that busigen knows."""


def read_source(
    folder: Path,
    *,
    unlabelled: bool = False,
    skip: Path | None = None,
    frames: int = 1,
    looked: Looked | None = None,
) -> Listing:
    """List a labelled folder in whichever layout it has.

    Of a folder that holds sets at any depth, all are listed; ``unlabelled``, also images of no known class, as
    ``unknown``. ``skip`` is a folder below that is passed over, where the command writes to; of each DICOM file,
    ``frames`` frames are listed, and ``looked`` is told of each. An InputError says that
    the folder is missing, unreadable or laid out in no way that busigen knows.
    """
    folder = Path(folder)
    if not os.path.isdir(folder):
        problem = "is a file, not a folder" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{folder} {problem}.", fix="Give the folder that holds the images and masks.")
    # A root given as "." has no name, and names are what the table records.
    tree = Tree(Path(os.path.realpath(folder)), skip)
    _refuse_images_of_a_set(folder, tree.root)
    sets = list(_sets(tree, unlabelled=unlabelled))
    if not sets:
        names = {name_key(below.name) for below in tree.at(tree.root).folders}
        halves = (("images", "masks"), ("masks", "images"))
        lacking = "".join(f": it lacks {lack}/" for have, lack in halves if have in names and lack not in names)
        accepted = "; ".join(f"{layout.name}: {layout.looks_like}" for layout in LAYOUTS)
        if tree.lacks_extra:
            problem = f"{folder} holds {tree.found()}, and DICOM files are read with an extra."
            raise MissingDependencyError(problem, fix=f"Run {install_command('dicom')}.")
        raise UnknownLayoutError(
            f"{folder} has none of the layouts that are read{lacking}; it holds {tree.found()}.",
            fix=f"Arrange it as one of these. {accepted}.",
        )
    for one in sets:
        _refuse_namesakes(one)
    listing = sets[0] if len(sets) == 1 else _joined(tree, sets)
    known = set().union(*(one.knows() for one in sets))
    if strangers := [path for place in tree.below() for path in place.images if path not in known]:
        names_found = ", ".join(dict.fromkeys(one.layout for one in sets))
        problem = f"They are no images or masks of the layout that was found here ({names_found})."
        fix = "Give each set's own folder, or move them to where the layout has them."
        listing.refused.append(Refusal(named(map(tree.name, strangers)), problem, fix, count=len(strangers)))
    _note_passed_over(listing)
    take_frames(listing, frames, looked)
    several = [record.image for record in listing.records if len(record.masks) > 1]
    listing.note(several, "with several masks, which are joined")
    return listing


def read_images(folder: Path, *, skip: Path | None = None, frames: int = 1, looked: Looked | None = None) -> Listing:
    """List every image below a folder, whatever its layout, with the class and the masks that anything there names.

    The folder may also lie within a set, as ``normal`` does in BUSI's: the set's masks and its table count, too. Paths
    begin with ``folder``; the class is ``unknown`` where nothing says one; what is ``doubtful`` is listed, too.
    ``skip``, ``frames``, ``looked`` and errors are those of `read_source`, but for unknown layouts.
    """
    tree = Tree(folder, skip)
    listing = Listing("images", folder, tree, unlabelled=True, loose=True)
    here = Path(os.path.realpath(folder))
    listed: dict[Path, list[Record]] = {}

    def as_given(path: Path) -> Path:
        """The path below ``folder`` of one below its real place; any other path as it is."""
        return folder / path.relative_to(here) if path.is_relative_to(here) else path

    for part in _sets_above(here):
        for record in part.records:
            masks = tuple(map(as_given, record.masks))
            listed.setdefault(as_given(record.image), []).append(replace(record, masks=masks))
        listing.doubtful.update({as_given(path): problem for path, problem in part.doubtful.items()})
    for part in _sets(tree, unlabelled=True, loose=True):
        for record in part.records:
            listed.setdefault(record.image, []).append(record)
        listing.doubtful.update(part.doubtful)
    own_words = _classes_named(here.name)
    strangers: list[Path] = []
    for place in tree.below():
        inner = place.path.relative_to(folder).parts
        if any(map(is_mask_folder, inner)):
            strangers.extend(place.images)
            continue
        files, images = masks_beside(place)
        strangers.extend(files.all)
        words = own_words.union(*map(_classes_named, inner))
        for image, match in images.items():
            if match.rivals:
                listing.doubtful[image] = "Nobody can tell which of several masks is its own."
            name = "/".join((*inner, image.name))
            listing.records.append(_combined(image, name, words, listed.get(image, ()), match.masks))
    listing.records.sort(key=lambda record: natural_key(record.id))
    _note_passed_over(listing)
    marking = {mask for record in listing.records for mask in record.masks}
    take_frames(listing, frames, looked)
    if others := [tree.name(path) for path in strangers if path not in marking]:
        listing.notes.append(counted("masks by name, but of no image here, passed over", others))
    return listing


def read_masks(folder: Path, *, skip: Path | None = None, looked: Looked | None = None) -> Listing:
    """List the masks below a folder: those of labelled sets, as `read_source` does, or a folder of masks alone.

    In the latter, each file is a mask, but for images beside theirs; files that are named alike but for a number are
    parts of one. The class is ``unknown`` where neither a folder, nor a name, nor ``labels.csv`` says one. Arguments
    and errors are those of `read_source`, but for unknown layouts.
    """
    try:
        listing = read_source(folder, unlabelled=True, skip=skip, looked=looked)
        if any(record.masks for record in listing.records):
            return listing
    except UnknownLayoutError:
        pass
    tree = Tree(Path(os.path.realpath(folder)), skip)
    listing = Listing(layouts.MASKS.name, tree.root, tree, unlabelled=True)
    layouts.MASKS.read(listing)
    _note_passed_over(listing)
    take_frames(listing, 1, looked)
    return listing


def _sets(tree: Tree, *, unlabelled: bool, loose: bool = False) -> Iterator[Listing]:
    """The sets below a folder; loosely also those that lack masks, and sets within sets."""
    known = (*LAYOUTS, layouts.BESIDE) if loose else LAYOUTS
    waiting = [tree.root]
    while waiting:
        place = tree.at(waiting.pop())
        layout = next((layout for layout in known if layout.is_root(tree, place, loose)), None)
        if layout is not None:
            listing = Listing(layout.name, place.path, tree, unlabelled=unlabelled, loose=loose)
            layout.read(listing)
            yield listing
        if layout is None or loose:
            waiting.extend(reversed(place.folders))


def _sets_above(folder: Path) -> Iterator[Listing]:
    """The sets near above a folder, of which it may be a part."""
    for above in folder.parents[:_ABOVE]:
        tree = Tree(above)
        try:
            layout = next((layout for layout in LAYOUTS if layout.is_root(tree, tree.at(above), True)), None)
        except InputError:  # There is nothing above that busigen may look at.
            return
        if layout is not None:
            listing = Listing(layout.name, above, tree, unlabelled=True, loose=True)
            layout.read(listing)
            yield listing


def _combined(image: Path, name: str, words: set[str], listed: Iterable[Record], beside: Iterable[Path]) -> Record:
    """An image with the masks of all that lists it, and the worst class."""
    classes = {record.image_class for record in listed} | words | _classes_named(image.stem)
    lesion = next((name for name in LESION_CLASSES if name in classes), None)
    known = "normal" if "normal" in classes else UNKNOWN_CLASS
    masks = (*beside, *(mask for record in listed for mask in record.masks if mask.is_file()))
    return Record(name, lesion or known, "images", image, tuple(dict.fromkeys(masks)))


def _classes_named(name: str) -> set[str]:
    found = layouts.class_named(name)
    return {found} if found else set()


def _refuse_images_of_a_set(given: Path, folder: Path) -> None:
    """Refuse the folder of images alone of a set, whose masks would all be missed."""
    try:
        place = Tree(folder.parent).at(folder.parent)
    except InputError:
        return
    if folder in layouts.images_of(place):
        problem = f"{given} holds the images of a set whose masks lie beside it."
        raise InputError(problem, fix=f"Give the set: {folder.parent}.")


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
    listing.notes.insert(0, printable(f"{len(sets)} sets are read as one, and splits are made anew: {parts}"))
    return listing


def _note_passed_over(listing: Listing) -> None:
    refused, notes = listing.tree.passed_over()
    listing.refused.extend(refused)
    listing.notes.extend(notes)


def _refuse_namesakes(listing: Listing) -> None:
    """Keep the first of the images that share an id, such as ``scan1.png`` and ``scan1.jpg``."""
    first: dict[str, Record] = {}
    for record in listing.records:
        if first.setdefault(record.id, record) is not record:
            twin = listing.relative(first[record.id].image)
            listing.refuse([record.image], f"It has the same name as {twin}.", "Rename it and its mask.")
    listing.records = list(first.values())
