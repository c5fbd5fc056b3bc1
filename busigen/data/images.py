"""Reading image and mask files that may be damaged, oversized or not images at all."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from busigen.data.decoding import FULL, Decoded, decode, full_scale, on_black, read_bytes, to_eight_bits
from busigen.data.lesion_pixels import lesion_pixels
from busigen.errors import InputError

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
    refused: see `busigen.data.lesion_pixels.lesion_pixels`.

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
