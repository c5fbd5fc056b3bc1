"""The sets of an audit, of any layout, in the working frame; and which real images the generator has not seen."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import around
from busigen.data.images import MARK_SHARE, refuse_fault
from busigen.data.inpainting import without_overlays
from busigen.data.letterbox import Letterbox, letterbox, letterbox_coverage, letterbox_mask
from busigen.data.overlays import find_overlays, suspect_mask
from busigen.data.prepared import INFO, Prepared, unfinished
from busigen.data.sources.records import Refusal, counted
from busigen.data.splits import NEAR_DUPLICATE, copies_of, near_duplicate_groups, thumbnail, unit
from busigen.errors import BusigenError, InputError
from busigen.evaluation.context import Backgrounds, ImageSet, fingerprint
from busigen.evaluation.reading.listing import GRID, GROUP, LEVEL, NAME_LIMIT, Item, list_set
from busigen.evaluation.reading.within import Within
from busigen.evaluation.statistics.grouped import rows_by_group, take
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

BAR_LEVEL, BAR_WIDTH = 6, 3
"""Greatest grey level in a letterbox bar, and least width of one: anything thinner may be the image's own dark rim."""

READ_FACTOR = 4  # So many times the limit are read before whole groups are drawn: reading takes the time

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
    overlays = find_overlays(file.pixels)
    painted = overlays.mask if file.coloured is None else overlays.mask | file.coloured
    clean, _ = letterbox(without_overlays(file.pixels, suspect_mask(file.pixels, file.coloured, overlays.mask)))
    arrays = {
        "images": image,
        "masks": mask,
        "valid": _valid(image, box),
        "overlays": letterbox_coverage(painted, box) > 0,
        "clean": clean,
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


def _valid(image: NDArray[np.uint8], box: Letterbox) -> NDArray[np.bool_]:
    """Pixels that are image: without the bars added here, and without those that a square file brought along."""
    valid = box.valid
    if box.width != box.height:
        return valid
    for axis in (0, 1):
        bright = np.flatnonzero(image.max(axis=1 - axis) > BAR_LEVEL)
        before, after = (int(bright[0]), len(image) - 1 - int(bright[-1])) if bright.size else (0, 0)
        # A letterbox is centred, a dark rim need not be.
        if min(before, after) >= BAR_WIDTH and abs(before - after) <= 1:
            np.moveaxis(valid, axis, 0)[[*range(before), *range(len(image) - after, len(image))]] = False
            break
    return valid


def read_inputs(
    synthetic: Path,
    real: Path,
    train_split: Path | None,
    external: Path | None,
    limit: int | None,
    seed: int,
    frames: int,
    progress: Progress,
    within: Within | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sets of an audit by their name in `AuditContext`, and what the report says about them.

    At most ``limit`` images each are kept, and no training images among the real ones. ``within`` holds for the real
    set, and for the synthetic one if that has the column. Raises as `audit` does.
    """
    notes: list[str] = []
    if within is not None:
        notes.append(f"Judged within {within.column} = {within.value}: only such real images are compared with.")
    read_limit = None if limit is None else READ_FACTOR * limit
    prepared = None if train_split is None else Prepared.open(train_split)
    try:
        reading: dict[str, Any] = {"limit": read_limit, "seed": seed, "frames": frames}
        # The real set first: its column has to be there, and who misspells it should not wait for the other.
        judge = read_set(real, progress, within=within and replace(within, required=True), **reading)
        made = read_set(synthetic, progress, within=within, **reading)
        other = None if external is None else read_set(external, progress, **reading)
    finally:
        progress.stop()
    files = set(judge.table["sha256"])
    shared = sum(sha256 in files for sha256 in made.table["sha256"])
    if shared == len(made):
        raise InputError(
            f"every image of {synthetic} is one of {real} as well: a set cannot be judged by itself.",
            fix="Give the synthetic set first and real images with --real.",
        )
    if shared:
        notes.append(f"{shared} of the synthetic images are also files of the real set: the figures flatter them.")
    train = None
    if prepared is not None:
        parted = split_by_training(judge, prepared)
        judge, train = parted.held_out, parted.train
        if not len(judge):
            raise InputError(
                f"every image of {real} trained the generator, or is a near-duplicate of one that did.",
                fix="Give real images that it has not seen, such as the prepared folder with its val and test splits.",
            )
        notes.append(
            f"Of the real images read, {parted.same} trained the generator and {parted.near} more resemble a training "
            f"image or share its patient; {len(judge)} are held out, and only these are compared with."
        )
        if other is not None:
            other = _external(other, external, prepared, notes)
    else:
        notes.append(
            "Nobody said which real images trained the generator: if the real set holds some, the figures flatter it. "
            "--train-split names them."
        )

    def cut(name: str, images: ImageSet) -> ImageSet:
        kept = draw(images, limit, seed)
        if len(kept) < len(images) or len(images) == read_limit:
            notes.append(f"The {name} set is judged by {len(kept)} images, drawn at random in whole groups.")
        return kept

    parts = {
        "synthetic": cut("synthetic", made),
        "real": cut("real", judge),
        "train": train,
        "external": other and cut("external", other),
    }
    notes.extend(f"Of the {name} set: {note}." for name, part in parts.items() if part for note in part.notes)
    sets = {name: None if part is None else _description(part) for name, part in parts.items()}
    counts = {
        name: f"{part['images']} images with {part['lesions']} lesions in {part['groups']} groups"
        + (f"; {len(part['refused'])} files refused" if part["refused"] else "")
        for name, part in sets.items()
        if part is not None
    }
    return {**parts, "backgrounds": background_mode(made)}, {"sets": sets, "counts": counts, "notes": notes}


def _external(images: ImageSet, path: Path | None, prepared: Prepared, notes: list[str]) -> ImageSet:
    """The external images that trained nothing: the utility section's networks learn from the training images."""
    parted = split_by_training(images, prepared)
    kept = len(parted.held_out)
    if not kept:
        raise InputError(
            f"--external {path}: every image trained the generator, or is a near-duplicate of one that did.",
            fix="Give real images that it has not seen, or leave --external out.",
        )
    if gone := len(images) - kept:
        reasons = {
            "trained the generator": parted.same,
            "resemble a training image or share its patient": parted.near,
            "are in no split of the prepared folder": gone - parted.same - parted.near,
        }
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        notes.append(f"Of the external images read, {gone} were left out ({listed}); {kept} are tested on.")
    return parted.held_out


def draw(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    """At most ``limit`` images: whole groups in random order, the last of them cut to fit."""
    if limit is None or len(images) <= limit:
        return images
    rows = take(rows_by_group(images.groups), limit, np.random.default_rng([seed, len(images)]))
    return images.take(np.sort(rows))


def _description(images: ImageSet) -> dict[str, Any]:
    """What a report says of a set, in JSON types."""
    return {
        "name": images.name,
        "layout": images.layout,
        "images": len(images),
        "lesions": len(np.flatnonzero(images.masks.any(axis=(1, 2)))),
        "groups": int(images.table["group"].n_unique()),
        "classes": dict(images.table["class"].value_counts().sort("class").iter_rows()),
        "refused": [refusal.to_dict() for refusal in images.refused],
        "notes": list(images.notes),
        "fingerprint": fingerprint(images),
    }


@dataclass(frozen=True)
class TrainingSplit:
    """Real images by what the generator knows of them.

    ``held_out`` neither trained it nor are neighbours of such; ``train`` are all that did, whether or not the real set
    holds them. Counted in the real set: training images by hash or name, and their near-duplicates or patients' others.
    """

    held_out: ImageSet
    train: ImageSet
    same: int
    near: int


def split_by_training(real: ImageSet, prepared: Prepared) -> TrainingSplit:
    """Part a real set into what trained the generator and what did not.

    An image that the prepared folder knows by its file's sha256 keeps the split it has there. Any other counts as
    training where its name is a training image's, it looks like one (thumbnail correlation above
    ``splits.NEAR_DUPLICATE``), is a mirrored, turned or cropped copy of one, or where one of its group does.
    """
    train = from_prepared(prepared, ("train",))
    known = dict(prepared.table.select("sha256", "split").iter_rows())
    splits = np.array([known.get(sha256, "") for sha256 in real.table["sha256"]], dtype=np.str_)
    stranger = splits == ""
    names = set(train.table["id"])
    same = (splits == "train") | (stranger & np.array([name in names for name in real.table["id"]], dtype=np.bool_))
    like = same.copy()
    if stranger.any():
        unknown = real.take(stranger)
        small, other = thumbnails(unknown), thumbnails(train)
        aspects, others = ((part.table["width"] / part.table["height"]).to_numpy() for part in (unknown, train))
        like[stranger] |= copies_of(small, aspects, other, others)
        if len(train):
            like[stranger] |= (unit(small) @ unit(other).T).max(axis=1) > NEAR_DUPLICATE
    related = like | (stranger & np.isin(real.groups, np.unique(real.groups[like])))
    # Images that the prepared folder excluded link its splits: they prove nothing on either side.
    held_out = real.take(~related & ~np.isin(splits, ["train", "excluded"]))
    return TrainingSplit(held_out, train, same=int(same.sum()), near=int(related.sum() - same.sum()))


def thumbnails(images: ImageSet) -> NDArray[np.float32]:
    """``float32 (N, 64, 64)`` of the images without their letterbox bars, for ``data.splits``."""
    small = np.zeros((len(images), 64, 64), np.float32)
    for row, (image, valid) in enumerate(zip(images.images, images.valid, strict=True)):
        if valid.any():
            small[row] = thumbnail(np.ascontiguousarray(image[around(valid, 0)]))
    return small
