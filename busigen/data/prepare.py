"""Labelled folders to a prepared folder: one table, and arrays with one row per image."""

from __future__ import annotations

import io
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import polars as pl
from numpy.lib import format as npy
from numpy.typing import NDArray

from busigen import __version__
from busigen.data import prepared as schema
from busigen.data.images import MARK_SHARE, read_image, refuse_fault, scan_row
from busigen.data.inpainting import cleaned
from busigen.data.letterbox import letterbox, letterbox_coverage
from busigen.data.masks import label_lesions, read_lesions
from busigen.data.prepared import Prepared
from busigen.data.sources.frames import Looked, refuse_frames
from busigen.data.sources.read import read_source
from busigen.data.sources.records import Listing, Record, Refusal, counted, named
from busigen.data.splits import EXCLUDED, assign_splits, class_conflicts, near_duplicate_groups, thumbnail
from busigen.errors import BusigenError, InputError, OutputError
from busigen.files import is_temporary, json_bytes, leftovers, make_folder, publish, sha256_of, temporary_name
from busigen.records import read_checked
from busigen.registry import BIRADS, RESOLUTION
from busigen.text import printable

Progress = Callable[[int, int], None]  # Called with (images looked at, images in all).


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did: counts of images, what was left out and why, and what a person should know (``notes``).

    ``groups`` counts those of near-duplicates and patients, ``conflicts`` images whose frame also stands under another
    class, ``overlays`` suspected ones by kind, ``kept_splits`` images that kept the split of an earlier run.
    """

    out: Path
    images: int
    by_class: dict[str, int]
    by_source: dict[str, int]
    by_split: dict[str, int]
    by_class_and_split: dict[str, dict[str, int]]
    groups: int
    conflicts: int
    overlays: dict[str, int]
    kept_splits: int
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...]
    split_hash: str
    seconds: float


def prepare(
    sources: Sequence[Path],
    out: Path,
    *,
    seed: int = 0,
    strict: bool = False,
    mask_values: Collection[int] = (),
    frames: int = 1,
    progress: Progress | None = None,
    looked: Looked | None = None,
) -> PrepareReport:
    """Read labelled folders and write a prepared folder.

    Files that are damaged, missing or mismatched are named in the report and left out; the rest is prepared. A run
    into an existing prepared folder replaces it and keeps the split of every image it held.

    ``sources`` have any of the layouts of `busigen.data.sources.read.LAYOUTS`; ``seed`` and the groups' names decide
    the splits; ``strict`` stops at the first file that would be left out; ``mask_values`` are the ``values`` of
    `busigen.data.masks.read_mask`; of each DICOM file at most ``frames`` frames are taken, and ``looked`` is told of
    each while the sources are listed.

    Raises:
        UsageError: ``frames`` is not positive.
        InputError: A source has no known layout, none of its images is usable, or ``strict`` met a bad file.
        OutputError: ``out`` holds something else, was prepared with another seed, or cannot be written.
        IntegrityError: ``out`` was prepared earlier and changed since.
    """
    start = time.perf_counter()
    out = Path(out)
    earlier = _earlier_splits(out, seed)
    listings = _list_all(sources, out, refuse_frames(frames), looked)
    refused = [refusal for listing in listings for refusal in listing.refused]
    if strict and refused:
        raise refused[0].to_error()
    with _writing(out), ExitStack() as failing:
        make_folder(out)
        for left in (*(out / name for name in schema.PARTIAL), *leftovers(out, schema.WRITTEN)):
            left.unlink(missing_ok=True)
        places = {name: out / temporary_name(name) for name in schema.FILES}
        for place in places.values():
            failing.callback(place.unlink, missing_ok=True)
        notes = [note for listing in listings for note in listing.notes]
        rows, thumbnails = _write_arrays(listings, places, refused, notes, mask_values, strict, progress)
        table = _tabulate(rows, thumbnails, earlier, seed)
        # Through memory: polars takes a path for a pattern, and a full disk is to be an OSError.
        content = io.BytesIO()
        table.write_parquet(content)
        places[schema.TABLE].write_bytes(content.getbuffer())
        report = _report(out, table, earlier, refused, notes, time.perf_counter() - start)
        places[schema.INFO].write_bytes(json_bytes(_info(report, places, seed)))
        failing.pop_all()
        publish({out / name: place for name, place in places.items()})
    return report


def _list_all(sources: Sequence[Path], out: Path, frames: int, looked: Looked | None) -> list[Listing]:
    if not sources:
        raise InputError("No source folder was given.", fix="Name at least one folder of images and masks.")
    listings = [read_source(Path(source), skip=out, frames=frames, looked=looked) for source in sources]
    seen: dict[str, Path] = {}
    for listing in listings:
        for record in listing.records:
            other = seen.setdefault(record.id, listing.folder)
            if other != listing.folder:
                raise InputError(
                    f"Two sources name an image '{record.id}': {other} and {listing.folder}.",
                    fix="Give each source once, and give plain folders different names.",
                )
    times = Counter(listing.folder for listing in listings)
    if twice := [folder for folder in times if times[folder] > 1]:
        raise InputError(f"The source {twice[0]} is given twice.", fix="Give it once.")
    return listings


@dataclass(frozen=True)
class Sample:
    """One image that passed: arrays ``(256, 256)`` by name (`busigen.data.prepared.ARRAYS`), and table columns."""

    arrays: dict[str, NDArray[Any]]
    thumbnail: NDArray[np.float32]
    row: dict[str, Any]
    notes: tuple[str, ...]


def read_sample(record: Record, values: Collection[int] = ()) -> Sample:
    """Read a record's files, check them and fit them into the working frame; ``values`` are those of `read_mask`.

    An InputError says that a file is missing, damaged or mismatched, the image is none, the mask is none of lesions, or
    contradicts the class.
    """
    file = read_image(record.image)
    image, box = letterbox(file.pixels)
    refuse_fault(file.path.name, image, box.valid)
    notes = list(file.notes)
    lesions = read_lesions(record, file, values, notes)
    labels = label_lesions(lesions, box)
    if lesions and not labels.any():
        raise InputError(
            f"{record.image.name}: its lesion is smaller than one pixel of the working frame.",
            fix="Crop the image around the breast tissue or correct the mask.",
        )
    overlays = cleaned(file.pixels, file.coloured)
    arrays = {
        "images": image,
        "masks": labels,
        "overlays": letterbox_coverage(overlays.painted, box) > 0,
        "clean": letterbox(overlays.clean)[0],
        "suspects": letterbox_coverage(overlays.suspects, box) > 0,
    }
    row = {
        "id": record.id,
        "class": record.image_class,
        "source": record.source,
        "patient": record.patient,
        "sha256": file.sha256,
        "width": file.width,
        "height": file.height,
        "scale": box.scale,
        "left": box.left,
        "top": box.top,
        "inner_width": box.width,
        "inner_height": box.height,
        "mask_area": float(np.logical_or.reduce(lesions).mean()) if lesions else 0.0,
        "lesions": int(labels.max()),
        "overlay_colour": file.coloured is not None and bool(file.coloured.mean() > MARK_SHARE),
        "overlay_text": overlays.text,
        "overlay_calipers": overlays.calipers,
        "birads": record.birads,
        "scanner": record.scanner,
        **(scan_row(file, box.scale) if file.full else {}),
    }
    return Sample(arrays, thumbnail(file.pixels), row, tuple(dict.fromkeys(notes)))


def _write_arrays(
    listings: Sequence[Listing],
    places: Mapping[str, Path],
    refused: list[Refusal],
    notes: list[str],
    mask_values: Collection[int],
    strict: bool,
    progress: Progress | None,
) -> tuple[list[dict[str, Any]], NDArray[np.float32]]:
    """Write the arrays row by row; returns the table's rows and the thumbnails, ``float32 (N, 64, 64)``.

    ``refused`` gets the images that cannot be used, ``notes`` how the others were read.
    """
    rows: list[dict[str, Any]] = []
    thumbnails: list[NDArray[np.float32]] = []
    readings: dict[str, list[str]] = {}
    records = [(listing, record) for listing in listings for record in listing.records]
    with ExitStack() as stack:
        streams = {name: stack.enter_context(places[file].open("wb")) for name, file in schema.ARRAYS.items()}
        _write_headers(streams, 0)
        for done, (listing, record) in enumerate(records, start=1):
            file = listing.relative(record.image)
            try:
                sample = read_sample(record, mask_values)
            except InputError as error:
                refusal = Refusal(file, error.problem, error.fix)
                if strict:
                    raise refusal.to_error() from error
                refused.append(refusal)
            else:
                for note in sample.notes:
                    readings.setdefault(note, []).append(file)
                for name, stream in streams.items():
                    stream.write(sample.arrays[name].tobytes())
                thumbnails.append(sample.thumbnail)
                mask_files = [listing.relative(mask) for mask in record.masks]
                rows.append({"row": len(rows), **sample.row, "image_file": file, "mask_files": mask_files})
            if progress is not None:
                progress(done, len(records))
        _write_headers(streams, len(rows))
    if not rows:
        first = f" The first problem: {refused[0].file}: {refused[0].problem}" if refused else ""
        rest = f" Refused as well: {named(refusal.file for refusal in refused[1:])}." if len(refused) > 1 else ""
        raise InputError(f"No usable image was found.{first}{rest}", fix="Correct the files, or give another folder.")
    notes.extend(counted(note, files) for note, files in readings.items())
    return rows, np.stack(thumbnails)


def _write_headers(streams: Mapping[str, IO[bytes]], rows: int) -> None:
    """Write the arrays' headers, which NumPy pads so that the number of rows can grow in place."""
    for name, stream in streams.items():
        stream.seek(0)
        header = {"descr": npy.dtype_to_descr(schema.DTYPES[name]), "fortran_order": False}
        npy.write_array_header_1_0(stream, {**header, "shape": (rows, RESOLUTION, RESOLUTION)})


def _tabulate(
    rows: Sequence[dict[str, Any]], thumbnails: NDArray[np.float32], earlier: dict[str, str], seed: int
) -> pl.DataFrame:
    """The table, with groups, splits and conflicts."""
    patients = [row["patient"] for row in rows]
    known = [earlier.get(row["sha256"]) for row in rows]
    aspects = [row["width"] / row["height"] for row in rows]

    def regroup(chosen: NDArray[np.int64]) -> NDArray[np.int64]:
        return near_duplicate_groups(thumbnails[chosen], [patients[k] for k in chosen], [aspects[k] for k in chosen])

    splits, groups = assign_splits([row["id"] for row in rows], patients, known, regroup, seed=seed)
    conflicts = class_conflicts(thumbnails, [row["class"] for row in rows], aspects)
    complete = [
        {**row, "group": int(group), "split": split, "class_conflict": bool(conflict)}
        for row, group, split, conflict in zip(rows, groups, splits, conflicts, strict=True)
    ]
    columns = schema.COLUMNS if all(row.keys().isdisjoint(schema.SCAN_COLUMNS) for row in rows) else schema.ALL_COLUMNS
    return pl.DataFrame(complete, schema=columns)


def _report(
    out: Path,
    table: pl.DataFrame,
    earlier: dict[str, str],
    refused: Sequence[Refusal],
    notes: list[str],
    seconds: float,
) -> PrepareReport:
    """The report of a table; ``notes`` gets which images lost their split, and what nothing is learnt from."""
    by_class = table.group_by("class", maintain_order=True)
    before = [earlier.get(sha256) for sha256 in table["sha256"]]
    kept = [was == now for was, now in zip(before, table["split"], strict=True)]
    parted = [id_ for id_, was, same in zip(table["id"], before, kept, strict=True) if was is not None and not same]
    if parted:
        notes.append(counted("of the earlier run left out of every split, for they link two", parted))
    other = table.filter(pl.col("birads").is_not_null() & ~pl.col("birads").is_in(BIRADS))
    if other.height:
        kinds = Counter(other["birads"].to_list())
        said = named(f"{printable(category)!r} ({count})" for category, count in kinds.most_common())
        learnt = ", ".join(BIRADS)
        notes.append(f"{other.height:,} with a BI-RADS category that is not learnt, which are {learnt}: {said}")
    return PrepareReport(
        out=out,
        images=table.height,
        by_class=dict(Counter(table["class"])),
        by_source=dict(Counter(table["source"])),
        by_split=dict(Counter(table["split"])),
        by_class_and_split={str(name): dict(Counter(part["split"])) for (name,), part in by_class},
        groups=table["group"].n_unique(),
        conflicts=int(table["class_conflict"].sum()),
        overlays={kind: int(table[f"overlay_{kind}"].sum()) for kind in ("colour", "text", "calipers")},
        kept_splits=sum(kept),
        refused=tuple(refused),
        notes=tuple(notes),
        split_hash=schema.split_hash(table["sha256"], table["split"]),
        seconds=seconds,
    )


def _info(report: PrepareReport, places: Mapping[str, Path], seed: int) -> dict[str, object]:
    """Content of ``prepared.json``; ``places`` says where each file is now."""
    return {
        "schema": schema.SCHEMA_VERSION,
        "busigen": __version__,
        "seed": seed,
        "images": report.images,
        "classes": report.by_class,
        "sources": report.by_source,
        "splits": report.by_split,
        "classes_and_splits": report.by_class_and_split,
        "groups": report.groups,
        "conflicts": report.conflicts,
        "excluded": report.by_split.get(EXCLUDED, 0),
        "overlays": report.overlays,
        "refused": [refusal.to_dict() for refusal in report.refused],
        "notes": list(report.notes),
        "split_hash": report.split_hash,
        "files": {name: sha256_of(places[name]) for name in schema.FILES[:-1]},
    }


def _earlier_splits(out: Path, seed: int) -> dict[str, str]:
    """Splits by image hash of the prepared folder that ``out`` already is; empty if it is new."""
    if not out.exists() and not out.is_symlink():
        return {}
    if not out.is_dir():
        raise OutputError(f"{out} is a file.", fix="Name a folder to write the prepared data into.")
    with _writing(out):
        names = {path.name for path in out.iterdir()}
        if linked := [name for name in sorted(names) if (out / name).is_symlink()]:
            raise OutputError(f"{out / linked[0]} is a link, and would be written through.", fix="Name a new folder.")
        _publish_again(out)
    if not (out / schema.INFO).is_file():
        # A run that was killed leaves files of ours without the one that is written last.
        # Such as these, none of which is still being written, may be anybody's.
        written = {name for name in names if name in schema.PARTIAL or is_temporary(name, schema.WRITTEN)}
        if names - written - set(schema.FILES) or (names and not written):
            raise OutputError(f"{out} is not empty and holds no prepared data.", fix="Name a new or empty folder.")
        return {}
    try:
        prepared = Prepared.open(out)
    except InputError as error:
        raise OutputError(f"{out} holds another {schema.INFO}: {error.problem}", fix="Name a new folder.") from error
    if prepared.info["seed"] != seed:
        raise OutputError(
            f"{out} was prepared with seed {prepared.info['seed']}, not {seed}; its images keep their splits.",
            fix=f"Use seed {prepared.info['seed']}, or write to another folder.",
        )
    return dict(zip(prepared.table["sha256"], prepared.table["split"], strict=True))


def _publish_again(out: Path) -> None:
    """Publish what a killed run had finished: what it was to replace may be gone already."""
    for record in leftovers(out, re.compile(re.escape(schema.INFO))):
        try:
            files = read_checked(schema.PreparedRecord, record, fix="")["files"]
            places = {out / name: _file_of(out, name, files[name]) for name in schema.FILES[:-1]}
        except (BusigenError, LookupError):
            continue  # It was not finished.
        publish({**places, out / schema.INFO: record})


def _file_of(out: Path, name: str, sha256: str) -> Path:
    """The file with this hash that is called ``name`` or was to be; a ``LookupError`` if there is none."""
    for path in (out / name, *leftovers(out, re.compile(re.escape(name)))):
        if path.is_file() and sha256_of(path) == sha256:
            return path
    raise LookupError(name)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "Check the disk's space and your permissions."
        raise OutputError(f"{out} cannot be written: {error.strerror or error}.", fix=fix) from error
