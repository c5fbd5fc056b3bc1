"""The sets of an audit, of any layout, in the working frame."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import around
from busigen.data.images import MARK_SHARE, refuse_fault
from busigen.data.inpainting import cleaned
from busigen.data.letterbox import Letterbox, letterbox, letterbox_coverage, letterbox_mask, without_bars
from busigen.data.prepared import INFO, Prepared, unfinished
from busigen.data.sources.records import Refusal, counted
from busigen.data.splits import near_duplicate_groups, thumbnail
from busigen.errors import BusigenError, InputError
from busigen.evaluation.context import Backgrounds, ImageSet
from busigen.evaluation.reading.listing import GRID, GROUP, LEVEL, NAME_LIMIT, Item, list_set
from busigen.evaluation.reading.within import Within
from busigen.registry import RESOLUTION, SPLITS, SYNTHETIC
from busigen.runtime.progress import Progress
from busigen.text import printable

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
    GROUP: pl.String(),
    LEVEL: pl.String(),
}
"""Columns of ``ImageSet.table``, which says what they hold."""

_ARRAYS = {"images": np.uint8, "masks": np.bool_, "valid": np.bool_, "overlays": np.bool_, "clean": np.uint8}
_WORKERS = min(8, os.cpu_count() or 1)
# Frames that wait to be stacked: enough to keep the readers busy, few enough to stay small.
_BLOCK = 64


def read_set(
    path: Path,
    progress: Progress | None = None,
    *,
    limit: int | None = None,
    seed: int = 0,
    frames: int = 1,
    within: Within | None = None,
    also: Sequence[str] = (),
) -> ImageSet:
    """Read a labelled set, whatever its layout.

    Layouts: a busigen dataset; a folder of WebDataset shards (or one shard); a prepared folder, without its excluded
    images; BUSI, BUS-BRA, or ``images/`` and ``masks/``. Groups are patients, shared backgrounds and near-duplicates.
    At most ``limit`` images are read, drawn at random, and ``frames`` frames of each DICOM file. Five thousand images
    take about 1.8 GB. ``within``: Only these images, where the set has the column; a note says where it has not.
    ``also`` are columns of texts that the table gets besides, null where an image's row has none.

    Raises:
        InputError: the folder is missing, has no known layout, none of its images can be read, or none is ``within``.
        IntegrityError: a prepared folder is not what its record says.
    """
    path = Path(path)
    if (path / INFO).is_file() or unfinished(path):
        found = from_prepared(Prepared.open(path), tuple(SPLITS), within=within, also=also)
        return found if limit is None else found.take(_draw(len(found), limit, seed))
    refused: list[Refusal] = []
    notes: list[str] = []
    progress = progress or Progress()
    wanted = also if within is None else (*also, within.column)
    layout, items = list_set(path, refused, notes, frames, progress.counter("looking at DICOM files", "file"), wanted)
    if within is not None:
        known = any(within.column in item.columns for item in items)
        chosen = within.rows(path, [item.columns.get(within.column) for item in items] if known else None)
        if chosen is None:
            notes.append(within.absent)
        else:
            items = [items[k] for k in chosen]
    items = [items[k] for k in _draw(len(items), limit, seed)]
    # Room for all from the start: a list of frames would hold everything twice when stacked.
    shape = (len(items), RESOLUTION, RESOLUTION)
    arrays: dict[str, NDArray[Any]] = {name: np.empty(shape, kind) for name, kind in _ARRAYS.items()}
    rows: list[dict[str, Any]] = []
    thumbnails: list[NDArray[np.float32]] = []
    patients: list[str | None] = []
    readings: dict[str, list[str]] = {}
    progress.start(f"reading {path.name}", len(items), unit="image")
    with ThreadPoolExecutor(_WORKERS) as pool:
        for start in range(0, len(items), _BLOCK):
            block = items[start : start + _BLOCK]
            for item, frame in zip(block, pool.map(_try_frame, block), strict=True):
                if isinstance(frame, BusigenError):
                    refused.append(Refusal(item.file, frame.problem, frame.fix))
                else:
                    for name, array in frame.arrays.items():
                        arrays[name][len(rows)] = array
                    rows.append(frame.row | {name: _text(item.columns.get(name)) for name in also})
                    thumbnails.append(frame.thumbnail)
                    patients.append(item.patient)
                    for note in frame.notes:
                        readings.setdefault(note, []).append(item.file)
                progress.advance(1)
    if not rows:
        first = f" The first problem: {refused[0].file}: {refused[0].problem}" if refused else ""
        said = "".join(f" Of the rest: {note}." for note in notes)
        raise InputError(f"{path} holds no image that can be read.{first}{said}", fix="Give another folder.")
    notes.extend(counted(note, files) for note, files in readings.items())
    groups = near_duplicate_groups(np.stack(thumbnails), patients, [row["width"] / row["height"] for row in rows])
    for row, group in zip(rows, groups, strict=True):
        row["group"] = int(group)
    return ImageSet(
        name=path.resolve().name,
        table=pl.DataFrame(rows, schema=TABLE | dict.fromkeys(also, pl.String())),
        layout=layout,
        refused=tuple(refused),
        notes=tuple(notes),
        **{name: array[: len(rows)] for name, array in arrays.items()},
    )


def from_prepared(
    prepared: Prepared,
    splits: tuple[str, ...],
    *,
    lesions_only: bool = False,
    within: Within | None = None,
    also: Sequence[str] = (),
) -> ImageSet:
    """The images of some ``registry.SPLITS`` of a prepared folder, all or ``within``; raises as `read_set` does.

    ``also`` are columns of texts that the table gets besides; all of them are the folder's.
    """
    table = prepared.table.filter(pl.col("split").is_in(splits))
    notes: tuple[str, ...] = ()
    if within is not None:
        chosen = within.rows(
            prepared.folder, table[within.column].to_list() if within.column in table.columns else None
        )
        table, notes = (table, (within.absent,)) if chosen is None else (table[chosen.tolist()], ())
    if lesions_only:
        table = table.filter(pl.col("lesions") > 0)
    rows = table["row"].to_numpy()
    boxes = zip(*(table[name] for name in ("scale", "left", "top", "inner_width", "inner_height")), strict=True)
    side = prepared.images.shape[1]
    valid = np.stack([Letterbox(*box).valid for box in boxes]) if len(rows) else np.zeros((0, side, side), np.bool_)
    columns = table.select(
        *("id", "class", "group", "sha256", "width", "height", "lesions", *also),
        pl.col("mask_files").list.len().cast(pl.Int64),
        file="image_file",
        colour="overlay_colour",
        text="overlay_text",
        calipers="overlay_calipers",
        mode=pl.lit(None, pl.String),
        **dict.fromkeys(("background", *GRID), pl.lit(None, pl.String)),
    ).select([*TABLE, *also])
    return ImageSet(
        name=prepared.folder.resolve().name,
        images=np.asarray(prepared.images[rows]),
        masks=np.asarray(prepared.masks[rows]) > 0,
        valid=valid,
        overlays=np.asarray(prepared.overlays[rows]),
        clean=np.asarray(prepared.clean[rows]),
        table=columns,
        layout="prepared folder",
        notes=notes,
    )


def background_mode(images: ImageSet) -> Backgrounds:
    """What the set's lesions were painted into, by its own records: ``real`` where any image was."""
    backgrounds = images.table["background"].drop_nulls().unique().to_list()
    if any(background != SYNTHETIC for background in backgrounds):
        return "real"
    return "synthetic" if backgrounds else "unknown"


def _draw(count: int, limit: int | None, seed: int) -> NDArray[np.int64]:
    """Positions of at most ``limit`` of ``count`` images, in order."""
    if limit is None or count <= limit:
        return np.arange(count)
    return np.sort(np.random.default_rng([seed, count]).permutation(count)[:limit])


class _Frame(NamedTuple):
    """One image in the working frame: its arrays in an `ImageSet`, a ``(64, 64)`` thumbnail, the table's row, notes."""

    arrays: dict[str, NDArray[Any]]
    thumbnail: NDArray[np.float32]
    row: dict[str, Any]
    notes: tuple[str, ...]


def _try_frame(item: Item) -> _Frame | BusigenError:
    """Read an item and fit it into the working frame; an error where a file is missing, damaged or no image.

    No mask is refused for what it marks: empty, inverted or surplus ones are what an audit looks for.
    """
    try:
        file, lesions, mask_files = item.read()
        image, box = letterbox(file.pixels)
        refuse_fault(file.path.name, image, box.valid)
    except BusigenError as error:
        return error
    mask = letterbox_mask(lesions, box)
    overlays = cleaned(file.pixels, file.coloured)
    valid = np.zeros_like(box.valid)
    valid[without_bars(image) if box.width == box.height else box.slices] = True
    arrays = {
        "images": image,
        "masks": mask,
        "valid": valid,
        "overlays": letterbox_coverage(overlays.painted, box) > 0,
        "clean": letterbox(overlays.clean)[0],
    }
    row = {
        "id": item.id,
        "class": item.image_class,
        "file": item.file,
        "sha256": file.sha256,
        "width": file.width,
        "height": file.height,
        "mode": file.mode,
        "colour": file.coloured is not None and bool(file.coloured.mean() > MARK_SHARE),
        "lesions": int(ndimage.label(mask, structure=np.ones((3, 3)))[1]),
        "text": overlays.text,
        "calipers": overlays.calipers,
        "background": item.background,
        "mask_files": mask_files,
        **{name: _text(item.columns.get(name)) for name in GRID},
    }
    return _Frame(arrays, thumbnail(file.pixels), row, file.notes)


def _text(value: object) -> str | None:
    return printable(value[:NAME_LIMIT]) if isinstance(value, str) else None


def thumbnails(images: ImageSet) -> NDArray[np.float32]:
    """``float32 (N, 64, 64)`` of the images without their letterbox bars, for ``data.splits``."""
    small = np.zeros((len(images), 64, 64), np.float32)
    for row, (image, valid) in enumerate(zip(images.images, images.valid, strict=True)):
        if valid.any():
            small[row] = thumbnail(np.ascontiguousarray(image[around(valid, 0)]))
    return small
