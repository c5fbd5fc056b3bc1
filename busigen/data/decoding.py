"""Image files decoded upright, with the meaning that their format gives to the numbers, within bounds of memory."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from busigen.errors import InputError
from busigen.foreign import ForeignFileError, read_file

MIN_SIDE = 32
"""Shortest side in pixels that still shows anatomy; anything smaller is an icon or a thumbnail."""

MAX_SIDE = 20_000
"""Longest side in pixels that is decoded."""

MAX_PIXELS = 64_000_000
"""Largest width x height that is decoded. Some twenty times the largest clinical screen capture.

Decoded pixels take one byte (grey), two (16-bit grey) or four (colour, at any depth), so at most 256 MB; what is made
of them takes at most five bytes more per pixel, because it is made in bands of rows.
"""

MAX_FILE_BYTES = 256 * 1024 * 1024
"""Largest file that is read into memory, in bytes."""

FULL = (255, 1023, 4095, 65_535)
"""Largest levels of grey with 8, 10, 12 and 16 bits: scanners store any of these in 16, and no file says which."""

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_GREY_MODES = frozenset({"1", "L"})
_COLOUR_MODES = frozenset({"LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_BAND_PIXELS = 1 << 20
_SHALLOW = 64
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT = 262, 258, 339
_SIGNED = 2
_Kind = TypeVar("_Kind", bound=np.generic)
_RESAVE = "Open it in an image viewer and save it again as an 8-bit PNG, or remove it."


@dataclass(frozen=True)
class Decoded:
    """One decoded file.

    Attributes:
        name: The file's name, for messages.
        image: Its pixels, upright.
        white_is_zero: Its 16-bit levels count from white.
        deep_colour: It has colour channels of 16 bits, of which ``image`` holds the upper 8.
        lossy: Its levels are near those that were saved, as JPEG leaves them.
        turned: It was stored turned or mirrored, and its EXIF orientation said so.
    """

    name: str
    image: Image.Image
    white_is_zero: bool
    deep_colour: bool
    lossy: bool
    turned: bool

    @property
    def deep(self) -> bool:
        """Its levels are those of 16 bits, one channel."""
        return self.image.mode in _DEEP_MODES

    @property
    def grey(self) -> bool:
        """It has one channel, of 8 bits at most."""
        return self.image.mode in _GREY_MODES

    def bands(self) -> Iterator[tuple[slice, Image.Image]]:
        """Rows and their pixels, some at a time, so that what is made on the way to the result stays small."""
        width, height = self.image.size
        rows = max(1, _BAND_PIXELS // width)
        for top in range(0, height, rows):
            bottom = min(height, top + rows)
            yield slice(top, bottom), self.image.crop((0, top, width, bottom))

    def levels(self) -> NDArray[np.uint8 | np.uint16]:
        """The levels of a file with one channel, ``(H, W)``, uint8, or uint16 as stored; 0 is black.

        Raises:
            InputError: they are negative or beyond 16 bits, and so of an unknown range.
        """
        width, height = self.image.size
        levels = np.empty((height, width), np.uint16 if self.deep else np.uint8)
        for rows, band in self.bands():
            values = np.asarray(band if self.deep else band.convert("L"))
            if values.dtype.itemsize > levels.dtype.itemsize and not 0 <= values.min() <= values.max() <= FULL[-1]:
                raise InputError(
                    f"{self.name} has levels beyond 16 bits, or below 0: which of them is white is unknown.",
                    fix=_RESAVE,
                )
            levels[rows] = values
        if self.deep and self.white_is_zero:
            np.subtract(full_scale(int(levels.max())), levels, out=levels)
        return levels

    def refuse_shallow(self, brightest: int) -> None:
        """Refuse colour channels of 16 bits whose upper 8 hold next to nothing: 8, 10 or 12 bits stored in 16.

        Raises:
            InputError: the brightest channel of any pixel, 0 to 255, is too low.
        """
        if self.deep_colour and brightest < _SHALLOW:
            raise InputError(
                f"{self.name} has colour channels of 16 bits that use the lowest {8 + brightest.bit_length()} at most.",
                fix=_RESAVE,
            )


def decode(path: Path, data: bytes | None = None) -> Decoded:
    """Read a PNG, JPEG, BMP or TIFF file, and turn it upright by its EXIF orientation.

    Args:
        path: The file to read.
        data: Its content where that is at hand; ``path`` then only names it.

    Raises:
        InputError: The file is missing, unreadable, damaged, not an image, or outside the limits.
        MemoryError: There is not enough.
    """
    data = read_bytes(path) if data is None else data
    try:
        with warnings.catch_warnings():
            # Pillow warns about bombs and odd metadata; the limits below refuse what matters.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=_FORMATS)
            tags = getattr(image, "tag_v2", {})
            _check_header(path, image, tags)
            # Read before the pixels are, because Pillow turns a TIFF as it loads it and drops the tag.
            stored, white_is_zero = tags.get(ExifTags.Base.Orientation, 1), tags.get(_PHOTOMETRIC) == 0
            deep = data[24] == 16 if image.format == "PNG" else 16 in _each(tags.get(_BITS))
            image.load()
            upright, turned = _upright(image)
    except (InputError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise InputError(
            f"{path.name} unpacks to more than {MAX_PIXELS:,} pixels.", fix="Crop or shrink it to the ultrasound frame."
        ) from error
    except UnidentifiedImageError as error:
        raise InputError(
            f"{path.name} is not a PNG, JPEG, BMP or TIFF image, whatever its name says.", fix=_RESAVE
        ) from error
    except Exception as error:  # Decoders raise anything on damaged bytes: SyntaxError, struct.error, ...
        raise InputError(f"{path.name} is damaged or cut short: {error}.", fix=_RESAVE) from error
    return Decoded(
        name=path.name,
        image=upright,
        white_is_zero=white_is_zero,
        deep_colour=deep and image.mode in _COLOUR_MODES,
        lossy=image.format in ("JPEG", "MPO"),
        turned=turned or stored in range(2, 9),
    )


def full_scale(peak: int) -> int:
    """The largest level of the fewest bits in ``FULL`` that hold a file's largest level, 0 to 65,535."""
    return next(full for full in FULL if peak <= full)


def to_eight_bits(levels: NDArray[np.uint8 | np.uint16]) -> NDArray[np.uint8]:
    """Scale 16-bit levels to 8 bits. Taking the full range would turn 10 or 12 significant bits almost black."""
    table = np.round(np.arange(FULL[-1] + 1) * (255.0 / full_scale(int(levels.max())))).astype(np.uint8)
    return looked_up(table, levels)


def looked_up(table: NDArray[_Kind], levels: NDArray[np.uint8 | np.uint16]) -> NDArray[_Kind]:
    """``table[levels]``, row by row: all at once, the indices alone would take eight bytes a pixel."""
    found = np.empty(levels.shape, table.dtype)
    for row, place in zip(levels, found, strict=True):
        place[:] = table[row]
    return found


def on_black(image: Image.Image) -> Image.Image:
    """An image of any mode as ``RGB``, what is transparent on black."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = image.convert("RGBA")
    black = Image.new("RGBA", layer.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, layer).convert("RGB")


def read_bytes(path: Path) -> bytes:
    """The content of an image file; raises InputError where it cannot be read, is empty or too large."""
    try:
        data = read_file(path, MAX_FILE_BYTES)
    except FileNotFoundError as error:
        fix = "Check the name, or restore it from the original set."
        raise InputError(f"{path.name} does not exist.", fix=fix) from error
    except (ForeignFileError, IsADirectoryError) as error:
        fix = "Put a PNG, JPEG, BMP or TIFF file of the ultrasound frame there."
        raise InputError(f"{path.name} {error.strerror}.", fix=fix) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path.name} cannot be read: {error}.", fix="Check the file's permissions.") from error
    if not data:
        raise InputError(f"{path.name} is empty (0 bytes).", fix="Restore the file from the original set.")
    return data


def _check_header(path: Path, image: Image.Image, tags: dict[int, object]) -> None:
    width, height = image.size
    if max(width, height) > MAX_SIDE or width * height > MAX_PIXELS:
        raise InputError(
            f"{path.name} is {width}x{height} pixels; the limit is {MAX_SIDE:,} per side and {MAX_PIXELS:,} in all.",
            fix="Crop or shrink it to the ultrasound frame.",
        )
    if min(width, height) < MIN_SIDE:
        raise InputError(
            f"{path.name} is {width}x{height} pixels; at least {MIN_SIDE} per side are needed.",
            fix="Use the original image, not a thumbnail.",
        )
    # Not `n_frames`: to count a TIFF's frames takes time that grows with the square of their number.
    if getattr(image, "is_animated", False):
        raise InputError(f"{path.name} holds more than one frame.", fix="Export one frame per file.")
    if image.mode == "F":
        raise InputError(f"{path.name} has floating-point pixels, whose range is unknown.", fix=_RESAVE)
    if image.mode not in _DEEP_MODES | _GREY_MODES | _COLOUR_MODES:
        raise InputError(f"{path.name} has {image.mode} pixels, which are no grey levels.", fix=_RESAVE)
    if image.mode == "L" and _SIGNED in _each(tags.get(_SAMPLE_FORMAT)):
        raise InputError(f"{path.name} has signed 8-bit pixels, whose black is unknown.", fix=_RESAVE)


def _each(value: object) -> tuple[object, ...]:
    return value if isinstance(value, tuple) else (value,)


def _upright(image: Image.Image) -> tuple[Image.Image, bool]:
    """The image as viewers show it, and whether that differs from how it was stored."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Damaged metadata raise anything, and by such a tag no viewer turns an image.
        return image, False
    if orientation not in range(2, 9):
        return image, False
    return ImageOps.exif_transpose(image), True
