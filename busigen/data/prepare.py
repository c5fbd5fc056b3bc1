"""Labelled folders to a prepared folder: one table, and arrays with one row per image."""

from __future__ import annotations

import io
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import polars as pl
from numpy.lib import format as npy
from numpy.typing import DTypeLike, NDArray

from busigen import __version__
from busigen.data import prepared as schema
from busigen.data.prepared import Prepared
from busigen.data.sources.read import read_source
from busigen.data.sources.records import Listing, Record, Refusal, counted, named
from busigen.data.sources.samples import Sample, read_sample
from busigen.data.splits import EXCLUDED, assign_splits, class_conflicts, near_duplicate_groups
from busigen.errors import BusigenError, InputError, OutputError
from busigen.files import is_temporary, json_bytes, leftovers, make_folder, publish, sha256_of, temporary_name
from busigen.records import read_checked
from busigen.registry import BIRADS, RESOLUTION
from busigen.text import printable


class RowFile:
    """Appends rows of one shape and type to a ``.npy`` file.

    Args:
        path: The file, overwritten.
        shape: Shape of one row.
        dtype: Type of its values.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self._shape = shape
        self._dtype = np.dtype(dtype)
        self._rows = 0
        self._stream = path.open("wb")
        self._write_header()

    def append(self, row: NDArray[np.generic]) -> None:
        """Write one row.

        Raises:
            ValueError: Its shape or type is not the file's.
        """
        if row.shape != self._shape or row.dtype != self._dtype:
            raise ValueError(f"a row is {self._dtype} {self._shape}, not {row.dtype} {row.shape}")
        self._stream.write(row.tobytes())
        self._rows += 1

    def __enter__(self) -> RowFile:
        """The file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the final number of rows and close."""
        # NumPy pads the header so that the first axis can grow in place.
        self._stream.seek(0)
        self._write_header()
        self._stream.close()

    def _write_header(self) -> None:
        header = {
            "descr": npy.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self._rows, *self._shape),
        }
        npy.write_array_header_1_0(self._stream, header)


Progress = Callable[[int, int], None]
"""Called with (images looked at, images in all)."""


@dataclass(frozen=True)
class PrepareReport:
    """What `prepare` did.

    Attributes:
        out: The prepared folder.
        images: Rows of the table.
        by_class: Images per class.
        by_source: Images per source.
        by_split: Images per split; ``excluded`` only if there are any.
        by_class_and_split: Images per class, then per split.
        groups: Groups of near-duplicates and patients.
        conflicts: Images whose frame also stands under another class.
        overlays: Images with suspected ``colour``, ``text`` and ``calipers``.
        kept_splits: Images that kept the split of an earlier run in the same folder.
        refused: What was left out and why.
        notes: What was passed over, joined, guessed or read otherwise than it is stored, one line a kind.
        split_hash: Fingerprint of who is in which split.
        seconds: Wall time.
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
    progress: Progress | None = None,
) -> PrepareReport:
    """Read labelled folders and write a prepared folder.

    Files that are damaged, missing or mismatched are named in the report and left out; the rest is prepared. A run
    into an existing prepared folder replaces it and keeps the split of every image it held.

    Args:
        sources: Folders in any of the layouts of `busigen.data.sources.read.LAYOUTS`.
        out: The folder to write; created if missing.
        seed: Decides the splits, with the groups' names.
        strict: Stop at the first file that would be left out.
        mask_values: Grey levels of the masks that are lesion, as stored; all others are not. Empty: white, or the only
            label of a mask.
        progress: Called after every image.

    Returns:
        The counts, and what was left out.

    Raises:
        InputError: A source has no known layout, none of its images is usable, or ``strict`` met a bad file.
        OutputError: ``out`` holds something else, was prepared with another seed, or cannot be written.
        IntegrityError: ``out`` was prepared earlier and changed since.
    """
    start = time.perf_counter()
    out = Path(out)
    earlier = _earlier_splits(out, seed)
    listings = _list_all(sources, out)
    refused = [refusal for listing in listings for refusal in listing.refused]
    if strict and refused:
        raise refused[0].to_error()
    with _writing(out), ExitStack() as failing:
        make_folder(out)
        for left in (*(out / f"{name}{schema.PARTIAL}" for name in schema.FILES), *leftovers(out, schema.WRITTEN)):
            left.unlink(missing_ok=True)
        places = {name: out / temporary_name(name) for name in schema.FILES}
        for place in places.values():
            failing.callback(place.unlink, missing_ok=True)
        notes = [note for listing in listings for note in listing.notes]
        samples = _samples(listings, refused, notes, mask_values, strict=strict, progress=progress)
        rows, thumbnails = _write_arrays(samples, places, refused)
        table, kept, parted = _tabulate(rows, thumbnails, earlier, seed)
        # Through memory: polars takes a path for a pattern, and a full disk is to be an OSError.
        content = io.BytesIO()
        table.write_parquet(content)
        places[schema.TABLE].write_bytes(content.getbuffer())
        notes.extend(_table_notes(table, parted))
        report = _report(out, table, kept, refused, notes, time.perf_counter() - start)
        places[schema.INFO].write_bytes(json_bytes(_info(report, places, seed)))
        failing.pop_all()
        publish({out / name: place for name, place in places.items()})
    return report


def _list_all(sources: Sequence[Path], out: Path) -> list[Listing]:
    if not sources:
        raise InputError("No source folder was given.", fix="Name at least one folder of images and masks.")
    listings = [read_source(Path(source), skip=out) for source in sources]
    seen: dict[str, Path] = {}
    for listing in listings:
        for record in listing.records:
            other = seen.setdefault(record.id, listing.folder)
            if other != listing.folder:
                raise InputError(
                    f"Two sources name an image '{record.id}': {other} and {listing.folder}.",
                    fix="Give each source once, and give plain folders different names.",
                )
    folders = Counter(listing.folder for listing in listings)
    twice = [folder for folder, times in folders.items() if times > 1]
    if twice:
        raise InputError(f"The source {twice[0]} is given twice.", fix="Give it once.")
    return listings


def _write_arrays(
    samples: Iterable[tuple[Listing, Record, Sample]], places: Mapping[str, Path], refused: Sequence[Refusal]
) -> tuple[list[dict[str, object]], NDArray[np.float32]]:
    """Write the arrays row by row; returns the rows and the thumbnails, ``float32 (N, 64, 64)``."""
    rows: list[dict[str, object]] = []
    thumbnails: list[NDArray[np.float32]] = []
    frame = (RESOLUTION, RESOLUTION)
    with ExitStack() as stack:
        images, masks, overlays, clean, suspects = (
            stack.enter_context(RowFile(places[schema.ARRAYS[name]], frame, dtype))
            for name, dtype in (
                ("images", np.uint8),
                ("masks", np.uint8),
                ("overlays", np.bool_),
                ("clean", np.uint8),
                ("suspects", np.bool_),
            )
        )
        for listing, record, sample in samples:
            images.append(sample.image)
            masks.append(sample.labels)
            overlays.append(sample.overlay)
            clean.append(sample.clean)
            suspects.append(sample.suspects)
            thumbnails.append(sample.thumbnail)
            files = {
                "image_file": listing.relative(record.image),
                "mask_files": [listing.relative(mask) for mask in record.masks],
            }
            rows.append({"row": len(rows), **sample.row, **files})
    if not rows:
        first = f" The first problem: {refused[0].file}: {refused[0].problem}" if refused else ""
        rest = f" Refused as well: {named(refusal.file for refusal in refused[1:])}." if len(refused) > 1 else ""
        raise InputError(f"No usable image was found.{first}{rest}", fix="Correct the files, or give another folder.")
    return rows, np.stack(thumbnails)


def _samples(
    listings: Sequence[Listing],
    refused: list[Refusal],
    notes: list[str],
    mask_values: Collection[int],
    *,
    strict: bool,
    progress: Progress | None,
) -> Iterator[tuple[Listing, Record, Sample]]:
    """The images that can be used. ``refused`` gets the others; ``notes``, at the end, how images were read."""
    readings: dict[str, list[str]] = {}
    total = sum(len(listing.records) for listing in listings)
    done = 0
    for listing in listings:
        for record in listing.records:
            try:
                sample = read_sample(record, mask_values)
            except InputError as error:
                refusal = Refusal(file=listing.relative(record.image), problem=error.problem, fix=error.fix)
                if strict:
                    raise refusal.to_error() from error
                refused.append(refusal)
            else:
                for note in sample.notes:
                    readings.setdefault(note, []).append(listing.relative(record.image))
                yield listing, record, sample
            done += 1
            if progress is not None:
                progress(done, total)
    notes.extend(counted(note, files) for note, files in readings.items())


def _table_notes(table: pl.DataFrame, parted: Sequence[str]) -> Iterator[str]:
    """What a person should know of the table: images that lost their split, and what nothing is learnt from."""
    if parted:
        yield counted("of the earlier run left out of every split, for they link two", parted)
    other = table.filter(pl.col("birads").is_not_null() & ~pl.col("birads").is_in(BIRADS))
    if other.height:
        kinds = Counter(other["birads"].to_list())
        said = named(f"{printable(category)!r} ({count})" for category, count in kinds.most_common())
        yield f"{other.height:,} with a BI-RADS category that is not learnt, which are {', '.join(BIRADS)}: {said}"


def _tabulate(
    rows: Sequence[dict[str, object]], thumbnails: NDArray[np.float32], earlier: dict[str, str], seed: int
) -> tuple[pl.DataFrame, int, list[str]]:
    """The table with groups, splits and conflicts, how many images kept an earlier split, and the ids of others."""
    patients = [None if row["patient"] is None else str(row["patient"]) for row in rows]
    known = [earlier.get(str(row["sha256"])) for row in rows]

    aspects = [float(str(row["width"])) / float(str(row["height"])) for row in rows]

    def regroup(indices: NDArray[np.int64]) -> NDArray[np.int64]:
        return near_duplicate_groups(
            thumbnails[indices], [patients[index] for index in indices], [aspects[index] for index in indices]
        )

    splits, groups = assign_splits([str(row["id"]) for row in rows], patients, known, regroup, seed=seed)
    conflicts = class_conflicts(thumbnails, [str(row["class"]) for row in rows], aspects)
    complete = [
        {**row, "group": int(group), "split": split, "class_conflict": bool(conflict)}
        for row, group, split, conflict in zip(rows, groups, splits, conflicts, strict=True)
    ]
    kept = sum(before == after for before, after in zip(known, splits, strict=True))
    table = pl.DataFrame(complete, schema=schema.COLUMNS)
    parted = [id_ for id_, before, after in zip(table["id"], known, splits, strict=True) if before not in (None, after)]
    return table, kept, parted


def _report(
    out: Path, table: pl.DataFrame, kept: int, refused: Sequence[Refusal], notes: Sequence[str], seconds: float
) -> PrepareReport:
    by_class_and_split: dict[str, dict[str, int]] = {}
    for image_class, split in zip(table["class"], table["split"], strict=True):
        per_split = by_class_and_split.setdefault(image_class, {})
        per_split[split] = per_split.get(split, 0) + 1
    return PrepareReport(
        out=out,
        images=table.height,
        by_class=dict(Counter(table["class"])),
        by_source=dict(Counter(table["source"])),
        by_split=dict(Counter(table["split"])),
        by_class_and_split=by_class_and_split,
        groups=table["group"].n_unique(),
        conflicts=int(table["class_conflict"].sum()),
        overlays={kind: int(table[f"overlay_{kind}"].sum()) for kind in ("colour", "text", "calipers")},
        kept_splits=kept,
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
    with _writing(out):
        _publish_again(out)
    if not (out / schema.INFO).is_file():
        # A run that was killed leaves files of ours without the one that is written last.
        # Such as these, none of which is still being written, may be anybody's.
        earlier = {f"{name}{schema.PARTIAL}" for name in schema.FILES}
        written = {name for name in names if name in earlier or is_temporary(name, schema.WRITTEN)}
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
        raise OutputError(
            f"{out} cannot be written: {error.strerror or error}.", fix="Check the disk's space and your permissions."
        ) from error
