"""From one record to one row: reading its files, checking them and fitting them into the working frame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.images import MARK_SHARE, ImageFile, read_image, read_mask, refuse_fault, refuse_shape
from busigen.data.inpainting import without_overlays
from busigen.data.letterbox import HALF, Letterbox, letterbox, letterbox_coverage
from busigen.data.overlays import find_overlays, suspect_mask
from busigen.data.sources.records import Record
from busigen.data.splits import thumbnail
from busigen.errors import InputError
from busigen.registry import LESION_CLASSES

MAX_MASK_AREA = 0.90
"""Largest fraction of an image that a lesion can take; BUSI's largest takes 0.56. Above it the mask is inverted."""

MIN_LESION_AREA = 0.0005
"""Smallest fraction of an image that counts as a lesion of its own; smaller specks are slips of the annotator's brush.

BUSI's smallest lesion takes 0.003.
"""

MAX_LESIONS = 255
"""What a label mask of eight bits can count."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.bool_)


@dataclass(frozen=True)
class Sample:
    """One image that passed, in the working frame.

    Attributes:
        image: ``uint8 (256, 256)``, letterboxed.
        labels: ``uint8 (256, 256)``, 0 outside lesions, k on the k-th.
        overlay: ``bool (256, 256)``, pixels suspected to be painted over by the scanner: few wrong, some missed.
        clean: ``uint8 (256, 256)``, the image with all suspects painted over before letterboxing.
        suspects: ``bool (256, 256)``, pixels with any such paint: few missed, some wrong.
        thumbnail: ``float32 (64, 64)``, for near-duplicates.
        row: The table's columns that need no other image.
        notes: How its files were read where that is not as stored.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    overlay: NDArray[np.bool_]
    clean: NDArray[np.uint8]
    suspects: NDArray[np.bool_]
    thumbnail: NDArray[np.float32]
    row: dict[str, object]
    notes: tuple[str, ...] = ()


def read_sample(record: Record, values: Collection[int] = ()) -> Sample:
    """Read and check one record's files.

    Args:
        record: The record.
        values: The masks' grey levels that are lesion, as for `busigen.data.images.read_mask`.

    Returns:
        The sample.

    Raises:
        InputError: A file is missing, damaged or mismatched, the image is none, the mask is none of lesions, or it
            contradicts the class.
    """
    file = read_image(record.image)
    image, box = letterbox(file.pixels)
    refuse_fault(file.path.name, image, box.valid)
    notes = list(file.notes)
    lesions = _read_lesions(record, file, values, notes)
    labels = _label(lesions, box)
    if lesions and not labels.any():
        raise InputError(
            f"{record.image.name}: its lesion is smaller than one pixel of the working frame.",
            fix="Crop the image around the breast tissue or correct the mask.",
        )
    overlays = find_overlays(file.pixels)
    painted = overlays.mask if file.coloured is None else overlays.mask | file.coloured
    area = float(np.logical_or.reduce(lesions).mean()) if lesions else 0.0
    row: dict[str, object] = {
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
        "mask_area": area,
        "lesions": int(labels.max()),
        "overlay_colour": file.coloured is not None and bool(file.coloured.mean() > MARK_SHARE),
        "overlay_text": overlays.text,
        "overlay_calipers": overlays.calipers,
        "birads": record.birads,
    }
    overlay = letterbox_coverage(painted, box) > 0
    suspects = suspect_mask(file.pixels, file.coloured, overlays.mask)
    clean, _ = letterbox(without_overlays(file.pixels, suspects))
    return Sample(
        image=image,
        labels=labels,
        overlay=overlay,
        clean=clean,
        suspects=letterbox_coverage(suspects, box) > 0,
        thumbnail=thumbnail(file.pixels),
        row=row,
        notes=tuple(dict.fromkeys(notes)),
    )


def _read_lesions(
    record: Record, file: ImageFile, values: Collection[int], notes: list[str]
) -> list[NDArray[np.bool_]]:
    """One native ``bool (H, W)`` mask per lesion; none for a normal image."""
    size = (file.width, file.height)
    masks = [read_mask(path, size, values=values, notes=notes) for path in record.masks]
    name = record.image.name
    lesions = [lesion for mask in masks for lesion in _separate(mask)]
    if record.image_class not in LESION_CLASSES:
        if lesions:
            raise InputError(
                f"{name} is {record.image_class} but its mask marks a lesion.",
                fix="Correct its class or empty the mask.",
            )
        return []
    if not masks:
        raise InputError(f"{name} has no mask.", fix="Add the mask under the name the layout expects, or remove it.")
    if not lesions:
        raise InputError(f"{name} is {record.image_class} but its mask is empty.", fix="Draw the lesion, or remove it.")
    area = float(np.logical_or.reduce(lesions).mean())
    if area > MAX_MASK_AREA:
        raise InputError(
            f"{name}: the mask marks {area:.0%} of the image as lesion; at most {MAX_MASK_AREA:.0%} is plausible.",
            fix="Invert the mask: lesions are white, the rest black.",
        )
    for path, mask in zip(record.masks, masks, strict=True):
        if mask.any():
            refuse_shape(mask, path.name)
    if len(lesions) > MAX_LESIONS:
        raise InputError(f"{name}: the mask has {len(lesions)} separate parts.", fix="Clean the mask of specks.")
    return lesions


def _separate(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The mask's connected parts, without specks unless there is nothing else."""
    labels, count = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)
    if count <= 1:
        return [mask] if count else []
    areas = np.bincount(labels.ravel())[1:]
    floor = min(MIN_LESION_AREA * mask.size, float(areas.max()))
    return [labels == label for label in range(1, count + 1) if areas[label - 1] >= floor]


def _label(lesions: Sequence[NDArray[np.bool_]], box: Letterbox) -> NDArray[np.uint8]:
    """Number the lesions in the working frame; where two share a pixel, the larger share has it."""
    labels = np.zeros((box.size, box.size), dtype=np.uint8)
    largest = np.zeros(labels.shape, dtype=np.float32)
    union = np.zeros(labels.shape, dtype=np.float32)
    for number, lesion in enumerate(lesions, start=1):
        coverage = letterbox_coverage(lesion, box)
        labels[coverage > largest] = number
        largest = np.maximum(largest, coverage)
        union += coverage
    labels[union < HALF] = 0
    # A lesion may be too small to own a pixel; numbers stay without gaps.
    _, dense = np.unique(np.append(labels.ravel(), np.uint8(0)), return_inverse=True)
    return dense[:-1].reshape(labels.shape).astype(np.uint8)
