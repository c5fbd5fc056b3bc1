"""One image of a set: where its bytes lie, and how they become a row in the working frame."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.images import MARK_SHARE, ImageFile, refuse_fault
from busigen.data.inpainting import without_overlays
from busigen.data.letterbox import Letterbox, letterbox, letterbox_mask
from busigen.data.letterbox import letterbox_coverage as coverage
from busigen.data.masks import read_mask
from busigen.data.overlays import find_overlays, suspect_mask
from busigen.data.splits import thumbnail

BAR_LEVEL = 6
"""Grey level that no pixel of a letterbox bar exceeds; compression and networks leave a few levels in them."""

BAR_WIDTH = 3
"""Least width in pixels of a pair of bars; anything thinner may be the image's own dark rim."""


@dataclass(frozen=True)
class Item:
    """One listed image. ``read`` opens it and gives the image, its native lesion mask and the number of mask files.

    Attributes:
        image_class: One of ``registry.CLASSES``, or ``unknown``.
        read: Raises ``InputError`` where a file is damaged.
        patient: Patient, or whatever else several images share; None where unknown.
        background: As in ``ImageSet.table``.
    """

    id: str
    file: str
    image_class: str
    read: Callable[[], tuple[ImageFile, NDArray[np.bool_], int]]
    patient: str | None = None
    background: str | None = None


@dataclass(frozen=True)
class Frame:
    """One image in the working frame: five ``(256, 256)`` arrays, a ``(64, 64)`` thumbnail, the table's row.

    ``notes`` say how its files were read where that is not as stored.
    """

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    overlay: NDArray[np.bool_]
    clean: NDArray[np.uint8]
    thumbnail: NDArray[np.float32]
    row: dict[str, object]
    notes: tuple[str, ...] = ()


def read_files(
    image: ImageFile, masks: Iterable[tuple[Path, bytes | None]]
) -> tuple[ImageFile, NDArray[np.bool_], int]:
    """The image with the notes on its masks, the lesions of all masks, and how many there are; see `Item`."""
    lesions, notes, count = np.zeros(image.pixels.shape, np.bool_), list(image.notes), 0
    for path, data in masks:
        lesions |= read_mask(path, (image.width, image.height), data, notes=notes)
        count += 1
    return replace(image, notes=tuple(dict.fromkeys(notes))), lesions, count


def frame(item: Item) -> Frame:
    """Read an item and fit it into the working frame.

    Unlike ``data.prepare.read_sample`` this refuses no mask for what it marks: a set's empty, inverted or
    surplus masks are what an audit looks for.

    Raises:
        InputError: a file is missing, damaged or mismatched, or the image is none.
    """
    file, lesions, mask_files = item.read()
    image, box = letterbox(file.pixels)
    refuse_fault(file.path.name, image, box.valid)
    mask = letterbox_mask(lesions, box)
    overlays = find_overlays(file.pixels)
    painted = overlays.mask if file.coloured is None else overlays.mask | file.coloured
    row: dict[str, object] = {
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
    }
    clean, _ = letterbox(without_overlays(file.pixels, suspect_mask(file.pixels, file.coloured, overlays.mask)))
    return Frame(
        image, mask, _valid(image, box), coverage(painted, box) > 0, clean, thumbnail(file.pixels), row, file.notes
    )


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
