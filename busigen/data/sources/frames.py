"""DICOM files of a listing in frames, under names that tell no patient."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from busigen.data.dicom.frame import patient_and_frames
from busigen.data.sources.renamed import real_file, renamed
from busigen.errors import AccessError, InputError, UsageError
from busigen.files import sha256_of
from busigen.foreign import read_file

if TYPE_CHECKING:
    from busigen.data.sources.records import Listing, Record

Looked = Callable[[int, int], None]  # Called with how many DICOM files were looked at, and how many there are.
MAX_BYTES = 256 << 20  # Largest DICOM file that is read.
_NONE = "0" * 12  # In the name of a file that is none: a pipe, a device.


@dataclass(frozen=True)
class Scan:
    """What is to be known of a DICOM file before it is decoded; ``patient`` is compared, and never written."""

    sha256: str
    patient: tuple[str, ...] = ()
    frames: int = 1


def scan_of(path: Path) -> Scan:
    """A DICOM file's hash, patient and number of frames, those unknown where it cannot be used; or an AccessError."""
    try:
        found = path.stat()
        return _scan(path, found.st_mtime_ns, found.st_size)
    except AccessError as error:
        # Its own words name the file.
        raise AccessError("A DICOM file cannot be looked at.", fix=error.fix) from None
    except OSError:
        return Scan(_NONE)


def name_of(path: Path) -> str:
    """The name under which a DICOM file is shown and recorded."""
    return renamed(path, scan_of(path).sha256).name


def all_frames(paths: Iterable[Path], scans: set[Path]) -> Iterator[Path]:
    """Image files, and all frames of those that are among ``scans``."""
    for path in paths:
        if path in scans:
            scan = scan_of(path)
            yield from _named(path, scan, range(1, scan.frames + 1))
        else:
            yield path


def refuse_frames(frames: int) -> int:
    """The option's value; a UsageError where it is not positive."""
    if frames < 1:
        raise UsageError(f"--frames is {frames}.", fix="Give a whole number from 1.")
    return frames


def chosen(count: int, frames: int) -> list[int]:
    """At most ``frames`` of ``count`` frames, counted from 1, with even distances; of one, that in the middle."""
    if frames >= count:
        return list(range(1, count + 1))
    return [int((k + 0.5) * count / frames) + 1 for k in range(frames)]


def take_frames(listing: Listing, frames: int, looked: Looked | None = None) -> None:
    """Put at most ``frames`` frames of each DICOM file that is listed in the file's place.

    They get names of their own (`busigen.data.sources.renamed`), and so do masks of theirs and masks that are DICOM.
    Where no table says which patient an image is of, all that the files say are of one get the same word for it.
    """
    scans = listing.tree.scans
    if not scans:
        return
    found: dict[Path, Scan] = {}
    images = list(dict.fromkeys(record.image for record in listing.records if record.image in scans))
    for done, path in enumerate(images, start=1):
        found[path] = scan_of(path)
        if looked is not None:
            looked(done, len(images))
    patients = _patients(found.values())
    seen: set[str] = set()
    records: list[Record] = []
    for record in listing.records:
        scan = found.get(record.image)
        if scan is None:
            shown = tuple(renamed(mask, scan_of(mask).sha256) if mask in scans else mask for mask in record.masks)
            records.append(replace(record, masks=shown))
        elif scan.sha256 in seen and not listing.loose:
            listing.refuse([record.image], "It is the same file again.", "Remove one of them.", record.masks)
        elif scan.frames > 1 and record.masks:
            problem = f"It has {scan.frames:,} frames, and nobody can tell of which one its mask is."
            listing.refuse([record.image], problem, "Save that frame and its mask as PNG files.", record.masks)
        else:
            patient = record.patient or f"{record.source}/{patients.get(scan.patient, scan.sha256[:12])}"
            records.extend(_frames_of(replace(record, patient=patient), scan, frames))
        seen.update([scan.sha256] if scan else [])
    listing.records = records
    for record in records:
        if (doubt := listing.doubtful.get(real_file(record.image))) is not None:
            listing.doubtful[record.image] = doubt


def _patients(scans: Iterable[Scan]) -> dict[tuple[str, ...], str]:
    """A word for each patient, which is the beginning of the least hash of its files."""
    words: dict[tuple[str, ...], str] = {}
    for scan in scans:
        if scan.patient:
            words[scan.patient] = min(words.get(scan.patient, "g"), scan.sha256[:12])
    return words


def _frames_of(record: Record, scan: Scan, frames: int) -> Iterator[Record]:
    """A DICOM file's record, frame by frame."""
    ends = [f"_mask{f'_{k}' if k else ''}{mask.suffix.lower()}" for k, mask in enumerate(record.masks)]
    masks = tuple(renamed(mask, scan.sha256, end=end) for mask, end in zip(record.masks, ends, strict=True))
    for image in _named(record.image, scan, chosen(scan.frames, frames)):
        yield replace(record, id=f"{record.source}/{image.stem}", image=image, masks=masks)


def _named(path: Path, scan: Scan, numbers: Sequence[int]) -> list[Path]:
    """Frames of a file as paths."""
    return [renamed(path, scan.sha256, number if scan.frames > 1 else 0) for number in numbers]


@lru_cache(maxsize=1 << 16)
def _scan(path: Path, _changed: int, size: int) -> Scan:
    if size > MAX_BYTES:
        return Scan(sha256_of(path))  # It is refused when it is read.
    data = read_file(path, MAX_BYTES)
    sha256 = hashlib.sha256(data).hexdigest()
    try:
        return Scan(sha256, *patient_and_frames("", data))
    except (InputError, MemoryError):
        return Scan(sha256)  # Why, is said when it is read.
