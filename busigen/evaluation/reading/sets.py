"""Reading a labelled set, whatever its layout, into the working frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data import prepared as schema
from busigen.data.images import ImageFile, read_image
from busigen.data.letterbox import Letterbox
from busigen.data.prepared import Prepared
from busigen.data.sources.read import UnknownLayoutError, read_source
from busigen.data.sources.records import Listing, Record, Refusal, counted
from busigen.data.splits import near_duplicate_groups
from busigen.errors import BusigenError, InputError
from busigen.evaluation.context import Backgrounds, ImageSet
from busigen.evaluation.reading.archives import list_archives
from busigen.evaluation.reading.items import Frame, Item, frame, read_files
from busigen.registry import RESOLUTION, SPLITS, SYNTHETIC
from busigen.runtime.dataset.format import DATASET_FILE, RUN_FILE, SHARD_FOLDER
from busigen.runtime.dataset.reader import refuse_unreadable
from busigen.runtime.maintenance.merge import open_parts, parts_of
from busigen.runtime.progress import Progress

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

    ``limit``: Read at most this many images, drawn at random; None reads all.

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

    ``splits``: Names of ``registry.SPLITS``.
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
        return read_files(read_image(record.image), ((path, None) for path in record.masks))

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
