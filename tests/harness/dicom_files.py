"""DICOM files as scanners write them, with a made-up patient whose words must turn up nowhere."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import UID, ExplicitVRLittleEndian

from tests.harness.synthetic_datasets import draw_frame

ULTRASOUND, ULTRASOUND_MULTI = "1.2.840.10008.5.1.4.1.1.6.1", "1.2.840.10008.5.1.4.1.1.3.1"
# Words that tell a patient, all of which `scan` writes.
SECRETS = ("ZWIEBELTURM", "PAT-4711", "19601224", "ACC-0815", "1.2.826.0.1.3680043.99", "KRANKENHAUS", "20200229")
REGION = (20, 30, 219, 189)  # First column and row of the ultrasound region, and its last ones.
SIZE = (256, 210)  # Width and height of a frame.
SPACING = (0.1, 0.08)  # Millimetres a pixel, across and down.


def scan_pixels(seed: int = 0, label: str = "normal") -> NDArray[np.uint8]:
    """A grey frame, ``(H, W)``: ultrasound in the region, a bright banner above it."""
    left, top, right, bottom = REGION
    pixels = np.zeros(SIZE[::-1], np.uint8)
    pixels[2:12, 5:250:3] = 255
    inside = draw_frame(np.random.default_rng(seed), (right - left + 1, bottom - top + 1), label).pixels
    pixels[top : bottom + 1, left : right + 1] = inside
    return pixels


def region(*corners: int, kind: int = 1, form: int = 1) -> Dataset:
    """An item of the Sequence of Ultrasound Regions: ``kind`` 1 is tissue, 2 colour flow; ``form`` 1 is 2-D."""
    item = Dataset()
    item.RegionSpatialFormat, item.RegionDataType, item.RegionFlags = form, kind, 0
    item.RegionLocationMinX0, item.RegionLocationMinY0, item.RegionLocationMaxX1, item.RegionLocationMaxY1 = corners
    item.PhysicalUnitsXDirection = item.PhysicalUnitsYDirection = 3
    item.PhysicalDeltaX, item.PhysicalDeltaY = SPACING[0] / 10, SPACING[1] / 10
    return item


def scan(pixels: NDArray[Any], **attributes: Any) -> FileDataset:
    """A data set of one frame ``(H, W)`` or ``(H, W, 3)``, or of frames ``(N, H, W)``; ``attributes`` override."""
    several = pixels.ndim == 3 and pixels.shape[2] != 3
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = ULTRASOUND_MULTI if several else ULTRASOUND
    meta.MediaStorageSOPInstanceUID = f"{SECRETS[4]}.{pixels.sum(dtype=np.int64)}"
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    found = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    found.SOPClassUID, found.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    found.PatientName, found.PatientID, found.PatientBirthDate = f"{SECRETS[0]}^JANE", SECRETS[1], SECRETS[2]
    found.AccessionNumber, found.InstitutionName, found.StudyDate = SECRETS[3], SECRETS[5], SECRETS[6]
    found.StudyInstanceUID, found.SeriesInstanceUID = f"{SECRETS[4]}.1", f"{SECRETS[4]}.2"
    found.Modality, found.ImageType = "US", ["ORIGINAL", "PRIMARY", "", "0001"]
    found.ImageLaterality = "L"
    found.SequenceOfUltrasoundRegions = Sequence([region(*REGION)])
    colour = pixels.shape[-1] == 3
    found.Rows, found.Columns = pixels.shape[-3:-1] if colour else pixels.shape[-2:]
    found.SamplesPerPixel, found.PhotometricInterpretation = (3, "RGB") if colour else (1, "MONOCHROME2")
    if colour:
        found.PlanarConfiguration = 0
    if several:
        found.NumberOfFrames = len(pixels)
    bits = 8 * pixels.dtype.itemsize
    found.BitsAllocated, found.BitsStored, found.HighBit, found.PixelRepresentation = bits, bits, bits - 1, 0
    found.PixelData = pixels.tobytes() + b"\0" * (pixels.nbytes % 2)
    for name, value in attributes.items():
        setattr(found, name, value)
    return found


def packed(found: FileDataset, syntax: str, *frames: bytes) -> FileDataset:
    """The same with compressed frames of a transfer syntax."""
    found.file_meta.TransferSyntaxUID = UID(syntax)
    found.PixelData = encapsulate(list(frames))
    found["PixelData"].VR = "OB"
    found["PixelData"].is_undefined_length = True
    return found


def save(found: FileDataset, path: Path) -> Path:
    """Write a data set as a DICOM file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    path.write_bytes(stream.getvalue())
    return path


def lossless_jpeg(pixels: NDArray[np.uint8]) -> bytes:
    """A lossless JPEG, each pixel predicted by the one before it, of ``(H, W)`` or ``(H, W, 3)``."""
    planes = np.atleast_3d(pixels).astype(int)
    height, width, count = planes.shape
    predicted = np.empty_like(planes)
    predicted[:, 1:] = planes[:, :-1]
    predicted[1:, 0], predicted[0, 0] = planes[:-1, 0], 128
    bits = []
    for difference in (planes - predicted).ravel().tolist():
        size = abs(difference).bit_length()
        # Sizes have codes of five bits; a negative number is written as its ones' complement.
        low = difference if difference >= 0 else difference + (1 << size) - 1
        bits.append(f"{size:05b}" + (f"{low:0{size}b}" if size else ""))
    stream = "".join(bits)
    stream += "1" * (-len(stream) % 8)
    body = int(stream, 2).to_bytes(len(stream) // 8, "big").replace(b"\xff", b"\xff\0")
    parts = b"".join(bytes((k + 1, 0x11, 0)) for k in range(count))
    frame = bytes((8,)) + height.to_bytes(2, "big") + width.to_bytes(2, "big") + bytes((count,)) + parts
    table = bytes((0, 0, 0, 0, 0, 17, *[0] * 11, *range(17)))
    scanned = bytes((count, *(byte for k in range(count) for byte in (k + 1, 0)), 1, 0, 0))
    segments = ((0xC3, frame), (0xC4, table), (0xDA, scanned))
    head = b"".join(bytes((0xFF, kind)) + (len(data) + 2).to_bytes(2, "big") + data for kind, data in segments)
    return b"\xff\xd8" + head + body + b"\xff\xd9"
