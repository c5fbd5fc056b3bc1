"""Finishing a dataset: manifest, preview, cards and, last of all, ``dataset.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from busigen.errors import IntegrityError
from busigen.files import atomic_file, atomic_path, write_json
from busigen.foreign import open_file
from busigen.records import read_json
from busigen.registry import LESION_CLASSES, RESOLUTION, SAMPLE_CLASSES
from busigen.runtime.dataset.card import dataset_card
from busigen.runtime.dataset.croissant import croissant
from busigen.runtime.dataset.format import (
    CARD_FILE,
    CROISSANT_FILE,
    DATASET_FILE,
    FINISHED_FILES,
    MANIFEST_FILE,
    PREVIEW_FILE,
    RUN_FILE,
    Sample,
)
from busigen.runtime.dataset.reader import Dataset, plan_of
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, read_table, write_joined

COLOURS = {"benign": (0, 200, 255), "malignant": (255, 96, 64)}  # RGB; the colour-blind can tell them apart, too
_LABEL_HEIGHT, _FONT_SIZE = 22, 14
_ROW_GROUP = 1 << 12  # rows that are gathered: 65,536 took 73 MB for 100,000 rows, these 14, for 3 % more on disk
_TILES = 32  # samples of a grid in the preview, or one background's, if they are more
_MEND = "Run `busigen verify --repair`, or the same `busigen generate` command again: both make it anew."
_DERIVED = ("samples", "classes", "rejected", "files", "shards")


def contact_sheet(samples: Sequence[Sample], per_row: int = 4, note: str = "") -> Image.Image:
    """An RGB image of some samples a row: each as it is, beside it with its mask's contour, its class below.

    Below a grid's stand its background's number and its levels; a ``note`` stands below all.
    """
    per_row, height = min(per_row, len(samples)), RESOLUTION + _LABEL_HEIGHT
    end = height * -(-len(samples) // per_row)
    sheet = Image.new("RGB", (2 * RESOLUTION * per_row, end + (_LABEL_HEIGHT if note else 0)))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(_FONT_SIZE)
    for position, sample in enumerate(samples):
        left, top = position % per_row * 2 * RESOLUTION, position // per_row * height
        colour = COLOURS.get(sample.label, (255, 255, 255))
        sheet.paste(Image.fromarray(sample.image), (left, top))
        sheet.paste(Image.fromarray(outline(sample.image, sample.mask, colour)), (left + RESOLUTION, top))
        said = f"{sample.label} {sample.index}"
        if sample.row.get("grid_level") is not None:
            said = f"background {sample.row['grid_group']}: {sample.row['grid_level']}"
        draw.text((left + 4, top + RESOLUTION + 2), said, fill=colour, font=font)
    draw.text((4, end + 2), note, fill=(255, 255, 255), font=font)
    return sheet


def outline(image: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Draw a one-pixel contour around an (H, W) mask, outside it, in RGB from 0 to 255, as (H, W, 3) uint8."""
    painted = np.repeat(image[..., None], 3, axis=2)
    painted[ndimage.binary_dilation(mask) & ~mask] = colour
    return painted


def pick_evenly(manifest: pl.DataFrame, per_class: int = 8, classes: Sequence[str] = LESION_CLASSES) -> list[int]:
    """Indices of up to ``per_class`` samples of each of ``classes``, spread evenly over the dataset, in index order."""
    picked: list[int] = []
    for label in classes:
        indices = manifest.filter(pl.col("class") == label)["index"].to_numpy()
        if indices.size:
            positions = np.linspace(0, indices.size - 1, min(per_class, indices.size)).round().astype(int)
            picked += [int(index) for index in indices[positions]]
    return sorted(picked)


class FileProvider:
    """Provides shards' files in a dataset's folder while a block runs, or raises. This one: all are there already."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def files(self, records: Sequence[FileRecord]) -> AbstractContextManager[None]:
        """A context in which these files are in the folder."""
        return nullcontext()

    def tables(self, records: Sequence[ShardRecord]) -> Iterator[pl.DataFrame]:
        """The tables of the shards, one after the other."""
        for record in records:
            path = self.folder / record.parquet.file
            try:
                yield read_table(path, record.count)
            except pl.exceptions.PolarsError as error:
                raise IntegrityError(f"{path} cannot be read as a table: {error}.", fix=_MEND) from error


def finish(
    folder: Path, run: Mapping[str, Any], records: Sequence[ShardRecord], provider: FileProvider | None = None
) -> None:
    """Write every file that describes the whole dataset, ``dataset.json`` last.

    ``run`` is its run record, ``records`` are those of all shards, in order, whose files ``provider`` provides; None
    where they are all in ``folder``. An IntegrityError says that a shard was damaged since it was written.
    """
    provider = provider or FileProvider(folder)
    write_manifest(folder, records, provider)
    info = dataset_info(run, records, {MANIFEST_FILE: FileRecord.of(folder, MANIFEST_FILE)})
    dataset = Dataset(folder=folder, info=info, plan=plan_of(info, folder / RUN_FILE))

    with open_file(folder / MANIFEST_FILE) as table:
        picked = pick_evenly(pl.read_parquet(table, columns=["index", "class"]), classes=SAMPLE_CLASSES)
    per_row, note = 4, ""
    if cells := info["fingerprint"].get("cells"):
        # The first backgrounds; the attribute that was named last goes across.
        picked = list(dataset.plan.span)[: max(cells, _TILES // cells * cells)]
        per_row = info["fingerprint"]["vary"].rpartition(",")[2].count("/") + 1
        shown, all_of_them = (len(one) // cells for one in (picked, dataset.plan.span))
        note = f"{shown} of {all_of_them} backgrounds" if shown < all_of_them else ""
    samples = []
    for record in records:
        if inside := [index for index in picked if record.first <= index < record.first + record.count]:
            with provider.files([record.tar]):
                samples += dataset.samples(inside)
    sheet = contact_sheet(samples, per_row, note)
    with atomic_file(folder / PREVIEW_FILE) as file:
        # Pillow's default of 6 takes three times as long and makes a larger file.
        sheet.save(file, "PNG", compress_level=3)
    with atomic_file(folder / CARD_FILE) as file:
        file.write(dataset_card(info).encode())
    write_json(folder / CROISSANT_FILE, croissant(info))
    write_json(folder / DATASET_FILE, info)


def is_finished(folder: Path, run: Mapping[str, Any], records: Sequence[ShardRecord]) -> bool:
    """Whether every top-level file is there, and ``dataset.json`` is what ``finish`` writes for this run."""
    try:
        info = read_json(folder / DATASET_FILE, shards=len(records))
        wanted = dataset_info(run, records, {MANIFEST_FILE: FileRecord.of(folder, MANIFEST_FILE)})
    except (FileNotFoundError, ValueError):
        return False
    return bool(info == wanted) and all((folder / name).is_file() for name in FINISHED_FILES)


def write_manifest(folder: Path, records: Sequence[ShardRecord], provider: FileProvider | None = None) -> None:
    """Join the shards' tables into the manifest, in index order, without holding all rows in memory."""
    rows = (provider or FileProvider(folder)).tables(records)
    with atomic_path(folder / MANIFEST_FILE) as path:
        write_joined(path, rows, row_group_size=_ROW_GROUP)


def dataset_info(
    run: Mapping[str, Any], records: Sequence[ShardRecord], files: Mapping[str, FileRecord]
) -> dict[str, Any]:
    """Content of ``dataset.json``: the run record, what the shards add up to, and records of further files."""
    classes, rejected = Counter[str](), Counter[str]()
    for record in records:
        classes.update(record.classes)
        rejected.update(record.rejected)
    return {
        **run,
        "samples": sum(record.count for record in records),
        "classes": dict(sorted(classes.items())),
        "rejected": dict(sorted(rejected.items())),
        "files": {name: asdict(record) for name, record in sorted(files.items())},
        "shards": [
            {name: listed[name] for name in ("number", "first", "count", "tar", "parquet")}
            for listed in (asdict(record.counted()) for record in records)
        ],
    }


def run_of(info: Mapping[str, Any]) -> dict[str, Any]:
    """The run record inside ``dataset.json``: all but what :func:`dataset_info` adds."""
    return {name: value for name, value in info.items() if name not in _DERIVED}
