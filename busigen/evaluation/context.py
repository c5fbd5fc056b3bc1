"""What every section of the audit is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.sources.records import Refusal
from busigen.evaluation.results import section_folder
from busigen.runtime.progress import Progress

Item = TypeVar("Item")
Effort = Literal["quick", "full"]
Backgrounds = Literal["real", "synthetic", "unknown"]

CLEAN = "Text, calipers and other marks of the scanner are painted over in all sets, or they would be what is learnt."
"""Note of the sections that learn from :meth:`ImageSet.without_overlays`."""


@dataclass(frozen=True)
class ImageSet:
    """A labelled set in the working frame. Rows of the arrays and of the table correspond.

    Attributes:
        images: ``uint8 (N, 256, 256)``, grey, letterboxed.
        masks: ``bool (N, 256, 256)``, True on lesions; empty for normals.
        valid: ``bool (N, 256, 256)``, True on the image, False on letterbox bars.
        table: One row per image: ``id`` str, ``class`` str (of ``registry.CLASSES``, or ``unknown``), ``group`` i64
            (patient or near-duplicate group), ``file`` str, ``sha256`` str (of the image file), ``width`` and
            ``height`` i64 (native pixels), ``mode`` str (the file's pixel format, such as ``L`` or ``RGB``, null where
            unknown), ``colour`` bool, ``lesions`` i64 (parts of the mask), ``text`` and ``calipers`` bool (overlays
            suspected in the native image), ``background`` str or null (what a busigen sample was painted into: the
            sha256 of a healthy image's file, or ``synthetic``), ``mask_files`` i64 (0 where the image has none).
        overlays: ``bool (N, 256, 256)``, pixels suspected to be overlay.
        clean: ``images`` with everything painted over that may be overlay, or None where that was not looked for.
        layout: How the folder is laid out, for people: ``busigen dataset``, ``prepared``, ``BUSI``, ...
        refused: Files that could not be read and are in no row.
        notes: What was passed over, joined, guessed or read otherwise than it is stored, one line a kind.
    """

    name: str
    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    overlays: NDArray[np.bool_]
    table: pl.DataFrame
    clean: NDArray[np.uint8] | None = None
    layout: str = "unknown"
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.height

    @property
    def classes(self) -> NDArray[np.str_]:
        """N class names."""
        return self.table["class"].to_numpy().astype(np.str_)

    @property
    def groups(self) -> NDArray[np.int64]:
        """N group numbers."""
        return self.table["group"].to_numpy()

    def take(self, rows: NDArray[Any]) -> ImageSet:
        """The rows of these positions, or where a mask is True, in order."""
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        arrays = {name: getattr(self, name)[rows] for name in ("images", "masks", "valid", "overlays")}
        clean = None if self.clean is None else self.clean[rows]
        return replace(self, **arrays, clean=clean, table=self.table[rows.tolist()])

    def without_overlays(self) -> ImageSet:
        """The set with its clean images, for whatever learns from pixels.

        Text and calipers are in most real images and in no generated one, and calipers stand at the lesion's rim: a
        classifier would find the real images by them, a segmentation network the lesions.
        """
        return self if self.clean is None else replace(self, images=self.clean)

    def with_lesions(self) -> ImageSet:
        """The images whose mask is not empty."""
        return self.take(np.asarray(self.masks.any(axis=(1, 2))))


def fingerprint(images: ImageSet) -> str:
    """Hex sha256 over everything that a section can see of a set; where it lies does not count."""
    digest = hashlib.sha256()
    marks = (np.packbits(images.masks), np.packbits(images.valid), np.packbits(images.overlays))
    for array in (images.images, images.without_overlays().images, *marks):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(images.table.write_json().encode())
    digest.update(json.dumps([refusal.to_dict() for refusal in images.refused]).encode())
    return digest.hexdigest()


@dataclass
class AuditContext:
    """What every section of the audit is given.

    Attributes:
        real: Real images that did **not** train the generator, as far as is known: what it is judged against.
        train: Real images that trained the generator; None where nobody said which those are.
        effort: ``quick`` (minutes on two cores) or ``full``.
        device: ``cpu`` or ``cuda``, resolved.
        backgrounds: What the synthetic images were painted into.
        inception: Inception weights for FID, KID and IS; None to look in the library's own cache.
        external: A further real set that utility tests on.
        healthy: Folder of the healthy images that the synthetic set was painted into; None where nobody named it.
    """

    synthetic: ImageSet
    real: ImageSet
    train: ImageSet | None
    out: Path
    effort: Effort = "quick"
    seed: int = 0
    device: str = "cpu"
    backgrounds: Backgrounds = "unknown"
    inception: Path | None = None
    external: ImageSet | None = None
    healthy: Path | None = None
    progress: Progress = field(default_factory=Progress)

    def without_overlays(self) -> AuditContext:
        """The same audit on clean images; see :meth:`ImageSet.without_overlays`."""
        names = ("synthetic", "real", "train", "external")
        sets = {name: part.without_overlays() for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **sets)

    def folder(self, section: str) -> Path:
        """The section's folder for pictures, made on demand."""
        folder = section_folder(self.out, section)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def rng(self, *names: str) -> np.random.Generator:
        """A generator of its own for every purpose: adding a draw in one section changes nothing in another."""
        return np.random.default_rng([self.seed, *"\0".join(names).encode()])

    def track(self, what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Iterate with a progress bar."""
        self.progress.start(what, total, unit="step")
        for item in items:
            yield item
            self.progress.advance(1)
