"""Mask files as lesions, what is refused of them, and lesions as labels in the working frame."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.dicom.frame import read_segmentation
from busigen.data.dicom.header import is_dicom, is_dicom_name
from busigen.data.geometry import around, shrink
from busigen.data.images import FULL, TURNED, Decoded, ImageFile, Levels, decode, enough_memory, image_bytes, look_up
from busigen.data.letterbox import HALF, Letterbox, letterbox_coverage
from busigen.data.sources.records import Record
from busigen.errors import InputError
from busigen.registry import LESION_CLASSES, RESOLUTION

MAX_MASK_AREA = 0.90  # Largest share of an image that a lesion can take (BUSI's: 0.56); above, the mask is inverted.
MIN_LESION_AREA = 0.0005  # Smallest share of a lesion of its own (BUSI's: 0.003); specks are slips of the brush.
MAX_LESIONS = 255  # What a label mask of eight bits can count.
_LABELS = 16  # Most levels of a file that is taken for labels; masks with soft edges have more.
# Half the side, without its middle, of squares that a label's area holds somewhere, and that grey of soft edges never
# holds. In photographs such squares are common: their middles take at least 2.8 % of BUSI's and BUS-BRA's images.
_LABEL_MARGIN, _GREY_MARGIN = 2, 4

# Limits above which a file is no mask of lesions, and in brackets the largest of BUSI's and BUS-BRA's 1,655 masks.
_GREY_SHARE, _GREY_MOST = 0.001, 0.25  # Of the image: middles of squares of grey, and grey, as in a picture.
_HUE_SHARE = 0.02  # Of the lesion: a colour of its own is another structure, less is noise of JPEG.
_HOLE_SHARE = 0.25  # Of a lesion with its holes: only its outline is drawn (0.002).
_FRAME_SHARE = 0.5  # Of the image's outermost pixels: the mask is inverted (0.03).
_LINE = 24  # Extent in pixels from which a lesion is more than a line's width across; all of these are.

_WHICH = "Say which grey levels are lesion, as in `busigen prepare --mask-values 1`, or save masks of lesions alone."


def read_mask(
    path: Path,
    size: tuple[int, int] | None,
    data: bytes | None = None,
    *,
    values: Collection[int] = (),
    notes: list[str] | None = None,
) -> NDArray[np.bool_]:
    """Read a lesion mask, ``bool (H, W)``: bright is lesion, black is not.

    A pixel is lesion where its brightest channel is above half of the range; a mask of one small label (such as 0 and
    1) is lesion wherever it is not 0. Alpha counts only where the colour channels say nothing. With ``values``, these
    stored levels are lesion, and no others.

    ``size`` is the ``(width, height)`` that the mask must have; ``notes`` get a line where it is not read as stored.
    ``data`` and errors are those of `busigen.data.images.read_image`, and an InputError for another size, a picture,
    several labels or colours, or 255 ("ignore") beside a label. Of a DICOM segmentation, all segments are lesion.
    """
    with enough_memory(path):
        data = image_bytes(path) if data is None else data
        if is_dicom(data) or is_dicom_name(path.name):
            segmented = read_segmentation(path.name, data)
            _refuse_size(path, segmented.shape[::-1], size)
            return segmented
        decoded = decode(path, data)
        _refuse_size(path, decoded.image.size, size)
        if decoded.turned and notes is not None:
            notes.append(TURNED)
        levels, hues = _levels(decoded)
        if not values:
            return _bright(decoded, levels, hues)
        table = np.zeros(FULL[-1] + 1, np.bool_)
        table[[value for value in values if 0 <= value < table.size]] = True
        return look_up(table, levels)


def _refuse_size(path: Path, found: tuple[int, ...], size: tuple[int, int] | None) -> None:
    if size is not None and found != tuple(size):
        problem = f"{path.name}: the mask is {found[0]}x{found[1]} pixels, its image {size[0]}x{size[1]}."
        raise InputError(problem, fix="Export the mask at the image's own size.")


def read_mask_of(
    path: Path,
    image: ImageFile,
    data: bytes | None = None,
    *,
    values: Collection[int] = (),
    notes: list[str] | None = None,
) -> NDArray[np.bool_]:
    """The mask of an image, of its size; that of a whole DICOM frame is cut as the frame was. See `read_mask`."""
    size = image.width, image.height
    if image.window is None or image.full is None:
        return read_mask(path, size, data, values=values, notes=notes)
    mask = read_mask(path, None, data, values=values, notes=notes)
    height, width = mask.shape
    if (width, height) == image.full:
        left, top, right, bottom = image.window
        return mask[top:bottom, left:right]
    if (width, height) != size:
        problem = (
            f"{path.name}: the mask is {width}x{height} pixels, its image {image.full[0]}x{image.full[1]}, and its "
            f"ultrasound region {size[0]}x{size[1]}."
        )
        raise InputError(problem, fix="Export the mask at the size of either.")
    return mask


def read_lesions(record: Record, file: ImageFile, values: Collection[int], notes: list[str]) -> list[NDArray[np.bool_]]:
    """One native ``bool (H, W)`` mask per lesion of an image, none for a normal one; arguments as for `read_mask`.

    An InputError says that a mask cannot be read, is no mask of lesions, or contradicts the class.
    """
    masks = [read_mask_of(path, file, values=values, notes=notes) for path in record.masks]
    name = record.image.name
    lesions = [lesion for mask in masks for lesion in _separate(mask)]
    if record.image_class not in LESION_CLASSES:
        if lesions:
            problem = f"{name} is {record.image_class} but its mask marks a lesion."
            raise InputError(problem, fix="Correct its class or empty the mask.")
        return []
    if not masks:
        raise InputError(f"{name} has no mask.", fix="Add the mask under the name the layout expects, or remove it.")
    if not lesions:
        raise InputError(f"{name} is {record.image_class} but its mask is empty.", fix="Draw the lesion, or remove it.")
    _refuse_inverted(np.logical_or.reduce(lesions), name)
    for path, mask in zip(record.masks, masks, strict=True):
        if mask.any():
            _refuse_shape(mask, path.name)
    if len(lesions) > MAX_LESIONS:
        raise InputError(f"{name}: the mask has {len(lesions)} separate parts.", fix="Clean the mask of specks.")
    return lesions


def read_marked(files: Sequence[tuple[Path, bytes]], image: ImageFile | None) -> NDArray[np.bool_]:
    """All that an image's mask files mark, as it is drawn: one native ``bool (H, W)``, possibly empty.

    ``files`` are paths with their content; ``image`` is needed where it is a DICOM frame, of which masks are cut as it
    was. An InputError says that a file cannot be read, is no mask of lesions, or has another size than the others.
    """
    read = [read_mask(path, None, data) if image is None else read_mask_of(path, image, data) for path, data in files]
    for (path, _), mask in zip(files, read, strict=True):
        if mask.shape != read[0].shape:
            sizes = "{1}x{0} pixels, {3}x{2}".format(*mask.shape, *read[0].shape)
            problem = f"{path.name}: the mask is {sizes} that of {files[0][0].name}."
            raise InputError(problem, fix="Export all masks of an image at its own size.")
        if mask.any():
            _refuse_inverted(mask, path.name)
            _refuse_shape(mask, path.name)
    return np.asarray(np.logical_or.reduce(read))


def label_lesions(lesions: Sequence[NDArray[np.bool_]], box: Letterbox) -> NDArray[np.uint8]:
    """Lesions numbered from 1 in the working frame, ``uint8 (256, 256)``; of two in a pixel the larger share has it."""
    labels = np.zeros((RESOLUTION, RESOLUTION), dtype=np.uint8)
    largest, union = np.zeros(labels.shape, dtype=np.float32), np.zeros(labels.shape, dtype=np.float32)
    for number, lesion in enumerate(lesions, start=1):
        coverage = letterbox_coverage(lesion, box)
        labels[coverage > largest] = number
        largest = np.maximum(largest, coverage)
        union += coverage
    labels[union < HALF] = 0
    # A lesion may be too small to own a pixel; numbers stay without gaps.
    _, dense = np.unique(np.append(labels.ravel(), np.uint8(0)), return_inverse=True)
    return dense[:-1].reshape(labels.shape).astype(np.uint8)


def _separate(mask: NDArray[np.bool_]) -> list[NDArray[np.bool_]]:
    """The mask's connected parts, without specks unless there is nothing else."""
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    if count <= 1:
        return [mask] if count else []
    areas = np.bincount(labels.ravel())[1:]
    floor = min(MIN_LESION_AREA * mask.size, float(areas.max()))
    return [labels == label for label in range(1, count + 1) if areas[label - 1] >= floor]


def _bright(decoded: Decoded, levels: Levels, hues: NDArray[np.int64]) -> NDArray[np.bool_]:
    """The bright pixels, or the file's only label; what is no mask of lesions is refused."""
    peak = int(levels.max())
    full = FULL[0] if peak <= FULL[0] else FULL[-1]
    seen = np.zeros(FULL[-1] + 1, np.bool_)
    for row in levels:
        seen[row] = True
    present = np.flatnonzero(seen).tolist()
    if len(present) <= _LABELS and not decoded.lossy:
        # Levels of soft edges cover no area.
        others = [level for level in present if 0 < level <= peak - peak // 16 and level != peak]
        labels = [level for level in others if shrink(levels == level, _LABEL_MARGIN).any()]
        if labels:
            shares = ", ".join(f"{level} ({float((levels == level).mean()):.1%})" for level in (*labels, peak))
            ignore = " (255 often means 'ignore')" if peak == FULL[0] else ""
            problem = f"{decoded.name} marks several structures, with the levels {shares} of the image{ignore}."
            raise InputError(problem, fix=_WHICH)
        if peak <= full // 2:
            return levels > 0
    else:
        # JPEG overshoots beside an edge, so that the lesion's own level may be well below the brightest.
        grey = (levels > peak // 8) & (levels < peak * 2 // 3)
        picture = shrink(grey, _GREY_MARGIN).mean() > _GREY_SHARE or grey.mean() > _GREY_MOST
        if peak > full // 16 and picture:
            raise InputError(
                f"{decoded.name} is a picture, not a mask: it has {len(present)} grey levels.",
                fix="Save the lesion in white and all else in black; an image or an outline drawn over one is no mask.",
            )
        if full // 16 < peak <= full // 2:
            raise InputError(f"{decoded.name} is no clear mask: its brightest level is {peak} of {full}.", fix=_WHICH)
    if (hues > _HUE_SHARE * hues.sum()).sum() > 1:
        problem = f"{decoded.name} marks structures in several colours."
        raise InputError(problem, fix="Save the lesion alone, in white on black.")
    return levels > full // 2


def _levels(decoded: Decoded) -> tuple[Levels, NDArray[np.int64]]:
    """One level per pixel, and how many bright pixels have each of eight hues (none where the file has no colour).

    A hue says which channels reach half of the brightest one. The brightest channel counts, not luminance: annotation
    tools paint lesions pure red or dark blue.
    """
    hues = np.zeros(8, np.int64)
    if decoded.deep or decoded.grey:
        return decoded.levels(), hues
    width, height = decoded.image.size
    colour, alpha = np.empty((height, width), np.uint8), np.empty((height, width), np.uint8)
    for rows, band in decoded.bands():
        channels = np.asarray(band.convert("RGBA"))
        colour[rows], alpha[rows] = channels[..., :3].max(axis=2), channels[..., 3]
        bright = channels[colour[rows] > FULL[0] // 2, :3]
        hue = (bright > bright.max(axis=1, keepdims=True) // 2) @ np.array([4, 2, 1])
        hues += np.bincount(hue, minlength=8)
    if colour.min() == colour.max() and alpha.min() != alpha.max():
        return alpha, np.zeros_like(hues)
    decoded.refuse_shallow(int(colour.max()))
    return colour, hues


def _refuse_inverted(mask: NDArray[np.bool_], name: str) -> None:
    """Refuse a mask, native and not empty, that marks more of the image than a lesion can take."""
    area = float(mask.mean())
    if area > MAX_MASK_AREA:
        raise InputError(
            f"{name}: the mask marks {area:.0%} of the image as lesion; at most {MAX_MASK_AREA:.0%} is plausible.",
            fix="Invert the mask: lesions are white, the rest black.",
        )


def _refuse_shape(mask: NDArray[np.bool_], name: str) -> None:
    """Refuse a mask, native and not empty, that is inverted, or an outline without what it surrounds."""
    sides = (mask[0], mask[-1], mask[:, 0], mask[:, -1])
    if all(side.any() for side in sides) or np.concatenate(sides).mean() > _FRAME_SHARE:
        raise InputError(
            f"{name} marks {mask.mean():.0%} of the image, up to all of its borders: it is inverted, or has a frame.",
            fix="Lesions are white, all else is black.",
        )
    lesion = np.pad(mask[around(mask, 0)], 1)
    holes = int(ndimage.binary_fill_holes(lesion).sum() - lesion.sum())
    line = max(lesion.shape) > _LINE and not shrink(lesion, _LABEL_MARGIN).any()
    if line or holes > _HOLE_SHARE * (holes + lesion.sum()):
        raise InputError(
            f"{name} marks an outline alone: {holes} pixels lie inside of {lesion.sum()} that are marked.",
            fix="Fill the outline.",
        )
