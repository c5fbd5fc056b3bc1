"""How labelled folders are arranged: plain ones of images, masks and a table, and the layouts of published sets.

Published sets: BUSI (Al-Dhabyani et al., Data in Brief 28, 2020, 104863), BUS-BRA (Gomez-Flores et al., Medical
Physics, 2023), and BrEaST (Pawlowska et al., Scientific Data 11, 2024, 148), its table saved as CSV.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from busigen.data.dicom.header import SUFFIXES as DICOM_SUFFIXES
from busigen.data.sources.files import (
    SUFFIXES,
    MaskFiles,
    Place,
    Tree,
    image_name,
    images_below,
    in_natural_order,
    is_mask_folder,
    masks_beside,
    name_key,
    natural_key,
    stem_of,
)
from busigen.data.sources.records import UNKNOWN_CLASS, Layout, Listing, Record, Row, counted, named, read_rows
from busigen.errors import InputError
from busigen.registry import CLASSES, LESION_CLASSES
from busigen.text import printable

_LABELS = "labels.csv"
_IMAGES_OR_MASKS = re.compile(r"(.*[\W_])?(image|mask)s?", re.IGNORECASE)
_WORDS = re.compile(r"[^\W\d_]+")
_PARTS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_CONTRADICTION = "contradiction"  # Key of a row of ``labels.csv`` that says in what the rows for one file differ.

# Gives the folders of images in a place, each with its folders of masks; loosely also images without any masks.
Halves = Callable[[Place, bool], list[tuple[Path, list[Path]]]]


def _of_words(place: Place, loose: bool) -> list[tuple[Path, list[Path]]]:
    """``images`` and ``masks``, also with the same words before them, as in ``USG Images`` and ``USG Masks``."""
    kinds: dict[tuple[str, str], list[Path]] = {}
    for folder in place.folders:
        if match := _IMAGES_OR_MASKS.fullmatch(folder.name):
            kinds.setdefault((name_key(match[1] or ""), match[2].lower()), []).append(folder)
    table = loose and place.file(_LABELS) is not None
    return [
        (images, kinds.get((words, "mask"), []))
        for (words, kind), folders in kinds.items()
        for images in folders
        if kind == "image" and (table or (words, "mask") in kinds)
    ]


def _beside(place: Place, loose: bool) -> list[tuple[Path, list[Path]]]:
    """Folders of masks, or a table, beside images that lie in no folder of their own."""
    masks = [folder for folder in place.folders if is_mask_folder(folder.name)]
    return [(place.path, masks)] if masks or place.file(_LABELS) else []


def _of_names(names: dict[str, str], place: Place, loose: bool) -> list[tuple[Path, list[Path]]]:
    """Folders of images and of masks that have these names, given in lower case."""
    folders = {name_key(folder.name): folder for folder in place.folders}
    return [(folders[one], [folders[other]]) for one, other in names.items() if one in folders and other in folders]


_of_udiat = partial(_of_names, {"original": "gt"})
_of_nnunet = partial(_of_names, {"imagestr": "labelstr", "imagests": "labelsts"})


def images_of(place: Place) -> list[Path]:
    """The folders of images in a place whose masks lie beside them."""
    return [images for halves in (_of_words, _of_udiat, _of_nnunet) for images, _ in halves(place, False)]


def _read_plain(listing: Listing, halves: Halves, channel: str) -> None:
    """List every image with its masks; those without a known class are refused, unless they may be."""
    tree, labels = listing.tree, _read_labels(listing)
    used: set[str] = set()
    stems: set[str] = set()
    for folder, masks in halves(tree.at(listing.folder), listing.loose):
        images = images_below(tree, folder)
        files = MaskFiles(images, folder, channel)
        for below in masks:
            files.add_masks((path for place in tree.below(below) for path in place.images), below)
        stems.update(name_key(stem_of(image)) for image in images)
        used |= _list(listing, folder, images, files, labels)
        other, nobodys = files.unused(belonging=True), files.unused(belonging=False)
        listing.note(other, "masks passed over, whose image has another one or lies in another folder")
        listing.refuse(nobodys, "No image has the name that the mask's name says.", "Restore it, or remove the mask.")
    for several, what in ((False, "have no image"), (True, "name several images, and are used for none")):
        if rows := [row["file"] or "" for key, row in labels.items() if key not in used and (key in stems) is several]:
            listing.notes.append(counted(f"rows of {_LABELS} {what}", rows))


def _list(listing: Listing, folder: Path, images: list[Path], files: MaskFiles, labels: dict[str, Row]) -> set[str]:
    """List the images of one folder; returns the keys of the rows that they have."""
    place = listing.folder
    # Parts of the set that was given are one source: a patient may be in several of them.
    part = place.name.lower() in _PARTS and place != listing.tree.root
    source = printable((place.parent if part else place).name)
    times = Counter(name_key(stem_of(image)) for image in images)
    guessed: list[Path] = []
    rows: set[str] = set()
    for image in images:
        inner = image.relative_to(folder).with_name(stem_of(image))
        name = inner.as_posix()
        # As with masks: a name without its folders serves only where no other image has it.
        bare = name_key(stem_of(image))
        key = bare if name_key(name) not in labels and times[bare] == 1 else name_key(name)
        row = labels.get(key, {})
        rows.add(key)
        match = files.of(image)
        by_folder = next((part.lower() for part in inner.parts[:-1] if part.lower() in CLASSES), "")
        image_class = (row.get("class") or by_folder).lower()
        if (contradiction := row.get(_CONTRADICTION)) is not None:
            problem = f"{_LABELS} has two rows for it: {contradiction}."
            listing.refuse([image], problem, "Keep the right one of them.", match.masks)
        elif image_class not in CLASSES and not listing.unlabelled:
            listing.refuse(
                [image],
                f"Its class is {image_class or 'unknown'!r}.",
                f"Put it into {folder.name}/<class>/ or name it in {_LABELS} (columns file,class); "
                f"classes are {', '.join(CLASSES)}.",
                match.masks,
            )
        elif match.rivals:
            rivals = named(path.relative_to(place).as_posix() for path in match.rivals)
            listing.refuse(
                [image],
                f"Nobody can tell which mask is its own, by name: {rivals}.",
                "Put masks into folders like the images', or give each image a name of its own.",
                match.rivals,
            )
        else:
            guessed.extend([image] if match.guessed else [])
            image_class = image_class if image_class in CLASSES else UNKNOWN_CLASS
            patient = f"{source}/{row['patient']}" if row.get("patient") else None
            id_ = printable(f"{source}/{name}")
            known = patient, row.get("birads"), row.get("scanner")
            listing.records.append(Record(id_, image_class, source, image, match.masks, *known))
    listing.note(guessed, "joined by name alone to a mask in a folder of another name")
    return rows


def _read_labels(listing: Listing) -> dict[str, Row]:
    """The table's rows by key of the image's name, without folder ``images`` and ending; empty without a table.

    Of rows that differ for one image, the first, with what they differ in as `_CONTRADICTION`.
    """
    table = listing.tree.at(listing.folder).file(_LABELS)
    found: dict[str, Row] = {}
    for row in [] if table is None else read_rows(table, ("file", "class")):
        path = Path((row["file"] or "").replace("\\", "/"))
        path = path.with_suffix("") if path.suffix.lower() in (*SUFFIXES, *DICOM_SUFFIXES) else path
        parts = path.parts[1:] if path.parts and path.parts[0].lower() == "images" else path.parts
        first = found.setdefault(name_key("/".join(parts)), dict(row))
        differ = [key for key in row if key != "file" and row[key] != first[key]]
        if differ:
            said = [f"{key} is {first[key] or 'empty'!r} and {row[key] or 'empty'!r}" for key in differ]
            first.setdefault(_CONTRADICTION, "; ".join(said))
    return found


def class_named(name: str) -> str | None:
    """The class that a file's or a folder's name says; None for "benign or normal"."""
    words = {word.lower() for word in _WORDS.findall(name)} & set(CLASSES)
    return words.pop() if len(words) == 1 else None


def _plain(name: str, looks_like: str, halves: Halves, channel: str = "") -> Layout:
    """A layout of images and masks apart; ``channel`` ends the images' names, but not those of their masks."""

    def is_root(_tree: Tree, place: Place, loose: bool) -> bool:
        return bool(halves(place, loose))

    def read(listing: Listing) -> None:
        _read_plain(listing, halves, channel)

    return Layout(name, looks_like, is_root, read)


_FILES_ALIKE = "images/ and masks/ with the same file names, classes from images/<class>/ or labels.csv (file,class)"
PAIRS = _plain("pairs", _FILES_ALIKE, _of_words)
UDIAT = _plain("UDIAT", "original/ and GT/, classes as for pairs", _of_udiat)
NNUNET = _plain("nnU-Net", "imagesTr/X_0000.png and labelsTr/X.png, classes as for pairs", _of_nnunet, "_0000")
BESIDE = _plain("images", "images with masks/ or labels.csv beside them", _beside)
"""Only for folders of healthy images: what has masks is none."""


def _read_masks(listing: Listing) -> None:
    """List every image file as a mask, or as an image if its mask lies beside it; class by table, folder or name."""
    labels = _read_labels(listing)
    for place in listing.tree.below(listing.folder):
        files, images = masks_beside(place)
        named_like: dict[str, list[Path]] = {}
        for image, match in images.items():
            if match.rivals:
                listing.refuse([image], "Nobody can tell which mask is its own.", "Remove the others.", match.rivals)
            named_like.setdefault(stem_of(image), []).extend(match.masks or (() if match.rivals else (image,)))
        for mask in files.unused(belonging=False):
            named_like.setdefault(image_name(mask), []).append(mask)
        for name, masks in named_like.items():
            inner = (place.path / name).relative_to(listing.folder)
            own = (inner.as_posix(), name, *(stem_of(mask) for mask in masks[:1]))
            row = next((labels[key] for key in map(name_key, own) if key in labels), {})
            if _CONTRADICTION in row:
                problem = f"{_LABELS} has two rows for it: {row[_CONTRADICTION]}."
                listing.refuse(masks, problem, "Keep the right one of them.")
                continue
            by_folder = next((part.lower() for part in inner.parts[:-1] if part.lower() in CLASSES), "")
            said = (row.get("class") or by_folder or class_named(name) or "").lower()
            image_class = said if said in CLASSES else UNKNOWN_CLASS
            image = masks[0].with_name(f"{name}.png")
            listing.records.append(Record(printable(inner.as_posix()), image_class, "masks", image, tuple(masks)))


MASKS = Layout("masks", "files that are masks, without their images", lambda *_: True, _read_masks)
"""Only for folders of masks that outlines are taken from: `Record.image` says what the image would be called."""

_BUSI_SCANNER = "GE Logiq E9"  # As the paper says of all images.
_BUSI_IMAGE = re.compile(r"^([a-z]+) \(\d+\)$", re.IGNORECASE)


def _is_busi(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether this folder holds the class folders."""
    folders = _class_folders(place)
    return any(_is_busi_image(path, name) for name, folder in folders for path in tree.at(folder).images)


def _read_busi(listing: Listing) -> None:
    """List every image of the class folders with all of its masks."""
    for name, folder in _class_folders(listing.tree.at(listing.folder)):
        files, images = masks_beside(listing.tree.at(folder))
        for image, match in images.items():
            if match.rivals or not (listing.loose or _is_busi_image(image, name)):
                listing.refuse(
                    [image],
                    f"The name is not of the form '{name} (N)'.",
                    f"Rename it and its masks, or remove it from the {name} folder.",
                    (*match.masks, *match.rivals),
                )
            else:
                id_ = f"busi/{image.stem}"
                listing.records.append(Record(id_, name, "busi", image, match.masks, scanner=_BUSI_SCANNER))
        for orphan in files.unused(belonging=False):
            listing.refuse([orphan], "There is no image of this mask's name.", "Restore it or remove the mask.")


def _class_folders(place: Place) -> list[tuple[str, Path]]:
    return [(name, folder) for name in CLASSES for folder in place.folders if name_key(folder.name) == name]


def _is_busi_image(image: Path, name: str) -> bool:
    match = _BUSI_IMAGE.match(image.stem)
    return match is not None and match[1].lower() == name


_BUSI_LOOK = "folders normal, benign, malignant with 'benign (1).png' and 'benign (1)_mask.png'"
BUSI = Layout("BUSI", _BUSI_LOOK, _is_busi, _read_busi)

_BUSBRA_TABLE, _IMAGES, _MASKS = "bus_data.csv", "Images", "Masks"


def _is_busbra(tree: Tree, place: Place, loose: bool) -> bool:
    """Whether this folder holds the table and both image folders; loosely, the table and the images."""
    names = {folder.name for folder in place.folders}
    return place.file(_BUSBRA_TABLE) is not None and _IMAGES in names and (loose or _MASKS in names)


def _read_busbra(listing: Listing) -> None:
    """List every row of the table; images without a row and rows without a known class are refused."""
    images = listing.folder / _IMAGES
    table = listing.tree.at(listing.folder).file(_BUSBRA_TABLE) or listing.folder / _BUSBRA_TABLE
    rows = read_rows(table, ("ID", "Case", "Pathology", "BIRADS"))
    seen: set[str] = set()
    for row in sorted(rows, key=lambda row: natural_key(row["ID"] or "")):
        name, pathology = row["ID"], (row["Pathology"] or "").lower()
        # A name from the table must stay inside the folder it is looked up in.
        if name is None or Path(name).name != name or "\\" in name or "\0" in name:
            problem = f"The ID {name!r} is no file name."
            listing.refuse([table], problem, "Give each row its image's name without '.png'.")
        elif name in seen:
            listing.refuse([table], f"The ID {name!r} stands in two rows.", "Keep the right one of them.")
        elif pathology not in LESION_CLASSES:
            problem, fix = f"Its Pathology is {row['Pathology']!r}.", f"Set it to one of {', '.join(LESION_CLASSES)}."
            listing.refuse([images / f"{name}.png"], problem, fix, [_busbra_mask(listing, name)])
        else:
            image, masks = images / f"{name}.png", (_busbra_mask(listing, name),)
            patient = f"busbra/{row['Case']}" if row["Case"] else None
            known = patient, row["BIRADS"], _device(row.get("Device"))
            listing.records.append(Record(f"busbra/{name}", pathology, "busbra", image, masks, *known))
        seen.add(name or "")
    for path in images_below(listing.tree, images):
        if path.stem not in seen:
            mask = _busbra_mask(listing, path.stem)
            listing.refuse([path], f"{_BUSBRA_TABLE} has no row for it.", "Add the row or remove the image.", [mask])


def _device(text: str | None) -> str | None:
    """The device of BUS-BRA's table without its probe's frequencies, as in ``GE Logiq 7 @10-14MHz``."""
    return (text or "").partition("@")[0].strip() or None


def _busbra_mask(listing: Listing, name: str) -> Path:
    return listing.folder / _MASKS / f"{name.replace('bus_', 'mask_', 1)}.png"


BUSBRA = Layout("BUS-BRA", "Images/bus_0001-l.png, Masks/mask_0001-l.png and bus_data.csv", _is_busbra, _read_busbra)

_TUMOR, _OTHER = "_tumor", "_other"


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
        image_class = image_class if image_class in CLASSES else UNKNOWN_CLASS
        patient = f"breast/{row['CaseID']}" if row.get("CaseID") else None
        masks, birads = images[image].masks, row.get("BIRADS")
        listing.records.append(Record(f"breast/{image.stem}", image_class, "breast", image, masks, patient, birads))
    listing.refuse(
        without,
        "No table gives their class.",
        "Save the sheet of BrEaST's .xlsx file as a CSV file beside the images, with its columns Image_filename and "
        "Classification.",
        [mask for image in without for mask in images[image].masks],
    )
    listing.note(in_natural_order(other, listing.folder), "masks of other structures than the tumour, passed over")


def _breast_rows(place: Place) -> Iterable[Row]:
    """The rows of the first CSV file that has BrEaST's columns; none where there is no such file."""
    for name in place.others:
        if name.lower().endswith(".csv"):
            try:
                return read_rows(place.path / name, ("Image_filename", "Classification"))
            except InputError:
                continue  # Another table, of which nothing is known.
    return ()


_BREAST_LOOK = "case001.png, case001_tumor.png and the table as CSV (Image_filename,Classification)"
BREAST = Layout("BrEaST", _BREAST_LOOK, _is_breast, _read_breast)
