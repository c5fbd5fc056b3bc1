"""DICOM: Ultrasound Image objects that say that they are synthetic, and Segmentation objects that refer to them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any

import highdicom
import numpy as np
from pydicom import Dataset, FileDataset
from pydicom.dataset import FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import ExplicitVRLittleEndian, UltrasoundImageStorage

from busigen.registry import NORMAL, SYNTHETIC
from busigen.runtime.convert.base import Format, Pair

# What a segmentation must have and nothing here happened at: the same sample is the same file whenever it is written.
_DATE, _TIME = "20000101", "000000"
_CLASSES = {"benign": codes.SCT.Benign, "malignant": codes.SCT.Malignant}  # SNOMED CT, beside the code for lesion.
_PLANE, _TISSUE, _CENTIMETRES = 1, 1, 3  # Of an ultrasound region: its format, its data, and the unit of its pixels.


class Converter(Format):
    """``images/<name>.dcm`` and ``segmentations/<name>.dcm``, below a folder for each split; a study for each pair.

    A normal pair has no segmentation, since one says what lesion it marks.
    """

    def write(self, pair: Pair) -> Any:
        """Write both objects; identifiers follow from pixels, so that a sample has the same in every dataset."""
        place = f"{pair.split}/" if pair.split else ""
        image = self._image(pair)
        self.target.write(f"{place}images/{pair.name}.dcm", _bytes(image))
        if pair.label != NORMAL:
            self.target.write(f"{place}segmentations/{pair.name}.dcm", _bytes(self._segmentation(pair, image)))
        return pair.name

    def lines(self, left_out: int) -> Iterator[str]:
        """What the objects say of themselves."""
        if NORMAL not in self.job.classes:
            yield "every object says Synthetic Data (0008,001C) YES; segmentations refer to their images"
            return
        yield "every object says Synthetic Data (0008,001C) YES, but for healthy images of yours without a lesion"
        yield "segmentations refer to their images; normal images have none"

    def _image(self, pair: Pair) -> FileDataset:
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = UltrasoundImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = _uid(pair, "image")
        image = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
        image.SOPClassUID, image.SOPInstanceUID = UltrasoundImageStorage, meta.MediaStorageSOPInstanceUID
        image.SyntheticData = "NO" if _is_acquired(pair) else "YES"
        # Nobody's: what the standard demands is there, and empty.
        for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID"):
            setattr(image, keyword, "")
        image.ReferringPhysicianName = image.AccessionNumber = image.PatientOrientation = ""
        image.PatientID = f"BUSIGEN-{_digest(pair.row.get('healthy_sha256') or _pixels(pair), 'patient')[:16]}"
        image.StudyInstanceUID, image.SeriesInstanceUID = _uid(pair, "study"), _uid(pair, "series")
        image.Modality, image.BodyPartExamined, image.SeriesNumber, image.InstanceNumber = "US", "BREAST", 1, 1
        image.SeriesDescription = "breast ultrasound" if _is_acquired(pair) else "synthetic breast ultrasound"
        image.Manufacturer, image.ManufacturerModelName, image.SoftwareVersions = "busigen", "busigen", self._version
        image.ImageType = ["DERIVED", "PRIMARY", "BREAST", "0001"]
        image.DerivationDescription = f"{pair.label} lesion painted by busigen"
        if pair.label == NORMAL:
            image.DerivationDescription = f"{'letterboxed' if _is_acquired(pair) else 'drawn'} by busigen, no lesion"
        if pair.row.get("laterality"):
            image.ImageLaterality = pair.row["laterality"]
        else:
            image.Laterality = ""
        if pair.row.get("background") == SYNTHETIC:
            image.BurnedInAnnotation = "NO"  # Of a given background, nobody knows.
        image.Rows, image.Columns = pair.image.shape
        image.SamplesPerPixel, image.PhotometricInterpretation = 1, "MONOCHROME2"
        image.BitsAllocated = image.BitsStored = 8
        image.HighBit, image.PixelRepresentation = 7, 0
        image.PixelData = pair.image.tobytes()
        if _spaced(pair):
            image.SequenceOfUltrasoundRegions = [_region(pair)]
        return image

    def _segmentation(self, pair: Pair, image: FileDataset) -> Dataset:
        lesions = [self._segment(pair, number) for number in range(1, len(pair.masks) + 1)]
        # The last axis is that of segments.
        pixels = np.stack(pair.masks, axis=-1)[None].astype(np.uint8)
        found = highdicom.seg.Segmentation(
            source_images=[image],
            pixel_array=pixels if len(pair.masks) > 1 else pixels[..., 0],
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=lesions,
            series_instance_uid=_uid(pair, "segmentation series"),
            series_number=2,
            sop_instance_uid=_uid(pair, "segmentation"),
            instance_number=1,
            manufacturer="busigen",
            manufacturer_model_name="busigen",
            software_versions=self._version,
            device_serial_number="0",
            content_label="LESION",
            omit_empty_frames=False,
            pixel_measures=_measures(pair),
        )
        found.SyntheticData = "YES"
        # highdicom writes when it ran, and an identifier drawn at random.
        del found.InstanceCreationDate, found.InstanceCreationTime
        for equipment in found.ContributingEquipmentSequence:
            equipment.pop("ContributionDateTime", None)
        for item in (*found.DimensionOrganizationSequence, *found.DimensionIndexSequence):
            item.DimensionOrganizationUID = _uid(pair, "dimensions")
        found.ContentDate, found.ContentTime, found.PatientOrientation = _DATE, _TIME, ""
        return found

    def _segment(self, pair: Pair, number: int) -> highdicom.seg.SegmentDescription:
        """What is said of a lesion, by its number from 1."""
        lesion = highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=pair.label,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=highdicom.AlgorithmIdentificationSequence(
                name="busigen", version=self._version, family=codes.DCM.ArtificialIntelligence
            ),
            tracking_id=f"busigen {pair.label} lesion{f' {number}' if number > 1 else ''}",
            tracking_uid=_uid(pair, f"lesion{f' {number}' if number > 1 else ''}"),
            anatomic_regions=[codes.SCT.Breast],
        )
        said = highdicom.sr.CodedConcept.from_code(_CLASSES[pair.label])
        lesion.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence = [said]
        return lesion

    @property
    def _version(self) -> str:
        return str(self.job.info.get("busigen") or "unknown")


def _region(pair: Pair) -> Dataset:
    """The whole frame as a region with the pixel spacing of the given background."""
    region = Dataset()
    region.RegionSpatialFormat, region.RegionDataType, region.RegionFlags = _PLANE, _TISSUE, 0
    region.RegionLocationMinX0 = region.RegionLocationMinY0 = 0
    region.RegionLocationMaxX1, region.RegionLocationMaxY1 = pair.image.shape[1] - 1, pair.image.shape[0] - 1
    region.PhysicalUnitsXDirection = region.PhysicalUnitsYDirection = _CENTIMETRES
    region.PhysicalDeltaX, region.PhysicalDeltaY = pair.row["spacing_x"] / 10, pair.row["spacing_y"] / 10
    return region


def _measures(pair: Pair) -> Any:
    """The pixel spacing of the given background for a segmentation, rows first; None without."""
    if not _spaced(pair):
        return None
    spacing = [pair.row["spacing_y"], pair.row["spacing_x"]]
    return highdicom.PixelMeasuresSequence(pixel_spacing=spacing, slice_thickness=None)


def _is_acquired(pair: Pair) -> bool:
    """Whether nothing in the image was drawn: a healthy image as it was given."""
    return pair.label == NORMAL and pair.row.get("background") != SYNTHETIC


def _spaced(pair: Pair) -> bool:
    return bool(pair.row.get("spacing_x") and pair.row.get("spacing_y"))


def _pixels(pair: Pair) -> str:
    return hashlib.sha256(pair.image.tobytes() + pair.mask.tobytes()).hexdigest()


def _digest(of: str, what: str) -> str:
    return hashlib.sha256(f"busigen {what} {of}".encode()).hexdigest()


def _uid(pair: Pair, what: str) -> str:
    """An identifier made of a sample's pixels: 2.25 and a number of 128 bits."""
    return f"2.25.{int(_digest(_pixels(pair), what)[:32], 16)}"


def _bytes(found: Dataset) -> bytes:
    stream = io.BytesIO()
    found.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
