"""Frames of ultrasound DICOM files: the pixels of the region that a file declares, and no word of whose they are."""

from __future__ import annotations

import io
import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busigen.data.dicom.header import (
    AGAIN,
    DEFLATED,
    EXPLICIT,
    JPEG_LS,
    LOSSLESS,
    PALETTE,
    PLAIN,
    RLE,
    YBR,
    Opened,
    installed,
    open_header,
    region_of,
)
from busigen.errors import InputError, MissingDependencyError
from busigen.text import install_command

_one_at_a_time = threading.RLock()


@dataclass(frozen=True)
class Frame:
    """One frame: an image of mode L or RGB, cut to ``window``: left, top, right, bottom in a frame of size ``full``.

    ``spacing`` are millimetres that a pixel takes across and down, None where unknown; ``laterality`` is L, R or None.
    """

    image: Image.Image
    window: tuple[int, int, int, int]
    full: tuple[int, int]
    spacing: tuple[float, float] | None
    laterality: str | None
    note: str


def patient_and_frames(name: str, data: bytes) -> tuple[tuple[str, ...], int]:
    """Whose a file is, to be compared and never written, empty where it does not say; and its number of frames.

    An InputError says under ``name`` why it holds no usable ultrasound image.
    """
    with _reading(name):
        opened = open_header(name, data)
        kept = [str(opened.header.get(tag) or "").strip() for tag in ("PatientID", "PatientName", "StudyInstanceUID")]
        issuer = str(opened.header.get("IssuerOfPatientID") or "")
        number = next((place for place, value in enumerate(kept) if value), None)
        patient = () if number is None else (str(number), kept[number], issuer if number == 0 else "")
        return patient, opened.frames


def read_frame(name: str, data: bytes, number: int) -> Frame:
    """Frame ``number``, from 1, of a file's ``data``; an InputError says under ``name`` why it cannot be read."""
    with _reading(name):
        opened = open_header(name, data)
        if not 1 <= number <= opened.frames:
            raise InputError(f"{name} has no frame {number}, but {opened.frames:,}.", fix=AGAIN)
        window, spacing, note = region_of(name, opened)
        pixels = _pixels(name, opened, number - 1)
        side = str(opened.header.get("ImageLaterality") or opened.header.get("Laterality") or "")
        image = Image.fromarray(pixels).crop(window)
        return Frame(image, window, opened.size, spacing, side if side in ("L", "R") else None, note)


def read_segmentation(name: str, data: bytes) -> NDArray[np.bool_]:
    """All that a binary Segmentation object of one image marks, ``bool (H, W)``; errors as for `read_frame`."""
    with _reading(name):
        opened = open_header(name, data, segmentation=True)
        shape = opened.frames, opened.rows, opened.columns
        bits = np.unpackbits(np.frombuffer(opened.stored, np.uint8), bitorder="little", count=int(np.prod(shape)))
        return np.asarray(bits.reshape(shape).any(axis=0))


@contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn what pydicom raises into an InputError, and let it warn of nothing: its texts quote what files hold."""
    if not installed():
        problem = f"{name} is DICOM, which needs pydicom, and that is not installed."
        raise MissingDependencyError(problem, fix=f"Run {install_command('dicom')}.")
    logger = logging.getLogger("pydicom")
    # Python's filters of warnings are the whole process's.
    with _one_at_a_time, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logger.level
        logger.setLevel(logging.CRITICAL + 1)  # Of its modules' loggers, too.
        try:
            yield
        except (InputError, MemoryError, MissingDependencyError):
            raise
        except Exception:  # pydicom raises anything on damaged files. Its texts hold their values: none is passed on.
            raise InputError(f"{name} is a DICOM file that is damaged or cut short.", fix=AGAIN) from None
        finally:
            logger.setLevel(before)


def _pixels(name: str, opened: Opened, index: int) -> NDArray[np.uint8]:
    """Grey levels ``(H, W)`` or colours ``(H, W, 3)`` of one frame, counted from 0."""
    from pydicom.pixels import apply_color_lut, apply_windowing

    header = opened.header
    levels = _stored_levels(name, opened, index)
    if header.PhotometricInterpretation == PALETTE:
        levels = apply_color_lut(levels, header)
        levels = levels >> 8 if levels.dtype.itemsize > 1 else levels
    if levels.ndim == 3:
        return levels.astype(np.uint8)
    full = (1 << int(header.BitsStored)) - 1
    levels = levels & full  # Unused bits of old files hold drawings.
    if header.get("WindowWidth") is not None and header.get("WindowCenter") is not None:
        levels = apply_windowing(levels, header)
    grey: NDArray[np.uint8] = np.clip(np.round(levels * (255.0 / full)), 0, 255).astype(np.uint8)
    return 255 - grey if header.PhotometricInterpretation == "MONOCHROME1" else grey


def _stored_levels(name: str, opened: Opened, index: int) -> NDArray[Any]:
    """Levels of one frame as they are stored, or colours, ``(H, W, 3)``, in red, green and blue."""
    from pydicom.dataset import FileMetaDataset
    from pydicom.pixels import convert_color_space, pixel_array
    from pydicom.uid import UID

    header, packed = opened.header, opened.syntax not in PLAIN
    frame = _packed_frame(name, opened, index) if packed else b""
    if opened.syntax in LOSSLESS:
        # pydicom would have GDCM read it, which ends the process, or never ends, on damaged files.
        found = np.asarray(Image.open(io.BytesIO(frame), formats=("JPEG",)))
        return convert_color_space(found, "YBR_FULL", "RGB") if header.PhotometricInterpretation in YBR else found
    header.file_meta = FileMetaDataset()
    header.file_meta.TransferSyntaxUID = UID(EXPLICIT if opened.syntax == DEFLATED else opened.syntax)
    header.add_new(0x7FE00010, "OB" if packed or header.BitsAllocated == 8 else "OW", opened.stored)
    header["PixelData"].is_undefined_length = packed
    plugin = "pyjpegls" if opened.syntax in JPEG_LS else "pydicom" if opened.syntax == RLE else "pillow"
    levels: NDArray[Any] = pixel_array(header, index=index, decoding_plugin=plugin if packed else "")
    return levels


def _packed_frame(name: str, opened: Opened, index: int) -> bytes:
    """A compressed frame; an InputError where it unpacks to other than the image's pixels."""
    from pydicom.encaps import get_frame

    table = opened.header.get("ExtendedOffsetTable"), opened.header.get("ExtendedOffsetTableLengths")
    offsets = table if all(table) else None
    frame: bytes = get_frame(opened.stored, index, number_of_frames=opened.frames, extended_offsets=offsets)
    pixels = opened.rows * opened.columns
    fits = _rle_fits(frame, pixels) if opened.syntax == RLE else _codestream_size(frame) == opened.size
    if not fits:
        problem = f"{name} is a DICOM file whose compressed pixels are of another size than it claims."
        raise InputError(problem, fix=AGAIN)
    return frame


def _rle_fits(frame: bytes, pixels: int) -> bool:
    """Whether every segment of an RLE frame unpacks to a byte for each pixel, and one of padding at most."""
    count = int.from_bytes(frame[:4], "little")
    starts = [int.from_bytes(frame[4 * k : 4 * k + 4], "little") for k in range(1, min(count, 15) + 1)]
    for start, end in zip(starts, [*starts[1:], len(frame)], strict=True):
        at, length = start, 0
        while at < end and length <= pixels + 1:
            byte = frame[at]
            length += 257 - byte if byte > 128 else byte + 1 if byte < 128 else 0
            at += 2 if byte > 128 else byte + 2 if byte < 128 else 1
        if not pixels <= length <= pixels + 1:
            return False
    return True


def _codestream_size(frame: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG, JPEG-LS or JPEG 2000 frame unpacks to; None where it does not say."""
    if frame[:4] == b"\xff\x4f\xff\x51":  # JPEG 2000: the size comes first, the image's offset with it.
        right, bottom, left, top = (int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20))
        return right - left, bottom - top
    at = 2
    while frame[at : at + 1] == b"\xff":
        kind = frame[at + 1]
        if kind == 0xF7 or (0xC0 <= kind <= 0xCF and kind not in (0xC4, 0xC8, 0xCC)):
            return int.from_bytes(frame[at + 7 : at + 9], "big"), int.from_bytes(frame[at + 5 : at + 7], "big")
        at += 1 if kind == 0xFF else 2 + int.from_bytes(frame[at + 2 : at + 4], "big")
    return None
