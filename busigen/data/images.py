"""Image files as grey levels, mask files as lesion pixels, and what is refused of either."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.decoding import FULL, Decoded, decode, full_scale, looked_up, on_black, read_bytes, to_eight_bits
from busigen.data.geometry import around, shrink
from busigen.errors import InputError

Levels = NDArray[np.uint8 | np.uint16]

_LABELS = 16
"""Most levels of a file that is taken for labels. Masks with soft edges, or saved as JPEG, have more, or none but one
that covers an area."""

_LABEL_MARGIN, _GREY_MARGIN = 2, 4
"""Half the side, without its middle, of a square that a label's area holds somewhere, and that the grey between
background and lesion never holds: soft edges are narrower. In photographs such squares are common: their middles make
up at least 2.8 % of each of BUSI's and BUS-BRA's images."""

_GREY_SHARE, _GREY_MOST = 0.001, 0.25
_HUE_SHARE = 0.02
"""Share of the lesion above which a colour of its own is another structure rather than noise of JPEG."""

_HOLE_SHARE = 0.25
"""Share of a lesion with its holes above which only its outline is drawn. Of BUSI's and BUS-BRA's 1,655 masks with a
lesion, the largest is 0.002."""

_FRAME_SHARE = 0.5
"""Share of the image's outermost pixels above which a mask is inverted; the largest of the same masks is 0.03."""

_LINE = 24
"""Extent in pixels from which a lesion is more than a line's width across; all of the same masks are."""

_WHICH = "Say which grey levels are lesion, as in `busigen prepare --mask-values 1`, or save masks of lesions alone."


def lesion_pixels(decoded: Decoded, values: Collection[int] = ()) -> NDArray[np.bool_]:
    """Which pixels are lesion: see `read_mask`.

    Args:
        decoded: The mask file.
        values: The levels that are lesion; empty: bright ones, or the file's only label.

    Returns:
        ``bool (H, W)``.

    Raises:
        InputError: Several labels or colours are marked, or 255 ("ignore") beside a label, or the file is a picture.
    """
    levels, hues = _levels(decoded)
    if values:
        return _any_of(levels, values)
    peak = int(levels.max())
    full = FULL[0] if peak <= FULL[0] else FULL[-1]
    present = _present(levels)
    if present.size <= _LABELS and not decoded.lossy:
        _refuse_labels(decoded.name, levels, present)
        if peak <= full // 2:
            return levels > 0
    else:
        # JPEG overshoots beside an edge, so that the lesion's own level may be well below the brightest.
        grey = (levels > peak // 8) & (levels < peak * 2 // 3)
        picture = shrink(grey, _GREY_MARGIN).mean() > _GREY_SHARE or grey.mean() > _GREY_MOST
        if peak > full // 16 and picture:
            raise InputError(
                f"{decoded.name} is a picture, not a mask: it has {present.size} grey levels.",
                fix="Save the lesion in white and all else in black; an image or an outline drawn over one is no mask.",
            )
        if full // 16 < peak <= full // 2:
            raise InputError(f"{decoded.name} is no clear mask: its brightest level is {peak} of {full}.", fix=_WHICH)
    if (hues > _HUE_SHARE * hues.sum()).sum() > 1:
        raise InputError(
            f"{decoded.name} marks structures in several colours.", fix="Save the lesion alone, in white on black."
        )
    return levels > full // 2


def refuse_shape(mask: NDArray[np.bool_], name: str) -> None:
    """Refuse a mask that is inverted, or an outline without what it surrounds.

    Args:
        mask: ``bool (H, W)``, native, not empty.
        name: The file's name, for messages.

    Raises:
        InputError: It is one of these.
    """
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


def _any_of(levels: Levels, values: Collection[int]) -> NDArray[np.bool_]:
    table = np.zeros(FULL[-1] + 1, np.bool_)
    table[[value for value in values if 0 <= value < table.size]] = True
    return looked_up(table, levels)


def _present(levels: Levels) -> NDArray[np.intp]:
    """The levels that occur, rising."""
    seen = np.zeros(FULL[-1] + 1, np.bool_)
    for row in levels:
        seen[row] = True
    return np.flatnonzero(seen)


def _refuse_labels(name: str, levels: Levels, present: NDArray[np.intp]) -> None:
    """Refuse labels beside the largest one that cover an area; levels of soft edges cover none."""
    peak = int(present[-1])
    others = [v for v in present.tolist() if 0 < v <= peak - peak // 16 and v != peak]
    labels = [v for v in others if shrink(levels == v, _LABEL_MARGIN).any()]
    if labels:
        shares = ", ".join(f"{level} ({float((levels == level).mean()):.1%})" for level in (*labels, peak))
        ignore = " (255 often means 'ignore')" if peak == FULL[0] else ""
        raise InputError(f"{name} marks several structures, with the levels {shares} of the image{ignore}.", fix=_WHICH)


COLOUR_STEP = 12
"""Grey levels between the channels of one pixel above which it is coloured; JPEG chroma noise stays below."""

COLOUR_SHARE = 0.005
"""Share of coloured pixels above which the file is a colour image.

Of BUSI's 15 files stored with unequal channels (of 623 images), 11 lie at 0.9 % or above (Doppler, colour maps), three
have only small coloured marks (0.05 % or less), and one has a tint that never exceeds 12 levels.
"""

MARK_SHARE = 0.0001
"""Share of coloured pixels above which a scanner painted a coloured mark; the three files above lie at 0.017 %."""

BACKGROUND_MEAN, BACKGROUND_DEVIATION = (12.0, 200.0), 8.0
"""Mean grey levels that an image may have, and the least deviation. They hold for what is prepared, judged and painted
into: all of BUSI's and BUS-BRA's 1,750 images lie within 13 to 187, and above 15."""

TURNED = "turned upright, as its EXIF orientation says"
WHITE_IS_ZERO = "read with 0 as white, as its TIFF header says"

_LEVEL_WIDTH = 9
_TWO_LEVELS_SHARE = 0.95
"""Share of pixels in two windows of grey levels; at most 0.73 in BUSI and BUS-BRA. Edges of masks are the rest."""


@dataclass(frozen=True)
class ImageFile:
    """One decoded image file.

    Attributes:
        path: The file that was read.
        pixels: Grey levels, ``uint8 (H, W)``, 0 to 255, upright.
        colour: More than ``COLOUR_SHARE`` of the pixels are coloured.
        sha256: Hex digest of the file's bytes.
        width: Pixels per row.
        height: Rows.
        coloured: ``bool (H, W)``, pixels whose channels differ by more than ``COLOUR_STEP``; None if there are none.
        mode: Pillow's name of the file's pixel format, such as ``L``, ``RGB`` or ``I;16``.
        notes: How it was read where that was not as stored, for people, such as ``TURNED``.
    """

    path: Path
    pixels: NDArray[np.uint8]
    colour: bool
    sha256: str
    width: int
    height: int
    coloured: NDArray[np.bool_] | None = None
    mode: str = "L"
    notes: tuple[str, ...] = ()


def read_image(path: Path, data: bytes | None = None) -> ImageFile:
    """Read a PNG, JPEG, BMP or TIFF file as grey levels, turned upright by its EXIF orientation.

    Accepts 1-bit, grey, palette and colour files, with or without alpha (composited on black), and 16-bit grey, which
    is scaled to 8 bits.

    Args:
        path: The file to read.
        data: Its content where that is at hand, as from an archive; ``path`` then only names it.

    Returns:
        The image; ``pixels`` is ``uint8 (H, W)``.

    Raises:
        InputError: The file is missing, unreadable, damaged, not an image, outside the size limits, or has levels of
            unknown range.
    """
    path = Path(path)
    with _enough_memory(path):
        data = read_bytes(path) if data is None else data
        decoded = decode(path, data)
        notes = [TURNED] if decoded.turned else []
        coloured: NDArray[np.bool_] | None = None
        if decoded.deep:
            levels = decoded.levels()
            full = full_scale(int(levels.max()))
            pixels = to_eight_bits(levels)
            if decoded.white_is_zero:
                notes.append(WHITE_IS_ZERO)
            if full != FULL[-1]:
                notes.append(f"read as grey of {full.bit_length()} bits, stored in 16")
        elif decoded.grey:
            pixels = decoded.levels().astype(np.uint8, copy=False)
        else:
            pixels, coloured = _from_colour(decoded)
        return ImageFile(
            path=path,
            pixels=pixels,
            colour=coloured is not None and float(coloured.mean()) > COLOUR_SHARE,
            sha256=hashlib.sha256(data).hexdigest(),
            width=pixels.shape[1],
            height=pixels.shape[0],
            coloured=coloured,
            mode=decoded.image.mode,
            notes=tuple(notes),
        )


def read_mask(
    path: Path,
    size: tuple[int, int] | None,
    data: bytes | None = None,
    *,
    values: Collection[int] = (),
    notes: list[str] | None = None,
) -> NDArray[np.bool_]:
    """Read a lesion mask: bright is lesion, black is not.

    A pixel is lesion where its brightest channel is above half of the range; a mask of one small label (such as 0 and
    1) is lesion wherever it is not 0. Alpha counts only where the colour channels say nothing. What is no such mask is
    refused: see `lesion_pixels`.

    Args:
        path: The file to read.
        size: ``(width, height)`` that the mask must have, or None to accept any.
        data: The file's content where that is at hand; ``path`` then only names it.
        values: The levels that are lesion, as stored; all others are not. Empty: as above.
        notes: Is told how the file was read where that is not as stored.

    Returns:
        ``bool (H, W)``, True on the lesion.

    Raises:
        InputError: As for `read_image`, the mask has another size, or it marks something else than lesions.
    """
    path = Path(path)
    with _enough_memory(path):
        decoded = decode(path, data)
        if size is not None and decoded.image.size != tuple(size):
            raise InputError(
                f"{path.name}: the mask is {decoded.image.width}x{decoded.image.height} pixels, its image "
                f"{size[0]}x{size[1]}.",
                fix="Export the mask at the image's own size.",
            )
        if decoded.turned and notes is not None:
            notes.append(TURNED)
        return lesion_pixels(decoded, values)


def picture_fault(frame: NDArray[np.uint8], valid: NDArray[np.bool_] | None = None) -> str | None:
    """Why an image is none: it is black or white, flat, or has two grey levels, as masks and drawings do.

    Args:
        frame: ``(256, 256)`` uint8, letterboxed.
        valid: Pixels that are image rather than letterbox bars; None if there are no bars.

    Returns:
        The reason, or None.
    """
    inside = frame if valid is None else frame[valid]
    if not BACKGROUND_MEAN[0] <= float(inside.mean()) <= BACKGROUND_MEAN[1]:
        return "too dark or too bright"
    if float(inside.std()) < BACKGROUND_DEVIATION:
        return "flat"
    return "of two grey levels" if has_two_levels(inside) else None


def has_two_levels(pixels: NDArray[np.uint8]) -> bool:
    """Whether an image shows two grey levels but for a few pixels, as masks do and no ultrasound image.

    Args:
        pixels: Grey levels, ``uint8`` of any shape.
    """
    shares = np.bincount(pixels.ravel(), minlength=256) / pixels.size
    found: list[float] = []
    for _ in range(2):
        windows = np.convolve(shares, np.ones(_LEVEL_WIDTH), "valid")
        start = int(windows.argmax())
        found.append(float(windows[start]))
        shares[start : start + _LEVEL_WIDTH] = 0.0
    return min(found) > 0 and sum(found) > _TWO_LEVELS_SHARE


def refuse_fault(name: str, frame: NDArray[np.uint8], valid: NDArray[np.bool_]) -> None:
    """Refuse an image for its `picture_fault`.

    Raises:
        InputError: it has one.
    """
    if (fault := picture_fault(frame, valid)) is not None:
        inside = frame[valid]
        raise InputError(
            f"{name} is no ultrasound image, it is {fault} (grey levels {inside.min()} to {inside.max()}, mean "
            f"{inside.mean():.0f}).",
            fix="Export it again with its whole range of grey, or remove it.",
        )


@contextmanager
def _enough_memory(path: Path) -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise InputError(
            f"{path.name} needs more memory than there is.", fix="Crop or shrink it to the ultrasound frame."
        ) from error


def _from_colour(decoded: Decoded) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Grey levels of a colour image, and which of its pixels are coloured, None if there are none."""
    width, height = decoded.image.size
    pixels, marks = np.empty((height, width), np.uint8), np.empty((height, width), np.bool_)
    brightest = 0
    for rows, band in decoded.bands():
        opaque = on_black(band)
        channels = np.asarray(opaque)
        pixels[rows] = np.asarray(opaque.convert("L"))
        marks[rows] = channels.max(axis=2) - channels.min(axis=2) > COLOUR_STEP
        brightest = max(brightest, int(channels.max()))
    decoded.refuse_shallow(brightest)
    return pixels, marks if marks.any() else None
