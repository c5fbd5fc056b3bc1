"""Image files decoded upright, within bounds of memory, with the meaning that their format gives to the numbers."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from busigen.data.dicom.frame import read_frame
from busigen.data.dicom.header import is_dicom, is_dicom_name
from busigen.data.sources.renamed import content_hash, frame_number, hidden, real_file
from busigen.errors import InputError
from busigen.foreign import ForeignFileError, looking, read_file

MIN_SIDE, MAX_SIDE = 32, 20_000  # Shortest side in pixels that still shows anatomy; longest that is decoded.
# Largest width x height that is decoded, twenty times the largest screen capture. Pixels take up to four bytes, and
# what is made of them, in bands of rows, up to five more.
MAX_PIXELS = 64_000_000
MAX_FILE_BYTES = 256 * 1024 * 1024  # Largest file that is read into memory, in bytes.
# Largest levels of grey with 8, 10, 12 and 16 bits: scanners store any of these in 16, and no file says which.
FULL = (255, 1023, 4095, 65_535)
COLOUR_STEP = 12  # Grey levels between a pixel's channels above which it is coloured; JPEG chroma noise stays below.
MARK_SHARE = 0.0001  # Share of coloured pixels above which they are a mark: BUSI's smallest marks have 0.00017.
# Mean grey levels that any image may have, and the least deviation: BUSI and BUS-BRA lie within 13 to 187, above 15.
BACKGROUND_MEAN, BACKGROUND_DEVIATION = (12.0, 200.0), 8.0

TURNED = "turned upright, as its EXIF orientation says"
WHITE_IS_ZERO = "read with 0 as white, as its TIFF header says"

Levels = NDArray[np.uint8 | np.uint16]

_FORMATS = ("PNG", "JPEG", "BMP", "TIFF")
_DEEP_MODES = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_GREY_MODES = frozenset({"1", "L"})
_COLOUR_MODES = frozenset({"LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"})
_BAND_PIXELS = 1 << 20
_SHALLOW = 64
_PHOTOMETRIC, _BITS, _SAMPLE_FORMAT, _SIGNED = 262, 258, 339, 2
_LEVEL_WIDTH, _TWO_LEVELS_SHARE = 9, 0.95  # Windows of grey levels, and pixels in two; in BUSI and BUS-BRA up to 0.73.

_RESAVE = "Open it in an image viewer and save it again as an 8-bit PNG, or remove it."
_CROP = "Crop or shrink it to the ultrasound frame."
_Kind = TypeVar("_Kind", bound=np.generic)


@dataclass(frozen=True)
class Decoded:
    """One decoded file, its ``image`` upright, of ``deep_colour`` (16 bits) the upper 8 bits.

    Of ``white_is_zero`` ones, 16-bit levels count from white; ``lossy`` ones have levels near those that were saved;
    ``turned`` ones were stored turned or mirrored.
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

    def levels(self) -> Levels:
        """The levels of one channel, ``(H, W)``, uint8, or uint16 as stored, 0 black; an InputError beyond 16 bits."""
        width, height = self.image.size
        levels = np.empty((height, width), np.uint16 if self.deep else np.uint8)
        for rows, band in self.bands():
            values = np.asarray(band if self.deep else band.convert("L"))
            if values.dtype.itemsize > levels.dtype.itemsize and not 0 <= values.min() <= values.max() <= FULL[-1]:
                problem = f"{self.name} has levels beyond 16 bits, or below 0: which of them is white is unknown."
                raise InputError(problem, fix=_RESAVE)
            levels[rows] = values
        if self.deep and self.white_is_zero:
            np.subtract(_full_scale(levels), levels, out=levels)
        return levels

    def refuse_shallow(self, brightest: int) -> None:
        """Raise an InputError for colour of 16 bits whose brightest upper 8 hold next to nothing: it has fewer bits."""
        if self.deep_colour and brightest < _SHALLOW:
            used = 8 + brightest.bit_length()
            problem = f"{self.name} has colour channels of 16 bits that use the lowest {used} at most."
            raise InputError(problem, fix=_RESAVE)


def decode(path: Path, data: bytes | None = None) -> Decoded:
    """Read a PNG, JPEG, BMP or TIFF file, or its ``data`` by its name, and turn it upright by its EXIF orientation.

    An InputError says that it is missing, unreadable, damaged, not an image, or outside the limits; also MemoryError.
    """
    data = image_bytes(path) if data is None else data
    try:
        # Pillow opens files of its own, for the code that reads a format.
        with looking(path), warnings.catch_warnings():
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
        raise InputError(f"{path.name} unpacks to more than {MAX_PIXELS:,} pixels.", fix=_CROP) from error
    except UnidentifiedImageError as error:
        problem = f"{path.name} is not a PNG, JPEG, BMP or TIFF image, whatever its name says."
        raise InputError(problem, fix=_RESAVE) from error
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


def _read_frame(path: Path, data: bytes) -> ImageFile:
    frame = read_frame(path.name, data, frame_number(path))
    width, height = frame.image.size
    grey, marks = np.asarray(frame.image), None
    if frame.image.mode != "L":
        grey, marks = _from_colour(Decoded(path.name, frame.image, False, False, False, False))
    return ImageFile(
        path,
        grey,
        content_hash(path, data),
        width,
        height,
        marks,
        frame.image.mode,
        (frame.note,),
        frame.window,
        frame.full,
        frame.spacing,
        frame.laterality,
    )


def look_up(table: NDArray[_Kind], levels: Levels) -> NDArray[_Kind]:
    """``table[levels]``, row by row: all at once, the indices alone would take eight bytes a pixel."""
    found = np.empty(levels.shape, table.dtype)
    for row, place in zip(levels, found, strict=True):
        place[:] = table[row]
    return found


@dataclass(frozen=True)
class ImageFile:
    """One decoded image file: upright grey levels ``uint8 (H, W)``, and the hex sha256 of its bytes.

    ``coloured`` is ``bool (H, W)``, where channels differ by more than ``COLOUR_STEP``, None if nowhere; ``mode`` is
    Pillow's name of the pixel format; ``notes`` say how it was read where that was not as stored. Of DICOM frames,
    ``window`` is what was cut out (left, top, right, bottom) of ``full`` (width, height), ``spacing`` are millimetres
    that a pixel takes across and down, and ``laterality`` is L, R or None.
    """

    path: Path
    pixels: NDArray[np.uint8]
    sha256: str
    width: int
    height: int
    coloured: NDArray[np.bool_] | None = None
    mode: str = "L"
    notes: tuple[str, ...] = ()
    window: tuple[int, int, int, int] | None = None
    full: tuple[int, int] | None = None
    spacing: tuple[float, float] | None = None
    laterality: str | None = None


def read_image(path: Path, data: bytes | None = None) -> ImageFile:
    """Read a PNG, JPEG, BMP or TIFF file as grey levels, turned upright by its EXIF orientation; or a DICOM frame.

    Accepts 1-bit, grey, palette and colour files, with or without alpha (composited on black), and 16-bit grey, which
    is scaled to 8 bits. Arguments and errors are those of `decode`, and an InputError for levels of unknown range.
    """
    with enough_memory(path):
        data = image_bytes(path) if data is None else data
        if is_dicom(data) or is_dicom_name(path.name):
            return _read_frame(path, data)
        decoded = decode(path, data)
        notes = [TURNED] if decoded.turned else []
        coloured: NDArray[np.bool_] | None = None
        if decoded.deep:
            levels = decoded.levels()
            # Taking the whole range of 16 bits would turn 10 or 12 significant ones almost black.
            full = _full_scale(levels)
            pixels = look_up(np.round(np.arange(FULL[-1] + 1) * (255.0 / full)).astype(np.uint8), levels)
            if decoded.white_is_zero:
                notes.append(WHITE_IS_ZERO)
            if full != FULL[-1]:
                notes.append(f"read as grey of {full.bit_length()} bits, stored in 16")
        elif decoded.grey:
            pixels = decoded.levels().astype(np.uint8, copy=False)
        else:
            pixels, coloured = _from_colour(decoded)
        height, width = pixels.shape
        digest = hashlib.sha256(data).hexdigest()
        return ImageFile(path, pixels, digest, width, height, coloured, decoded.image.mode, tuple(notes))


def scan_row(image: ImageFile, scale: float) -> dict[str, str | float | None]:
    """What tables record of a DICOM frame: ``laterality``, and the millimetres a pixel where it is scaled by ``scale``.

    All are None where the file does not say, and of other images.
    """
    across, down = image.spacing or (None, None)
    return {
        "laterality": image.laterality,
        "spacing_x": None if across is None else across / scale,
        "spacing_y": None if down is None else down / scale,
    }


@contextmanager
def enough_memory(path: Path) -> Iterator[None]:
    """Raise an InputError where the block runs out of memory over a file."""
    try:
        yield
    except MemoryError as error:
        raise InputError(f"{path.name} needs more memory than there is.", fix=_CROP) from error


def picture_fault(frame: NDArray[np.uint8], valid: NDArray[np.bool_] | None = None) -> str | None:
    """Why a letterboxed image is none, by its ``valid`` pixels (all by default); None if it is one.

    It is black or white, flat, or has two grey levels, as masks and drawings do.
    """
    inside = frame if valid is None else frame[valid]
    if not BACKGROUND_MEAN[0] <= float(inside.mean()) <= BACKGROUND_MEAN[1]:
        return "too dark or too bright"
    if float(inside.std()) < BACKGROUND_DEVIATION:
        return "flat"
    return "of two grey levels" if has_two_levels(inside) else None


def has_two_levels(pixels: NDArray[np.uint8]) -> bool:
    """Whether pixels, of any shape, have two grey levels but for a few, as masks do and no ultrasound image."""
    shares = np.bincount(pixels.ravel(), minlength=256) / pixels.size
    found: list[float] = []
    for _ in range(2):
        windows = np.convolve(shares, np.ones(_LEVEL_WIDTH), "valid")
        start = int(windows.argmax())
        found.append(float(windows[start]))
        shares[start : start + _LEVEL_WIDTH] = 0.0
    return min(found) > 0 and sum(found) > _TWO_LEVELS_SHARE


def refuse_fault(name: str, frame: NDArray[np.uint8], valid: NDArray[np.bool_]) -> None:
    """Raise an InputError for an image's `picture_fault`."""
    if (fault := picture_fault(frame, valid)) is not None:
        inside = frame[valid]
        raise InputError(
            f"{name} is no ultrasound image, it is {fault} (grey levels {inside.min()} to {inside.max()}, mean "
            f"{inside.mean():.0f}).",
            fix="Export it again with its whole range of grey, or remove it.",
        )


def _from_colour(decoded: Decoded) -> tuple[NDArray[np.uint8], NDArray[np.bool_] | None]:
    """Grey levels of a colour image on black, and which of its pixels are coloured, None if there are none."""
    width, height = decoded.image.size
    pixels, marks = np.empty((height, width), np.uint8), np.empty((height, width), np.bool_)
    brightest = 0
    for rows, band in decoded.bands():
        if band.has_transparency_data:
            layer = band.convert("RGBA")
            band = Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer)
        opaque = band.convert("RGB")
        channels = np.asarray(opaque)
        pixels[rows] = np.asarray(opaque.convert("L"))
        marks[rows] = channels.max(axis=2) - channels.min(axis=2) > COLOUR_STEP
        brightest = max(brightest, int(channels.max()))
    decoded.refuse_shallow(brightest)
    return pixels, marks if marks.any() else None


def _full_scale(levels: Levels) -> int:
    """The largest level of the fewest bits in ``FULL`` that hold the largest of these."""
    return next(full for full in FULL if int(levels.max()) <= full)


def image_bytes(path: Path) -> bytes:
    """The content of an image file; an InputError says that it is missing, unreadable, empty or too large."""
    try:
        with hidden(path):
            data = read_file(real_file(path), MAX_FILE_BYTES)
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
            fix=_CROP,
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
    turned = orientation in range(2, 9)
    return ImageOps.exif_transpose(image) if turned else image, turned
