"""A user's own masks: outlines that are painted as they are, in place of those that stage 1 draws."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask
from busigen.data.images import image_bytes, read_image
from busigen.data.letterbox import fit
from busigen.data.masks import read_marked
from busigen.data.sources.files import name_key, stem_of
from busigen.data.sources.read import read_masks
from busigen.data.sources.records import Listing, Record, named
from busigen.data.sources.renamed import content_hash, real_file
from busigen.errors import BusigenError, InputError, IntegrityError, MissingDependencyError, UsageError
from busigen.registry import LESION_CLASSES
from busigen.runtime.backends.bundle_record import LEAST_FRAME
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.conditions import class_at
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.inputs.placement import Placement
from busigen.runtime.sampling.quality_gates import AREA_RANGE
from busigen.text import install_command, printable

log = logging.getLogger("busigen.runtime")

MAX_JITTER = 0.5  # of ``--jitter``: beyond it, nothing of where an outline lay would be left
CACHED_MASKS = 512  # masks that are kept in memory as bits, 67 MB for images of a megapixel; of more, those used last

_UNREADABLE, _EMPTY = "no mask or unreadable", "with nothing marked"
_REPEATED, _SMALL = "the same mask again", "too small"
_OTHER_CLASS, _NORMAL = "of a class that --classes leaves out", "of images called normal"
_NAMED = (_UNREADABLE, _SMALL, _NORMAL)  # reasons whose files are named one by one

COLUMNS: dict[str, type] = {
    "given_mask_file": str,
    "given_mask_sha256": str,
    "given_mask_scale": float,
    "given_mask_left": int,
    "given_mask_top": int,
    "given_mask_mirrored": bool,
}
"""Manifest columns of a run with masks. A pixel (x, y) of the mask's file lies at X = left + x * scale and Y = top +
y * scale in the sample; of a mirrored one, x counts from the right."""


@dataclass(frozen=True)
class GivenMask:
    """One mask of a folder. ``label`` is its class, None where nothing says one; ``file`` is how it is named."""

    sha256: str  # of its file; of several, one over theirs
    label: str | None
    file: str
    record: Record
    size: tuple[int, int]  # native height and width

    @property
    def frame(self) -> tuple[int, int]:
        """Height and width of its own image once that is letterboxed, as a synthetic background's frame."""
        box = fit(width=self.size[1], height=self.size[0])
        return max(LEAST_FRAME, box.height), max(LEAST_FRAME, box.width)

    def row(self, at: Placement) -> dict[str, Any]:
        """What a manifest says of it, by `COLUMNS`."""
        return dict(zip(COLUMNS, (self.file, self.sha256, at.scale, at.left, at.top, at.mirrored), strict=True))


class MaskFolder:
    """The masks of a folder in any layout that `prepare` reads, or of masks alone, by the sha256 of their files.

    Left out and counted: masks with nothing marked, repeated ones, those of a class that is not among ``classes``. Left
    out and named: masks that cannot be read or are none, as for `prepare`; those whose lesion is below the least share
    of an image that the quality gates let pass; those of images called normal. ``out``, where the run writes to, is
    passed over. An InputError says that the folder is missing, or holds no mask that can be used.
    """

    def __init__(
        self,
        folder: Path,
        progress: Progress | None = None,
        *,
        out: Path | None = None,
        classes: Collection[str] = LESION_CLASSES,
    ) -> None:
        if not os.path.isdir(folder):
            raise InputError(f"--masks {folder} is no folder.", fix="Give a folder of masks.")
        self.folder, self._out, self._classes = folder, out, tuple(classes)
        self.left_out: Counter[str] = Counter()  # masks by the reason
        progress = progress or Progress()
        listing = read_masks(folder, skip=out, looked=progress.counter("looking at DICOM files", "file"))
        found, problems = self._find(listing, progress)
        alike: dict[tuple[str, str], list[str]] = {}
        for refusal in listing.refused:
            alike.setdefault((refusal.problem, refusal.fix), []).append(refusal.file)
        problems = [*(f"{named(files)}: {' '.join(said)}" for said, files in alike.items()), *problems]
        if not found:
            raise self._nothing_left(listing, problems)
        for problem in problems:
            log.warning("masks: left out: %s", printable(problem))
        for note in listing.notes:
            log.info("masks: %s", note)
        # By content, so that file names change no sample.
        self.items = sorted(found, key=lambda item: (item.sha256, item.label or ""))
        self._load = lru_cache(maxsize=CACHED_MASKS)(self._packed)
        self._stamps = self._stamped()
        kinds = Counter(item.label or "of no class" for item in self.items)
        used = ", ".join(f"{kinds[name]} {name}" for name in (*LESION_CLASSES, "of no class") if name in kinds)
        log.info("masks: %d used (%s)%s", len(self.items), used, self._reported())

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self, healthy: HealthyFolder | None) -> str:
        """One hash over all masks, their classes, and the healthy images that they go with by name."""
        lines = []
        for item in self.items:
            partner = self.partner(item, healthy)
            lines.append(f"{item.sha256} {item.label or '-'} {'-' if partner is None else partner}\n")
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def at(self, index: int) -> GivenMask:
        """The mask of a sample: all take their turn, so each is painted once in as many samples as there are masks."""
        return self.items[index % len(self.items)]

    def label_at(self, index: int, classes: Mapping[str, float]) -> str:
        """The class of a sample: its mask's, or by the weights where nothing says one."""
        # In each turn, another class: by the index alone, an even number of masks would keep theirs for ever.
        turn, position = divmod(index, len(self.items))
        return self.items[position].label or class_at(turn + position, classes)

    def native(self, index: int) -> Mask:
        """A sample's mask as it was drawn, ``(H, W)``; an IntegrityError where it was read again and has changed."""
        number = index % len(self.items)
        height, width = self.items[number].size
        bits = np.unpackbits(self._load(number), count=height * width)
        return bits.reshape(height, width).view(np.bool_)

    @staticmethod
    def partner(item: GivenMask, healthy: HealthyFolder | None) -> str | None:
        """Hash of the only healthy image that has the name of a mask's image; None where there is none."""
        return None if healthy is None else healthy.by_name.get(name_key(stem_of(item.record.image)))

    def log_use(self, healthy: HealthyFolder | None, samples: int) -> None:
        """Say how many masks go with a healthy image by name, and how many so many samples leave over, if any."""
        if healthy is not None:
            paired = sum(self.partner(item, healthy) is not None for item in self.items)
            drawn = len(self) - paired
            log.info("masks: %d on the healthy image of their name, %d on images drawn at random", paired, drawn)
        if samples < len(self):
            log.warning("masks: %d of %d are not used; a larger --count uses more", len(self) - samples, len(self))

    def refuse_changes(self) -> None:
        """Raise an IntegrityError if a mask was changed, removed or added since the run began."""
        if (stamps := self._stamped()) == self._stamps:
            return
        before = {(item.sha256, item.label): item.file for item in self.items}
        try:
            now = MaskFolder(self.folder, out=self._out, classes=self._classes)
        except InputError as error:
            raise _changed(f"--masks {self.folder} has changed since the run began: {error.problem}") from error
        after = {(item.sha256, item.label): item.file for item in now.items}
        if other := [(before | after)[key] for key in before.keys() ^ after.keys()]:
            raise _changed(f"{other[0]} was changed, added or removed among the masks since the run began.")
        self._stamps = stamps

    def _find(self, listing: Listing, progress: Progress) -> tuple[list[GivenMask], list[str]]:
        """The usable masks, and a line for each that is left out and has to be named."""
        found: dict[tuple[str, str | None], GivenMask] = {}
        problems: list[str] = []
        records = [record for record in listing.records if record.masks]
        progress.start("reading masks", len(records), unit="mask")
        try:
            for record in records:
                try:
                    sha256, native = _read(record)
                except InputError as error:
                    reason, problem = _UNREADABLE, str(error)
                else:
                    label = record.image_class if record.image_class in LESION_CLASSES else None
                    item = GivenMask(sha256, label, _named(record, listing), record, native.shape)
                    reason, problem = self._reason(item, native)
                    if not reason and found.setdefault((sha256, label), item) is not item:
                        reason = _REPEATED
                if reason:
                    self.left_out[reason] += 1
                if reason in _NAMED:
                    problems.append(problem)
                progress.advance(1)
        finally:
            progress.stop()
        return list(found.values()), problems

    def _reason(self, item: GivenMask, native: Mask) -> tuple[str, str]:
        """Why a mask is left out, and that in words; "" for one that is used."""
        if not native.any():
            return _EMPTY, ""
        if item.record.image_class == "normal":
            problem = f"{item.file} marks a lesion, and its image is called normal."
            return _NORMAL, f"{problem} Name both otherwise, or move them elsewhere."
        if item.label is not None and item.label not in self._classes:
            return _OTHER_CLASS, ""
        frame = Placement.letterboxed(native.shape).apply(native)
        if (share := frame.sum() / np.prod(item.frame)) < AREA_RANGE[0]:
            problem = f"{item.file} marks {share:.2%} of its image, {int(frame.sum())} pixels once it is letterboxed; "
            return _SMALL, f"{problem}lesions are painted from {AREA_RANGE[0]:.1%} on. Crop image and mask."
        return "", ""

    def _reported(self) -> str:
        if not self.left_out:
            return ""
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.left_out.most_common())
        return f", {self.left_out.total()} left out ({reasons})"

    def _nothing_left(self, listing: Listing, problems: Sequence[str]) -> BusigenError:
        holds = f"; it holds {listing.tree.found()}" if not listing.records else ""
        first = f" For example: {problems[0]}" if problems else ""
        problem = f"--masks {self.folder} holds no mask that can be used{self._reported()}{holds}.{first}"
        if not listing.records and listing.tree.lacks_extra:
            return MissingDependencyError(problem, fix=f"DICOM files are read after {install_command('dicom')}.")
        fix = "Give masks, white on the lesion and black elsewhere, alone or in a layout that `prepare` reads."
        if self.left_out[_OTHER_CLASS]:
            fix = "Name their classes in --classes."
        return InputError(problem, fix=fix)

    def _packed(self, number: int) -> NDArray[np.uint8]:
        item = self.items[number]
        try:
            sha256, native = _read(item.record)
        except InputError as error:
            raise _changed(error.problem) from error
        if sha256 != item.sha256:
            raise _changed(f"{item.file} has changed since the run began.")
        return np.packbits(native)

    def _stamped(self) -> dict[Path, tuple[int, int] | None]:
        """Time and size of every file in use and of the folders they lie in; None for what is not there."""
        files = {real_file(mask) for item in self.items for mask in item.record.masks}
        return {path: _stamp(path) for path in {self.folder, *files, *(file.parent for file in files)}}


class MaskProof:
    """Shows that a dataset's masks are those of a folder; ``jitter`` is what its run was allowed to do to them."""

    def __init__(self, folder: MaskFolder, jitter: float) -> None:
        self._folder, self._jitter = folder, jitter
        self.known: dict[str, int] = {}  # a mask's place in the folder, by its hash
        self._labels: dict[str, set[str | None]] = {}
        for number, item in enumerate(folder.items):
            self.known.setdefault(item.sha256, number)
            self._labels.setdefault(item.sha256, set()).add(item.label)

    def difference(self, row: Mapping[str, Any], mask: Mask) -> BusigenError | None:
        """What is wrong with a sample's mask, (256, 256) bool, whose hash is ``known``; None if it is the user's."""
        number = self.known[row["given_mask_sha256"]]
        file, fix = self._folder.items[number].file, "The dataset was altered; generate it again."
        labels = self._labels[row["given_mask_sha256"]]
        if None not in labels and row["class"] not in labels:
            return InputError(
                f"it is {row['class']}, and {file} is {' or '.join(sorted(filter(None, labels)))}.", fix=fix
            )
        try:
            native = self._folder.native(number)
        except BusigenError as error:
            return error
        at = Placement.recorded(row)
        box = Placement.letterboxed(native.shape)
        if at is None or abs(at.scale / box.scale - 1.0) > self._jitter + 1e-12 or (at.mirrored and not self._jitter):
            return InputError(f"its row moves {file} beyond what --jitter {self._jitter:g} allows.", fix=fix)
        if changed := int((mask != at.apply(native)).sum()):
            return InputError(f"{changed} pixels of its mask differ from {file}, placed as its row says.", fix=fix)
        return None

    def is_moved(self, row: Mapping[str, Any]) -> bool:
        """Whether a sample's row says that its mask was not only letterboxed."""
        native = self._folder.items[self.known[row["given_mask_sha256"]]]
        return Placement.recorded(row) != Placement.letterboxed(native.size)


def refuse_jitter(jitter: float) -> float:
    """The option's value; a UsageError where it is out of bounds."""
    if not 0.0 <= jitter <= MAX_JITTER:
        fix = f"Give a share from 0 to {MAX_JITTER:g}, such as 0.1: moved, and scaled, by up to a tenth."
        raise UsageError(f"--jitter is {jitter:g}.", fix=fix)
    return jitter


def _read(record: Record) -> tuple[str, Mask]:
    """Hash and native mask of a record; an InputError as for `read_marked`."""
    files = [(mask, image_bytes(mask)) for mask in record.masks]
    # The masks of a DICOM frame are cut as it is.
    image = read_image(record.image) if real_file(record.image) != record.image else None
    hashes = sorted(content_hash(mask, data) for mask, data in files)
    sha256 = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
    return sha256, read_marked(files, image)


def _named(record: Record, listing: Listing) -> str:
    """A mask's files as the manifest names them, by their places in the folder."""
    root = listing.tree.root

    def place_of(mask: Path) -> str:
        # What is renamed is a DICOM file, or named like one.
        name = mask.name if real_file(mask) != mask else mask.relative_to(root).as_posix()
        return name.encode("utf-8", "replace").decode()

    return ", ".join(map(place_of, record.masks))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def _changed(problem: str) -> IntegrityError:
    fix = "Put the folder back as it was and give the same command again to continue, or start a run of its own."
    return IntegrityError(problem, fix=fix)
