"""Healthy images: those of a user's folder, and those that the model's prior painted."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask, edit_region
from busigen.data.images import ImageFile, has_two_levels, read_image, scan_row
from busigen.data.letterbox import Letterbox, fit, letterbox
from busigen.data.masks import read_mask
from busigen.data.sources.files import find_images, mask_of, name_key, stem_of
from busigen.data.sources.frames import refuse_frames
from busigen.data.sources.read import read_images
from busigen.data.sources.records import Listing, Record, counted
from busigen.data.sources.renamed import content_hash, hidden, image_hash, real_file, shown
from busigen.errors import BusigenError, InputError, IntegrityError, MissingDependencyError
from busigen.foreign import open_file
from busigen.registry import CLASSES, LESION_CLASSES, RESOLUTION, SYNTHETIC
from busigen.runtime.progress import Progress
from busigen.runtime.sampling import quality_gates
from busigen.text import install_command, printable

log = logging.getLogger("busigen.runtime")

CACHED_IMAGES = 512  # letterboxed images that are kept in memory, 67 MB; of a larger folder, those used last
_LESION_FOLDER = f"in a folder named {' or '.join(LESION_CLASSES)}"
_LESION_MASK = "with a lesion in its mask file"
_LESION_SAID = "that its set or its name calls one of a lesion"
_DOUBTFUL = "whose mask or class nobody can tell"
_UNREADABLE = "unreadable"
_REPEATED = "the same file again"
_WITH_LESION = (_LESION_FOLDER, _LESION_MASK, _LESION_SAID, _DOUBTFUL)


@dataclass(frozen=True)
class Healthy:
    """One healthy image, ``(256, 256)`` uint8."""

    pixels: NDArray[np.uint8]
    valid: Mask  # pixels that are image rather than letterbox bars
    row: dict[str, Any]  # manifest fields: kind of background, file, hash, letterbox
    tissue: NDArray[np.uint8] | None = None  # shaped like ``pixels``, of a background that began with a phantom


def place_of(frame: tuple[int, int]) -> tuple[int, int, int, int]:
    """Top, left, height and width of the part of the prior's square picture that becomes an image of this frame."""
    box = fit(width=frame[1], height=frame[0])
    return 0, box.left, box.height, box.width


def synthetic(pixels: NDArray[np.uint8], frame: tuple[int, int] = (RESOLUTION, RESOLUTION)) -> Healthy:
    """A synthetic background: the prior's picture, ``(256, 256)`` uint8, cut to a frame (see `place_of`), with bars."""
    box = fit(width=frame[1], height=frame[0])
    top, left, height, width = place_of(frame)
    framed = np.zeros_like(pixels)
    framed[box.slices] = pixels[top : top + height, left : left + width]
    return _healthy(SYNTHETIC, None, None, framed, box)


def _healthy(kind: str, file: str | None, sha256: str | None, pixels: NDArray[np.uint8], box: Letterbox) -> Healthy:
    row = {
        "background": kind,
        "healthy_file": file,
        "healthy_sha256": sha256,
        "letterbox_scale": box.scale,
        "letterbox_left": box.left,
        "letterbox_top": box.top,
    }
    return Healthy(pixels, box.valid, row)


class HealthyFolder:
    """The healthy images of a folder, ordered by the sha256 of their files, so that file names change no sample.

    Left out, and counted in one log line: images of a lesion, as the folder's name, a mask file, the set's table or the
    image's own name say (:func:`busigen.data.sources.read.read_images`); pictures of two grey levels, which are masks,
    and the images whose masks they are by their names; and repeated files. Left out and named one by one: files that
    cannot be read, images whose class or mask is unclear, and black, white or flat images. ``out``, where the run
    writes to, is passed over. Of each DICOM file, ``frames`` frames are taken at even distances. An InputError says
    that the folder is missing, or holds no healthy image.
    """

    def __init__(
        self, folder: Path, progress: Progress | None = None, *, out: Path | None = None, frames: int = 1
    ) -> None:
        if not os.path.isdir(folder):
            raise InputError(f"--healthy {folder} is no folder.", fix="Give a folder of images, or 'synthetic'.")
        self.folder = folder
        self.out, self.frames = out, refuse_frames(frames)
        self.left_out: Counter[str] = Counter()  # files by the reason
        self._load = lru_cache(maxsize=CACHED_IMAGES)(self._read)
        progress = progress or Progress()
        looked = progress.counter("looking at DICOM files", "file")
        listing = read_images(folder, skip=out, frames=frames, looked=looked)
        self._readings: dict[str, list[str]] = {}
        found, self._kept, problems = self._find(listing, progress)
        for refusal in listing.refused:
            log.warning("left out: %s: %s %s", refusal.file, refusal.problem, refusal.fix)
        if not found:
            raise self._nothing_left(problems, listing)
        for problem in problems:
            log.warning("left out: %s", printable(problem))
        for note in listing.notes:
            log.info("healthy images: %s", note)
        for note, files in self._readings.items():
            log.warning("%s", counted(note, files))
        lesions = sum(self.left_out[reason] for reason in _WITH_LESION)
        log.log(logging.WARNING if lesions else logging.INFO, "healthy images: %d used%s", len(found), self._reported())
        used = set(found.values())
        unsaid = sum(
            record.image_class not in CLASSES and not record.masks for record in listing.records if record.image in used
        )
        if unsaid:
            log.warning(
                "healthy images: nothing says that %d of them are healthy (no mask, no table, no folder 'normal'), and "
                "whether they are was not checked",
                unsaid,
            )
        self.items = sorted(found.items())
        self._numbers = {sha256: number for number, (sha256, _) in enumerate(self.items)}
        names = Counter(name_key(stem_of(path)) for path in used)
        self.by_name = {name: sha for sha, path in self.items if names[name := name_key(stem_of(path))] == 1}
        self.has_scans = any(real_file(path) != path for path in used)
        self._stamps = self._stamped()

    def _find(self, listing: Listing, progress: Progress) -> tuple[dict[str, Path], dict[str, Healthy], list[str]]:
        """Paths of the usable images by sha256, the images themselves if not too many, and a line for each problem."""
        found: dict[str, Path] = {}
        read: dict[str, Healthy] = {}
        problems: list[str] = []
        masks: list[Path] = []
        progress.start("reading healthy images", len(listing.records), unit="image")
        try:
            for record in listing.records:
                path = record.image
                try:
                    reason = self._lesion_reason(record, listing.doubtful)
                    if reason is _DOUBTFUL:
                        problems.append(f"{path.name}: {listing.doubtful[path]}")
                    if reason is None:
                        image = read_image(path)
                        pixels, box = letterbox(image.pixels)
                        if (reason := quality_gates.background_reason(pixels, box.valid)) is not None:
                            problems.append(f"{path.name}: {reason}.")
                            masks.extend([path] if has_two_levels(pixels[box.valid]) else [])
                        elif found.setdefault(image.sha256, path) != path:
                            reason = _REPEATED
                        else:
                            for note in image.notes:
                                self._readings.setdefault(note, []).append(path.name)
                            if len(found) <= CACHED_IMAGES:
                                read[image.sha256] = self._real(image, pixels, box)
                except InputError as error:
                    reason = _UNREADABLE
                    problems.append(str(error))
                if reason is not None:
                    self.left_out[reason] += 1
                progress.advance(1)
        finally:
            progress.stop()
        # Each image that has a picture of two grey levels named like a mask of it.
        marked = mask_of(masks, list(found.values())) if masks else {}
        for sha256, path in list(found.items()):
            if path in marked:
                del found[sha256]
                problems.append(f"{path.name}: {marked[path].name} is named like a mask of it, and looks like one.")
                self.left_out[_LESION_MASK] += 1
        return found, read if len(found) <= CACHED_IMAGES else {}, problems

    def _lesion_reason(self, record: Record, doubtful: Mapping[Path, str]) -> str | None:
        if any(part.lower() in LESION_CLASSES for part in record.image.relative_to(self.folder).parts[:-1]):
            return _LESION_FOLDER
        if any(read_mask(mask, None).any() for mask in record.masks):
            return _LESION_MASK
        if record.image_class in LESION_CLASSES:
            return _LESION_SAID
        return _DOUBTFUL if record.image in doubtful else None

    def _reported(self) -> str:
        if not self.left_out:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f", {self.left_out.total()} left out ({reasons})"

    def _nothing_left(self, problems: list[str], listing: Listing) -> BusigenError:
        fix = "Give a folder with PNG, JPEG, BMP, TIFF or DICOM images of healthy breasts, or 'synthetic'."
        unread = listing.tree.unread()
        if not listing.records and unread:
            fix = f"Convert them to PNG or DICOM. {fix}"
        normal = next(
            (place for place in (self.folder / "normal", self.folder.parent / "normal") if place.is_dir()), None
        )
        if normal is not None and normal != self.folder:
            fix = f"Did you mean {normal}?"
        # Files that busigen does not read are named, so that nobody takes the folder for empty.
        holds = f"; it holds {listing.tree.found()}" if not listing.records else ""
        first = f" For example: {problems[0]}" if problems else ""
        problem = f"--healthy {self.folder} holds no healthy image that can be used{self._reported()}{holds}.{first}"
        if not listing.records and listing.tree.lacks_extra:
            return MissingDependencyError(problem, fix=f"DICOM files are read after {install_command('dicom')}.")
        return InputError(problem, fix=fix)

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """One hash over the contents of all images."""
        return hashlib.sha256("\n".join(sha256 for sha256, _ in self.items).encode()).hexdigest()

    def pick(self, position: float) -> Healthy:
        """The image at a position in [0, 1); an IntegrityError where its file had to be read again and has changed."""
        return self.numbered(int(position * len(self.items)))

    def of(self, sha256: str) -> Healthy:
        """The image whose file has this hash, one of ``by_name``; errors are those of :meth:`pick`."""
        return self.numbered(self._numbers[sha256])

    def numbered(self, number: int) -> Healthy:
        """The image at a position among ``items``; errors are those of :meth:`pick`."""
        healthy = self._kept.get(self.items[number][0]) or self._load(number)
        return replace(healthy, row={**dict.fromkeys(self.row_types()), **healthy.row})

    def refuse_changes(self) -> None:
        """Raise an IntegrityError if an image was changed, removed or added since the run began."""
        # Without them, the run can be neither continued nor replayed. Read again only where a time or size has changed.
        stamps = self._stamped()
        if stamps == self._stamps:
            return
        for sha256, path in self.items:
            if stamps.get(path) is None or stamps[path] != self._stamps[path]:
                self._unchanged(path, sha256)
        counted = Counter(self.left_out)
        now, _, _ = self._find(read_images(self.folder, skip=self.out, frames=self.frames), Progress())
        self.left_out = counted
        if now.keys() != {sha256 for sha256, _ in self.items}:
            added = next((path for sha256, path in now.items() if (sha256, path) not in self.items), self.folder)
            raise _changed(added, "is new among the healthy images of this run")
        self._stamps = stamps

    def _stamped(self) -> dict[Path, tuple[int, int] | None]:
        """Time and size of every image in use and of the folders they lie in; None for what is not there."""
        places = {self.folder, *(place for _, path in self.items for place in (path, real_file(path).parent))}
        return {place: _stamp(real_file(place)) for place in places}

    def _unchanged(self, path: Path, sha256: str) -> bytes:
        """The content of a file, which must be what it was when the run began."""
        try:
            with hidden(path), open_file(real_file(path)) as file:
                data = file.read()
        except OSError as error:
            raise _changed(path, f"cannot be read any more ({error.strerror})") from error
        if content_hash(path, data) != sha256:
            raise _changed(path, "has changed since the run began")
        return data

    def _read(self, number: int) -> Healthy:
        sha256, path = self.items[number]
        image = read_image(path, self._unchanged(path, sha256))
        return self._real(image, *letterbox(image.pixels))

    def _real(self, image: ImageFile, pixels: NDArray[np.uint8], box: Letterbox) -> Healthy:
        # File names need not be UTF-8, tables and JSON must be; the hash beside it is what identifies the image.
        place = image.path.name if image.full else image.path.relative_to(self.folder).as_posix()
        healthy = _healthy("real", place.encode("utf-8", "replace").decode(), image.sha256, pixels, box)
        if image.full:
            healthy.row.update(scan_row(image, box.scale))
        return healthy

    def row_types(self) -> dict[str, type]:
        """Manifest columns that tell of DICOM images; none where the folder holds none."""
        return {"laterality": str, "spacing_x": float, "spacing_y": float} if self.has_scans else {}


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _changed(path: Path, how: str) -> IntegrityError:
    fix = "Put the folder back as it was and give the same command again to continue, or start a run of its own."
    return IntegrityError(f"{shown(path)} {how}.", fix=fix)


@lru_cache(maxsize=64)
def _frame(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    pixels, box = letterbox(read_image(path).pixels)
    return pixels, box.valid


@dataclass(frozen=True)
class Backgrounds:
    """Healthy images by the sha256 of their files."""

    paths: dict[str, Path]

    @classmethod
    def below(cls, folder: Path) -> Backgrounds:
        """Hash every image below a folder; an InputError where it is missing or an image cannot be read."""
        try:
            return cls({image_hash(path): path for path in find_images(folder)})
        except OSError as error:
            problem = f"{error.filename} cannot be read: {error.strerror}."
            raise InputError(problem, fix="Check its permissions.") from error

    def difference(self, sha256: str, image: NDArray[np.uint8], masks: Iterable[Mask]) -> BusigenError | None:
        """What is wrong with a sample outside its edit regions, which follow from the masks alone; None if nothing.

        Without a lesion there is no such region, and all pixels are compared.

        ``image`` and the lesions' masks are (256, 256) uint8 and bool; ``sha256`` is of a healthy image in ``paths``.
        """
        path = self.paths[sha256]
        try:
            healthy, valid = _frame(path)
        except BusigenError as error:
            return error
        outside = image != healthy
        for mask in masks:
            outside &= ~edit_region(mask, valid)
        changed = int(outside.sum())
        if changed == 0:
            return None
        return InputError(
            f"{changed} pixels outside its edit region differ from its healthy image {path.name}.",
            fix="Use the busigen version that made the dataset; if they still differ, the dataset was altered.",
        )
