"""Listing the samples of WebDataset shards that may have come from anywhere; nothing in them is believed."""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data import prepared as schema
from busigen.data.images import ImageFile, read_image, read_mask
from busigen.data.letterbox import Letterbox
from busigen.data.prepared import Prepared
from busigen.data.sources.files import SUFFIXES
from busigen.data.sources.read import UnknownLayoutError, read_source
from busigen.data.sources.records import UNKNOWN_CLASS, Listing, Record, Refusal, counted
from busigen.data.splits import near_duplicate_groups
from busigen.errors import BusigenError, InputError
from busigen.evaluation.context import Backgrounds, ImageSet
from busigen.evaluation.reading.items import Frame, Item, frame
from busigen.foreign import open_file
from busigen.records import parse_json
from busigen.registry import CLASSES, RESOLUTION, SPLITS, SYNTHETIC
from busigen.runtime.dataset.collection import open_parts, parts_of
from busigen.runtime.dataset.format import DATASET_FILE, RUN_FILE, SHARD_FOLDER
from busigen.runtime.dataset.reader import refuse_unreadable
from busigen.runtime.dataset.untrusted import open_headers
from busigen.runtime.progress import Progress
from busigen.text import printable

MEMBER_LIMIT = 32 << 20
"""Largest image or mask in bytes that is read from an archive."""

ROW_LIMIT = 1 << 20
"""Largest JSON row in bytes that is read from an archive."""

NAME_LIMIT = 512
"""Longest member name in characters."""

CLASS_LIMIT = 64
"""Largest ``.cls`` in bytes that is read from an archive."""

_IMAGE = "image|images|img|imgs|input|inputs"
_MASK = "mask|masks|seg|segmentation|segmentations|label|labels|gt|groundtruth|ground_truth|annotation|annotations"
_WORD = re.compile(rf"(?P<key>.+)[._ -](?:(?P<image>{_IMAGE})|(?:{_MASK}|tumou?r|lesion)[._ -]?\d*)", re.I | re.S)
"""What a name without its ending says of its role: ``a.mask``, ``a_mask_1``, ``a_image``."""

_BEFORE = re.compile(r"(?:(?P<image>image|img|bus)|mask|seg|label|gt)[_-](?P<key>.+)", re.I | re.S)
"""The same where the word comes first, as in BUS-BRA's ``mask_0001-l`` of ``bus_0001-l``."""

_FOLDERS = re.compile(rf"(?P<image>{_IMAGE})|{_MASK}", re.I)
_TEXTS = {"json": "row", "cls": "class"}
_LIMITS = {"image": MEMBER_LIMIT, "mask": MEMBER_LIMIT, "row": ROW_LIMIT, "class": CLASS_LIMIT}
_KINDS, _KINDS_SHOWN = 64, 5
"""Kinds of members without a role that are told apart, and named."""

_WHOLE = "Get the archive again, or write it anew."


@dataclass(frozen=True)
class Part:
    """Where one member's bytes lie in its archive."""

    archive: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """The member's bytes.

        Raises:
            InputError: the archive was cut short or cannot be read.
        """
        try:
            with open_file(self.archive) as file:
                file.seek(self.offset)
                data = file.read(self.size)
        except OSError as error:
            raise InputError(f"{self.archive} cannot be read: {error.strerror}.", fix="Check the file.") from error
        if len(data) != self.size:
            raise InputError(f"{self.archive.name}: {self.name} is cut short.", fix=_WHOLE)
        return data


@dataclass
class _Sample:
    """The members of one key: one of each role, and perhaps several masks."""

    archive: Path
    key: str
    parts: dict[str, Part] = field(default_factory=dict)
    masks: dict[str, Part] = field(default_factory=dict)

    def add(self, part: Part, role: str) -> bool:
        """Take a member in; False where there is one like it already."""
        taken, name = (self.masks, part.name) if role == "mask" else (self.parts, role)
        return taken.setdefault(name, part) is part


@dataclass
class _Guesses:
    """What was read off names alone, and what could not be."""

    unknown: Counter[str] = field(default_factory=Counter)
    examples: dict[str, str] = field(default_factory=dict)
    numbered: bool = False
    strange: Counter[str] = field(default_factory=Counter)

    def pass_over(self, name: str) -> None:
        """Note a member of which nothing says what it is, under what its name ends with."""
        last = name.rpartition("/")[2]
        words = [part for part in last.split(".")[1:] if not part[:1].isdigit()]
        kind = "hidden files" if last.startswith(".") else ".".join(["*", *words])[:NAME_LIMIT]
        if kind not in self.unknown and len(self.unknown) >= _KINDS:
            kind = "others"
        self.unknown[kind] += 1
        self.examples.setdefault(kind, name[:NAME_LIMIT])

    def notes(self) -> list[str]:
        """What a report says of it, one line a kind."""
        notes = []
        if self.unknown:
            kinds = [
                f"{kind}: {count}, such as {self.examples[kind]}"
                for kind, count in self.unknown.most_common(_KINDS_SHOWN)
            ]
            more = len(self.unknown) - len(kinds)
            notes.append(
                f"{self.unknown.total()} members of shards are passed over, because nothing in their names says what "
                f"they are ({'; '.join(kinds)}{f'; and {more} more kinds' if more > 0 else ''})"
            )
        if self.numbered:
            numbers = ", ".join(f"{number} {label}" for number, label in enumerate(CLASSES))
            notes.append(f"the numbers in .cls members are read as {numbers}")
        if self.strange:
            text, _ = self.strange.most_common(1)[0]
            notes.append(f"{self.strange.total()} .cls members name no known class, most of them {text!r}")
        return [printable(note) for note in notes]


def list_archives(archives: Sequence[Path], refused: list[Refusal], notes: list[str] | None = None) -> list[Item]:
    """List every sample of some tar files by their headers alone.

    A sample is an image, ``<key>.image.png`` or ``<key>.png``, its masks, ``<key>.mask.png``, and perhaps
    ``<key>.json`` with ``class``, or ``<key>.cls`` with a class's name or number. The words for image and mask that
    people use are known, before a dot, an underscore, or as a folder. Members of which nothing says what they are, such
    as ``<key>.left.png``, are no images. Links, devices, sparse and oversized members are refused; names serve as names
    only, never as paths.

    Args:
        archives: Uncompressed tar files.
        refused: Gets what is left out.
        notes: Gets what was guessed, and what was passed over.
    """
    items: list[Item] = []
    guesses = _Guesses()
    for archive in archives:
        samples: dict[str, _Sample] = {}
        for part, role, key in _members(archive, refused, guesses):
            if not samples.setdefault(key, _Sample(archive, key)).add(part, role):
                refused.append(_refusal(archive, part.name, "It is a second one of its sample."))
        for sample in samples.values():
            if "image" in sample.parts:
                items.append(_item(sample, refused, guesses))
            else:
                refused.append(_refusal(archive, sample.key, "The sample has no image."))
    if notes is not None:
        notes.extend(guesses.notes())
    return items


def role_of(name: str) -> tuple[str, str] | None:
    """What a member is (``image``, ``mask``, ``row``, ``class``) and its sample's key; None where its name tells none.

    WebDataset ends a key at the first dot, which cuts names such as ``case.0001.png`` short: parts that begin with a
    digit belong to the key here. A word before the ending that is not known (``0001.left.png``) may mean anything.
    """
    folder, _, last = name.rpartition("/")
    if last.startswith("."):
        return None
    stem, _, ending = last.rpartition(".")
    role: str | None = _TEXTS.get(ending.lower())
    folders = folder.split("/") if folder else []
    key = stem
    if role is None:
        if f".{ending.lower()}" not in SUFFIXES:
            return None
        word = _WORD.fullmatch(stem) or _BEFORE.fullmatch(stem)
        place = next((match for part in reversed(folders) if (match := _FOLDERS.fullmatch(part))), None)
        if word is not None:
            role, key = ("image" if word["image"] else "mask"), word["key"]
        elif re.match(r"[^\W\d]\w*$", stem.rpartition(".")[2]) and "." in stem:
            return None
        else:
            role = "image"
        if place is not None and not place["image"]:
            role = "mask"
    kept = [part for part in folders if not _FOLDERS.fullmatch(part)]
    return (role, "/".join([*kept, key])) if key else None


def _members(archive: Path, refused: list[Refusal], guesses: _Guesses) -> Iterator[tuple[Part, str, str]]:
    """Every usable member with its role and its sample's key."""
    try:
        with open_headers(archive) as tar:
            while (member := tar.next()) is not None:
                # A negative size leads back to where the header lies: without this it would be read for ever.
                if member.size < 0 or tar.offset <= member.offset:
                    problem = f"It claims {member.size} bytes; nothing behind it is read."
                    refused.append(_refusal(archive, member.name, problem))
                    return
                if member.isdir():
                    continue
                found = role_of(member.name[: NAME_LIMIT + 1])
                problem = _problem(member, found[0] if found else None)
                if problem:
                    refused.append(_refusal(archive, member.name, problem))
                elif found is None:
                    guesses.pass_over(member.name)
                else:
                    yield Part(archive, member.name, member.offset_data, member.size), *found
            # A tarfile takes a damaged header behind the first for the end, which is a block of zeros or nothing.
            with open_file(archive) as file:
                file.seek(tar.offset)
                if any(file.read(tarfile.BLOCKSIZE)):
                    problem = f"Its header at byte {tar.offset} is damaged; nothing behind it is read."
                    refused.append(_refusal(archive, "", problem))
    except (OSError, tarfile.TarError) as error:
        refused.append(_refusal(archive, "", f"It cannot be read as a tar file: {error}."))


def _problem(member: tarfile.TarInfo, role: str | None) -> str:
    """What is wrong with a member, or nothing."""
    if len(member.name) > NAME_LIMIT:
        return f"Its name has {len(member.name)} characters; {NAME_LIMIT} are allowed."
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        return "It is no plain file."
    if role is not None and not 0 < member.size <= _LIMITS[role]:
        return f"It has {member.size} bytes; 1 to {_LIMITS[role]} are allowed."
    return ""


def _item(sample: _Sample, refused: list[Refusal], guesses: _Guesses) -> Item:
    row = _row(sample, refused)
    background = row.get("healthy_sha256") if row.get("background") == "real" else row.get("background")
    described = row.get("class") or row.get("label") or _stated_class(sample, guesses)
    label = str(described or _class_of(sample.parts["image"].name)).lower()
    shared = background if background != "synthetic" else None
    patient = row.get("patient") or shared

    def read() -> tuple[ImageFile, NDArray[np.bool_], int]:
        data = sample.parts["image"].read()
        image = read_image(Path(sample.parts["image"].name), data)
        if row.get("image_sha256") not in (None, image.sha256):
            raise InputError(f"{sample.key}: its image is not the one that its row names.", fix=_WHOLE)
        lesions, notes = np.zeros(image.pixels.shape, np.bool_), list(image.notes)
        for mask in sample.masks.values():
            lesions |= read_mask(Path(mask.name), (image.width, image.height), mask.read(), notes=notes)
        return replace(image, notes=tuple(dict.fromkeys(notes))), lesions, len(sample.masks)

    return Item(
        id=printable(sample.key),
        file=printable(f"{sample.archive.name}/{sample.parts['image'].name}"),
        image_class=label if label in CLASSES else UNKNOWN_CLASS,
        read=read,
        patient=None if patient is None else printable(str(patient)[:NAME_LIMIT]),
        background=None if background is None else printable(str(background)[:NAME_LIMIT]),
    )


def _row(sample: _Sample, refused: list[Refusal]) -> dict[str, Any]:
    part = sample.parts.get("row")
    if part is None:
        return {}
    try:
        row = parse_json(part.read(), part.name, nan=True)
    except (InputError, ValueError):
        row = None
    if isinstance(row, dict):
        return row
    refused.append(_refusal(sample.archive, part.name, "It is no JSON object; its sample is read without it."))
    return {}


def _stated_class(sample: _Sample, guesses: _Guesses) -> str | None:
    """The class that a ``.cls`` member names, or numbers as the registry does."""
    part = sample.parts.get("class")
    if part is None:
        return None
    with contextlib.suppress(InputError, ValueError):
        text = part.read().decode().strip().strip("\"'").lower()
        if re.fullmatch("[0-9]", text) and int(text) < len(CLASSES):
            guesses.numbered = True
            return CLASSES[int(text)]
        if text in CLASSES:
            return text
        guesses.strange[text] += 1
        return None
    guesses.strange["unreadable"] += 1
    return None


def _class_of(key: str) -> str:
    return next((part for part in key.lower().split("/")[:-1] if part in CLASSES), "")


def _refusal(archive: Path, name: str, problem: str) -> Refusal:
    return Refusal(f"{archive.name}/{name[:NAME_LIMIT]}" if name else archive.name, problem, _WHOLE)


TABLE = {
    "id": pl.String(),
    "class": pl.String(),
    "group": pl.Int64(),
    "file": pl.String(),
    "sha256": pl.String(),
    "width": pl.Int64(),
    "height": pl.Int64(),
    "mode": pl.String(),
    "colour": pl.Boolean(),
    "lesions": pl.Int64(),
    "text": pl.Boolean(),
    "calipers": pl.Boolean(),
    "background": pl.String(),
    "mask_files": pl.Int64(),
}
"""Columns of ``ImageSet.table``, which says what they hold."""

DATASET_LAYOUT = "busigen dataset"
SHARDS_LAYOUT = "WebDataset shards"
PREPARED_LAYOUT = "prepared folder"

_WORKERS = min(8, os.cpu_count() or 1)
# Frames that wait to be stacked: enough to keep the readers busy, few enough to stay small.
_BLOCK = 64


def read_set(path: Path, progress: Progress | None = None, *, limit: int | None = None, seed: int = 0) -> ImageSet:
    """Read a labelled set, whatever its layout.

    Layouts: a busigen dataset; a folder of WebDataset shards (or one shard); a prepared folder, without its excluded
    images; BUSI, BUS-BRA, or ``images/`` and ``masks/``. Images are letterboxed, never squashed; groups are patients,
    shared backgrounds and near-duplicates. Files that cannot be read are named in ``refused``, the rest is read.

    Five thousand images take about 1.8 GB.

    Args:
        path: The folder, or one tar file.
        progress: Told of every image.
        limit: Read at most this many images, drawn at random; None reads all.
        seed: Seeds that draw.

    Raises:
        InputError: the folder is missing, has no known layout, or none of its images can be read.
        IntegrityError: a prepared folder is not what its record says.
    """
    path = Path(path)
    if (path / schema.INFO).is_file():
        found = from_prepared(Prepared.open(path), tuple(SPLITS))
        return found if limit is None else found.take(_draw(len(found), limit, seed))
    refused: list[Refusal] = []
    notes: list[str] = []
    layout, items = _list(path, refused, notes)
    generated = [items[k] for k in _draw(len(items), limit, seed)]
    frames = _Stack(len(generated))
    readings: dict[str, list[str]] = {}
    progress = progress or Progress()
    progress.start(f"reading {path.name}", len(generated), unit="image")
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, len(generated), _BLOCK):
            for item, result in zip(generated[start:], pool.map(_try, generated[start : start + _BLOCK]), strict=False):
                if isinstance(result, BusigenError):
                    refused.append(Refusal(item.file, result.problem, result.fix))
                else:
                    frames.add(result, item.patient)
                    for note in result.notes:
                        readings.setdefault(note, []).append(item.file)
                progress.advance(1)
    if not frames.rows:
        first = f" The first problem: {refused[0].file}: {refused[0].problem}" if refused else ""
        said = "".join(f" Of the rest: {note}." for note in notes)
        raise InputError(f"{path} holds no image that can be read.{first}{said}", fix="Give another folder.")
    notes.extend(counted(note, files) for note, files in readings.items())
    return replace(frames.finish(path.resolve().name, layout, refused), notes=tuple(notes))


def from_prepared(prepared: Prepared, splits: tuple[str, ...], *, lesions_only: bool = False) -> ImageSet:
    """The images of some splits of a prepared folder.

    Args:
        prepared: The opened folder.
        splits: Names of ``registry.SPLITS``.
        lesions_only: Leave normals out.
    """
    table = prepared.table.filter(pl.col("split").is_in(splits))
    if lesions_only:
        table = table.filter(pl.col("lesions") > 0)
    rows = table["row"].to_numpy()
    boxes = zip(*(table[name] for name in ("scale", "left", "top", "inner_width", "inner_height")), strict=True)
    side = prepared.images.shape[1]
    valid = np.stack([Letterbox(*box).valid for box in boxes]) if len(rows) else np.zeros((0, side, side), np.bool_)
    columns = table.select(
        "id",
        "class",
        "group",
        pl.col("image_file").alias("file"),
        "sha256",
        "width",
        "height",
        pl.lit(None, pl.String).alias("mode"),
        pl.col("overlay_colour").alias("colour"),
        "lesions",
        pl.col("overlay_text").alias("text"),
        pl.col("overlay_calipers").alias("calipers"),
        pl.lit(None, pl.String).alias("background"),
        pl.col("mask_files").list.len().cast(pl.Int64),
    )
    return ImageSet(
        name=prepared.folder.resolve().name,
        images=np.asarray(prepared.images[rows]),
        masks=np.asarray(prepared.masks[rows]) > 0,
        valid=valid,
        overlays=np.asarray(prepared.overlays[rows]),
        clean=np.asarray(prepared.clean[rows]),
        table=columns,
        layout=PREPARED_LAYOUT,
    )


def background_mode(images: ImageSet) -> Backgrounds:
    """What the set's lesions were painted into, by its own records.

    Returns:
        ``real`` where any image was painted into a real one, ``synthetic`` where all backgrounds are synthetic,
        ``unknown`` where nothing is recorded.
    """
    backgrounds = images.table["background"].drop_nulls().unique().to_list()
    if any(background != SYNTHETIC for background in backgrounds):
        return "real"
    return "synthetic" if backgrounds else "unknown"


def _list(path: Path, refused: list[Refusal], notes: list[str]) -> tuple[str, list[Item]]:
    """The layout's name and the set's images, unopened."""
    if path.is_file() and path.suffix == ".tar":
        return SHARDS_LAYOUT, list_archives([path], refused, notes)
    if not path.is_dir():
        problem = "is a file, but no .tar" if path.exists() else "does not exist"
        raise InputError(f"{path} {problem}.", fix="Give the folder that holds the images and masks.")
    if any((path / name).is_file() for name in (DATASET_FILE, RUN_FILE)):
        places = parts_of(path) or [path]
        for place in places:
            refuse_unreadable(place)
        folders = [place / SHARD_FOLDER for place in places]
        items = list_archives([tar for folder in folders for tar in sorted(folder.glob("*.tar"))], refused, notes)
        _check_count(path, len(items), refused)
        return DATASET_LAYOUT, items
    archives = sorted([*path.glob("*.tar"), *(path / SHARD_FOLDER).glob("*.tar")])
    if archives:
        return SHARDS_LAYOUT, list_archives(archives, refused, notes)
    try:
        listing = read_source(path, unlabelled=True)
    except UnknownLayoutError as error:
        raise InputError(
            error.problem,
            fix=f"Give a busigen dataset, a prepared folder, a folder of .tar shards, or a set. {error.fix}",
        ) from error
    refused.extend(listing.refused)
    notes.extend(listing.notes)
    return listing.layout, [_sets_item(listing, record) for record in listing.records]


def _sets_item(listing: Listing, record: Record) -> Item:
    def read() -> tuple[ImageFile, NDArray[np.bool_], int]:
        image = read_image(record.image)
        lesions, notes = np.zeros(image.pixels.shape, np.bool_), list(image.notes)
        for path in record.masks:
            lesions |= read_mask(path, (image.width, image.height), notes=notes)
        image = replace(image, notes=tuple(dict.fromkeys(notes)))
        return image, lesions, len(record.masks)

    return Item(record.id, listing.relative(record.image), record.image_class, read, record.patient)


def _check_count(path: Path, found: int, refused: list[Refusal]) -> None:
    """Note a dataset that is unfinished or lacks samples; what is there can be judged all the same."""
    try:
        count = sum(part.plan.count for part in open_parts(path))
    except BusigenError as error:
        refused.append(Refusal(path.name, error.problem, error.fix))
        return
    if count != found:
        refused.append(Refusal(path.name, f"Its shards hold {found} of {count} samples.", "Run `busigen verify`."))


def _try(item: Item) -> Frame | BusigenError:
    try:
        return frame(item)
    except BusigenError as error:
        return error


def _draw(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Positions of at most ``limit`` of ``count`` images, in order."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:limit])


class _Stack:
    """Frames in arrays that have room for all from the start: a list would hold everything twice when stacked."""

    def __init__(self, count: int) -> None:
        shape = (count, RESOLUTION, RESOLUTION)
        self.images, self.clean = (np.empty(shape, np.uint8) for _ in range(2))
        self.masks, self.valid, self.overlays = (np.empty(shape, np.bool_) for _ in range(3))
        self.thumbnails: list[NDArray[np.float32]] = []
        self.patients: list[str | None] = []
        self.rows: list[dict[str, object]] = []

    def add(self, new: Frame, patient: str | None) -> None:
        row = len(self.rows)
        self.images[row], self.masks[row], self.valid[row] = new.image, new.mask, new.valid
        self.overlays[row], self.clean[row] = new.overlay, new.clean
        self.thumbnails.append(new.thumbnail)
        self.patients.append(patient)
        self.rows.append(new.row)

    def finish(self, name: str, layout: str, refused: Sequence[Refusal]) -> ImageSet:
        count = len(self.rows)
        aspects = [float(str(row["width"])) / float(str(row["height"])) for row in self.rows]
        groups = near_duplicate_groups(np.stack(self.thumbnails), self.patients, aspects)
        rows = [{**row, "group": int(group)} for row, group in zip(self.rows, groups, strict=True)]
        return ImageSet(
            name=name,
            images=self.images[:count],
            masks=self.masks[:count],
            valid=self.valid[:count],
            overlays=self.overlays[:count],
            clean=self.clean[:count],
            table=pl.DataFrame(rows, schema=TABLE),
            layout=layout,
            refused=tuple(refused),
        )
