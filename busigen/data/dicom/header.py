"""What a DICOM file says of itself, read within bounds: the few attributes in `_TAGS`, and what is refused of them.

No message holds a value that came from a file.
"""

from __future__ import annotations

import io
import math
import re
import zlib
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

from busigen.errors import InputError

SUFFIXES = (".dcm", ".dicom", ".dic")  # Endings of DICOM files, lower case; many have none, or a number's.
MARK_END = 132  # Bytes before a DICOM file's data: a preamble, and the mark DICM.
MAX_FRAMES = 10_000  # Of a file; cine loops have some hundred.
_MAX_HEADER = 4 << 20  # Bytes before the pixels.
_MAX_SIDE, _MIN_SIDE = 4096, 32  # Of a frame, and of its ultrasound region, in pixels.
_MAX_INFLATED = 256 << 20  # Bytes of a deflated file's content.

_US, _US_MULTI = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"
_ULTRASOUND = frozenset({_US, _US_MULTI, _US[:-2], _US_MULTI[:-2]})  # With their retired forms.
_CAPTURES = re.compile(r"1\.2\.840\.10008\.5\.1\.4\.1\.1\.7(\.[1-4])?")  # Secondary Capture, of any modality.
_VOLUME, _PDF, _SEGMENTATION = (f"1.2.840.10008.5.1.4.1.1.{end}" for end in ("6.2", "104.1", "66.4"))

EXPLICIT, DEFLATED, _BIG = (f"1.2.840.10008.1.2.{end}" for end in ("1", "1.99", "2"))
PLAIN = frozenset({"1.2.840.10008.1.2", EXPLICIT, DEFLATED, _BIG})  # Transfer syntaxes of plain pixels.
RLE, _JPEGS = "1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4."
# What Pillow reads: JPEG, also lossless, and JPEG 2000; and what CharLS does.
_JPEG, LOSSLESS, _JPEG_2000, JPEG_LS = (
    frozenset(f"{_JPEGS}{end}" for end in ends) for ends in ((50, 51), (57, 70), (90, 91), (80, 81))
)
_READ = PLAIN | _JPEG | LOSSLESS | _JPEG_2000 | JPEG_LS | {RLE}

_TISSUE, _FLOW = (0, 1), 2  # Region Data Type: none or tissue, and colour flow.
_PLANE, _CENTIMETRES = 1, 3  # Region Spatial Format of 2-D images; Physical Units.
_DOPPLER_BITS, _TRACE_BITS, _RENDERED_BITS = 0x0130, 0x000E, 0x0040  # Of value 4 of Image Type.
GREY, PALETTE = ("MONOCHROME1", "MONOCHROME2"), "PALETTE COLOR"
YBR = ("YBR_FULL", "YBR_FULL_422")
_COLOUR = ("RGB", *YBR, "YBR_PARTIAL_420", "YBR_ICT", "YBR_RCT")

CROPPED = "cropped to the ultrasound region that the DICOM file declares"
CROPPED_TO_LARGEST = "cropped to the largest of the ultrasound regions that the DICOM file declares"
UNDECLARED = "of DICOM files that declare no ultrasound region, read whole"

_TAGS = [
    *("SpecificCharacterSet", "SOPClassUID", "ImageType", "Modality", "BurnedInAnnotation"),
    *("PatientID", "PatientName", "IssuerOfPatientID", "StudyInstanceUID", "Laterality", "ImageLaterality"),
    *("SequenceOfUltrasoundRegions", "UltrasoundColorDataPresent", "PixelSpacing"),
    *("NumberOfFrames", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration"),
    *("BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "WindowCenter", "WindowWidth", "VOILUTFunction"),
    *("ExtendedOffsetTable", "ExtendedOffsetTableLengths"),
    *(f"{one}PaletteColorLookupTable{part}" for one in ("Red", "Green", "Blue") for part in ("Descriptor", "Data")),
]
_SEGMENTATION_TAGS = ["SegmentationType", "PerFrameFunctionalGroupsSequence"]
_AS_IMAGE = "Export it from the scanner or archive as an ultrasound image, or remove it."
_PNG = "Save its frames as PNG files, cropped to the ultrasound image."
AGAIN = "Export it again from the scanner or archive, or remove it."


def is_dicom(data: bytes) -> bool:
    """Whether a file that begins with these bytes, ``MARK_END`` at least, says that it is DICOM."""
    return data[MARK_END - 4 : MARK_END] == b"DICM"


def is_dicom_name(name: str) -> bool:
    """Whether a file's name says that it is DICOM."""
    return name.lower().endswith(SUFFIXES)


@cache
def installed() -> bool:
    """Whether the extra is there."""
    return find_spec("pydicom") is not None


@dataclass(frozen=True)
class Opened:
    """A file's attributes, its transfer syntax, and the bytes of its pixels as they are stored."""

    header: Any
    syntax: str
    stored: bytes
    rows: int
    columns: int
    frames: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of a frame in pixels."""
        return self.columns, self.rows


def open_header(name: str, data: bytes, *, segmentation: bool = False) -> Opened:
    """What a file of these bytes holds, an image or a ``segmentation``; an InputError says why it is not usable.

    Errors call the file ``name``.
    """
    from pydicom.datadict import tag_for_keyword
    from pydicom.filereader import read_dataset
    from pydicom.tag import BaseTag

    if not is_dicom(data):
        sealed = data[:1] == b"\x30" and data[1:2] in (b"\x80", b"\x82", b"\x83", b"\x84")
        what = "is encrypted" if sealed else "is no DICOM file, whatever its name says"
        raise InputError(f"{name} {what}.", fix=AGAIN)
    syntax, start = _transfer_syntax(data)
    if syntax not in _READ or (syntax in JPEG_LS and find_spec("jpeg_ls") is None):
        problem = f"{name} is a DICOM file whose pixels are compressed in a way that is not read."
        raise InputError(problem, fix="Convert it to JPEG, JPEG-LS, JPEG 2000, RLE or to uncompressed pixels.")
    body = data[start:]
    if syntax == DEFLATED:
        inflating = zlib.decompressobj(-zlib.MAX_WBITS)
        body = inflating.decompress(body, _MAX_INFLATED)
        if inflating.unconsumed_tail:
            raise InputError(f"{name} is a DICOM file that inflates to more than {_MAX_INFLATED:,} bytes.", fix=AGAIN)
    stream = io.BytesIO(body[:_MAX_HEADER])
    header = read_dataset(
        stream,
        syntax == "1.2.840.10008.1.2",
        syntax != _BIG,
        stop_when=lambda tag, _vr, _length: bool(tag >= 0x7FE00008),
        specific_tags=[BaseTag(tag_for_keyword(keyword) or 0) for keyword in (*_TAGS, *_SEGMENTATION_TAGS)],
    )
    if not segmentation:
        _refuse_kind(name, header)
    elif str(header.SOPClassUID) != _SEGMENTATION:
        problem = f"{name} is a DICOM file, but no segmentation; masks are such, or PNG, JPEG, BMP and TIFF files."
        raise InputError(problem, fix="Save the mask as PNG, under the name of its image.")
    stored = _stored(body, stream.tell(), syntax)
    if stored is None:
        long = f" in its first {_MAX_HEADER >> 20} MiB" if len(body) > _MAX_HEADER else ""
        raise InputError(f"{name} is a DICOM file that holds no image{long}.", fix=AGAIN)
    rows, columns, frames = int(header.Rows), int(header.Columns), int(header.get("NumberOfFrames") or 1)
    if not (min(rows, columns) >= _MIN_SIDE and max(rows, columns) <= _MAX_SIDE):
        limits = f"{_MIN_SIDE} to {_MAX_SIDE} per side are read"
        raise InputError(f"{name} has frames of {columns}x{rows} pixels; {limits}.", fix=_PNG)
    if not 1 <= frames <= MAX_FRAMES:
        raise InputError(f"{name} claims to have {frames:,} frames; 1 to {MAX_FRAMES:,} are read.", fix=_PNG)
    opened = Opened(header, syntax, stored, rows, columns, frames)
    (_refuse_bits if segmentation else _refuse_pixels)(name, opened)
    return opened


def _transfer_syntax(data: bytes) -> tuple[str, int]:
    """The transfer syntax, and where the file's meta information ends."""
    at, syntax = MARK_END, ""
    while data[at : at + 2] == b"\x02\x00":
        long = data[at + 4 : at + 6] in (b"OB", b"OW", b"UN", b"UT", b"SQ", b"OF")
        value = at + 12 if long else at + 8
        length = int.from_bytes(data[at + 8 : value] if long else data[at + 6 : value], "little")
        if data[at + 2 : at + 4] == b"\x10\x00":
            syntax = data[value : value + length].decode("ascii").strip("\0 ")
        at = value + length
    return syntax, at


def _stored(body: bytes, at: int, syntax: str) -> bytes | None:
    """The value of Pixel Data, which begins there; None if something else does."""
    order: Any = "big" if syntax == _BIG else "little"
    if (int.from_bytes(body[at : at + 2], order), int.from_bytes(body[at + 2 : at + 4], order)) != (0x7FE0, 0x0010):
        return None
    explicit = body[at + 4 : at + 6] in (b"OB", b"OW")
    value = at + 12 if explicit else at + 8
    length = int.from_bytes(body[value - 4 : value], order)
    # Of undefined length are compressed frames, which end with a mark of their own.
    return body[value:] if length == 0xFFFFFFFF else body[value : value + length]


def _refuse_kind(name: str, header: Any) -> None:
    """Refuse what is no grey image of tissue in a plane."""
    from pydicom.uid import UID_dictionary

    kind = str(header.SOPClassUID)
    if kind == _PDF:
        raise InputError(f"{name} is a DICOM file that holds a PDF document, and no image.", fix=_AS_IMAGE)
    if kind == _VOLUME:
        raise InputError(f"{name} is a 3-D ultrasound volume.", fix="Export its slices as images, or remove it.")
    if kind == _SEGMENTATION:
        problem = f"{name} is a DICOM segmentation, and no image."
        raise InputError(problem, fix="Put it where its image's mask belongs, or save the image.")
    captured = _CAPTURES.fullmatch(kind) and header.get("Modality") == "US"
    if not captured and kind not in _ULTRASOUND:
        # The standard's own word for the kind; what a file says of itself is not repeated.
        said = UID_dictionary.get(kind, ("of an unknown kind",))[0].removesuffix(" Storage")
        raise InputError(f"{name} is a DICOM file, but no ultrasound image ({said}).", fix=_AS_IMAGE)
    kinds: Any = header.get("ImageType") or ()
    flags = str(kinds[3]) if not isinstance(kinds, str) and len(kinds) > 3 else ""
    bits = int(flags, 16) if re.fullmatch("[0-9A-Fa-f]{4}", flags) else 0
    regions = header.get("SequenceOfUltrasoundRegions") or ()
    flow = any(_number(region, "RegionDataType") == _FLOW for region in regions)
    if flow or bits & _DOPPLER_BITS or _number(header, "UltrasoundColorDataPresent") == 1:
        raise InputError(f"{name} is a colour Doppler image.", fix="Give grey (B-mode) images of the tissue.")
    if bits & _RENDERED_BITS:
        raise InputError(f"{name} is a rendering of a 3-D volume.", fix="Give grey (B-mode) images of a plane.")
    if bits & _TRACE_BITS:
        raise InputError(f"{name} is an M-mode or Doppler trace.", fix="Give grey (B-mode) images of the tissue.")


def _refuse_pixels(name: str, opened: Opened) -> None:
    """Refuse pixels that are not read, or are fewer than the file claims."""
    header = opened.header
    photometric, samples = str(header.PhotometricInterpretation), int(header.SamplesPerPixel)
    known = samples == (3 if photometric in _COLOUR else 1) and photometric in (*GREY, PALETTE, *_COLOUR)
    bits, used = int(header.BitsAllocated), int(header.BitsStored)
    deep = bits == 16 and (samples == 3 or opened.syntax in _JPEG | LOSSLESS)
    if not known or bits not in (8, 16) or not 1 <= used <= bits or deep:
        raise InputError(f"{name} is a DICOM file with pixels of a kind that is not read.", fix=_PNG)
    if _number(header, "PixelRepresentation") == 1:
        raise InputError(f"{name} is a DICOM file with negative grey levels, whose black is unknown.", fix=_PNG)
    if opened.syntax in PLAIN:
        size = opened.rows * opened.columns * samples * bits // 8
        held = len(opened.stored) // (size * 2 // 3 if photometric == "YBR_FULL_422" else size)
    else:
        from pydicom.encaps import parse_fragments

        held = parse_fragments(opened.stored)[0] - 1  # The first one is a table.
    if held < opened.frames:
        problem = (
            f"{name} claims to have {opened.frames:,} frames of {opened.columns}x{opened.rows}, and holds {held:,}."
        )
        raise InputError(problem, fix=AGAIN)


def _refuse_bits(name: str, opened: Opened) -> None:
    """Refuse a segmentation that is not of one bit a pixel, of one frame for each segment, or is cut short."""
    header = opened.header
    packed = str(header.get("SegmentationType")) == "BINARY" and int(header.BitsAllocated) == 1
    if not packed or opened.syntax not in PLAIN - {_BIG}:
        problem = f"{name} is a DICOM segmentation of a kind that is not read: fractional, labels, or compressed."
        raise InputError(problem, fix="Save it as a binary, uncompressed segmentation, or as PNG.")
    segments = set()
    for group in header.get("PerFrameFunctionalGroupsSequence") or ():
        for item in group.get("SegmentIdentificationSequence") or ():
            segments.add(_number(item, "ReferencedSegmentNumber"))
    # The segment of a single frame may be named once for all frames.
    if opened.frames > 1 and len(segments) != opened.frames:
        problem = f"{name} is a DICOM segmentation with {opened.frames:,} frames of {len(segments):,} segments."
        raise InputError(problem, fix="Save the segmentation of one image alone.")
    if 8 * len(opened.stored) < opened.rows * opened.columns * opened.frames:
        raise InputError(f"{name} is a DICOM segmentation that is cut short.", fix=AGAIN)


def region_of(name: str, opened: Opened) -> tuple[tuple[int, int, int, int], tuple[float, float] | None, str]:
    """The window of the largest region with tissue, millimetres a pixel there, and a note on it."""
    whole = (0, 0, opened.columns, opened.rows)
    header = opened.header
    declared = list(header.get("SequenceOfUltrasoundRegions") or ())
    if not declared:
        if str(header.get("BurnedInAnnotation") or "").upper() != "NO":
            raise InputError(
                f"{name} declares no ultrasound region and does not say that its pixels are free of text, which may "
                "name the patient.",
                fix="Crop it to the ultrasound image and save that as PNG; or, if you have looked, set Burned In "
                "Annotation (0028,0301) to NO.",
            )
        stated = [float(value) for value in header.get("PixelSpacing") or ()]
        return whole, _plausible(*reversed(stated)) if len(stated) == 2 else None, UNDECLARED
    found = []
    for region in declared:
        corners = [_number(region, f"RegionLocation{corner}") for corner in ("MinX0", "MinY0", "MaxX1", "MaxY1")]
        if _number(region, "RegionSpatialFormat") == _PLANE and _number(region, "RegionDataType") in _TISSUE:
            found.append(((corners[0], corners[1], corners[2] + 1, corners[3] + 1), region))
    if not found:
        problem = f"{name} declares ultrasound regions, none of which is a grey image of a plane."
        raise InputError(problem, fix="Give grey (B-mode) images of the tissue.")
    window, region = max(found, key=lambda each: (each[0][2] - each[0][0]) * (each[0][3] - each[0][1]))
    left, top, *ends = window
    # Some scanners give as the last pixel the number of pixels.
    right, bottom = (most if end == most + 1 else end for end, most in zip(ends, whole[2:], strict=True))
    inside = right <= whole[2] and bottom <= whole[3]
    if not (inside and 0 <= left <= right - _MIN_SIDE and 0 <= top <= bottom - _MIN_SIDE):
        raise InputError(f"{name} declares an ultrasound region that is too small or not within its image.", fix=_PNG)
    spacing = None
    if all(_number(region, f"PhysicalUnits{axis}Direction") == _CENTIMETRES for axis in "XY"):
        spacing = _plausible(*(abs(float(region.get(f"PhysicalDelta{axis}") or 0)) * 10 for axis in "XY"))
    return (left, top, right, bottom), spacing, CROPPED if len(found) == 1 else CROPPED_TO_LARGEST


def _plausible(across: float, down: float) -> tuple[float, float] | None:
    """Millimetres a pixel, None where no ultrasound image has as many."""
    return (across, down) if all(math.isfinite(each) and 0.001 <= each <= 5 for each in (across, down)) else None


def _number(item: Any, tag: str) -> int:
    """A whole number, -1 where it is missing."""
    value = item.get(tag)
    return -1 if value is None else int(value)
