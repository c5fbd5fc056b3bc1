"""DICOM objects as pydicom, highdicom and dciodvfy read them: whole, synthetic, nobody's, and the same every time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.sr.codedict import codes

from busigen.data.images import read_image
from busigen.runtime.convert.run import convert
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate
from busigen.runtime.sampling.inputs.given_masks import MaskFolder
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from tests.harness.command import error_line, run
from tests.harness.dicom_files import SECRETS, SPACING, save, scan, scan_pixels
from tests.harness.hashing import hash_of, hashes
from tests.harness.quick_engine import QuickEngine, quick_sampler

highdicom = pytest.importorskip("highdicom", reason="what it needs has no wheels for Python 3.14")

KINDS = ("images", "segmentations")


@pytest.fixture(scope="module")
def converted(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "dicom"
    convert(plain, out, to="dicom")
    return out


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A dataset painted into a scan that has spacing and one that has none, and what it is converted to."""
    folder = tmp_path_factory.mktemp("painted")
    save(scan(scan_pixels(1)), folder / "scans" / "a.dcm")
    bare = scan(scan_pixels(2), BurnedInAnnotation="NO", ImageLaterality="")
    del bare.SequenceOfUltrasoundRegions
    save(bare, folder / "scans" / "b.dcm")
    sampler = quick_sampler(QuickEngine(), healthy=HealthyFolder(folder / "scans"))
    generate(sampler, folder / "set", count=9, seed=3, shard_size=3)
    convert(folder / "set", folder / "dicom", to="dicom")
    return folder / "set", folder / "dicom"


def test_pixels_masks_and_classes_are_the_datasets(plain: Path, converted: Path) -> None:
    for sample in Dataset.open(plain).samples(range(10)):
        image, mask = (converted / kind / f"{sample.index:09}.dcm" for kind in KINDS)
        assert np.array_equal(pydicom.dcmread(image).pixel_array, sample.image)
        found = highdicom.seg.segread(mask)
        source = pydicom.dcmread(image).SOPInstanceUID
        assert np.array_equal(found.get_pixels_by_source_instance([source])[0, ..., 0] > 0, sample.mask)
        (segment,) = found.segment_numbers
        described = found.get_segment_description(segment)
        assert described.segment_label == sample.label
        assert described.segmented_property_type == codes.SCT.Lesion
        (said,) = described.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence
        assert said.CodeMeaning.lower() == sample.label and said.CodingSchemeDesignator == "SCT"


def test_segmentations_are_masks_to_paint_again(plain: Path, converted: Path) -> None:
    folder = MaskFolder(converted / "segmentations")
    assert all(item.file.endswith(".dcm") for item in folder.items)
    masks = {hash_of(converted / "segmentations" / f"{n:09}.dcm"): n for n in range(10)}
    samples = Dataset.open(plain).samples(range(10))
    for number, item in enumerate(folder.items):
        assert np.array_equal(folder.native(number), samples[masks[item.sha256]].mask)
    assert len(folder) + folder.left_out.total() == 10


def test_every_object_is_synthetic_and_of_nobody(converted: Path) -> None:
    for path in converted.rglob("*.dcm"):
        found = pydicom.dcmread(path)
        assert found.SyntheticData == "YES" and found.PatientID.startswith("BUSIGEN-")
        for keyword in ("PatientName", "PatientBirthDate", "PatientSex", "StudyDate", "AccessionNumber", "StudyID"):
            assert found[keyword].is_empty
        assert "SequenceOfUltrasoundRegions" not in found and "PixelSpacing" not in found


def test_identifiers_follow_from_the_sample(plain: Path, merged: Path, converted: Path, tmp_path: Path) -> None:
    convert(plain, tmp_path / "again", to="dicom")
    assert hashes(tmp_path / "again") == hashes(converted)
    convert(merged, tmp_path / "merged", to="dicom")
    known = {pydicom.dcmread(path).SOPInstanceUID for path in converted.rglob("*.dcm")}
    joined = {pydicom.dcmread(path).SOPInstanceUID for path in (tmp_path / "merged").rglob("*.dcm")}
    assert len(known) == 20 and known < joined and len(joined) == 32
    assert all(uid.startswith("2.25.") and len(uid) <= 64 for uid in joined)


def test_spacing_and_side_are_there_where_the_background_had_them(painted: tuple[Path, Path]) -> None:
    dataset, out = painted
    sides = set()
    for sample in Dataset.open(dataset).samples(range(9)):
        image, segmentation = (pydicom.dcmread(out / kind / f"{sample.index:09}.dcm") for kind in KINDS)
        sides.add(image.get("ImageLaterality"))
        measured = [group.get("PixelMeasuresSequence") for group in segmentation.SharedFunctionalGroupsSequence]
        if sample.row["spacing_x"] is None:
            assert "SequenceOfUltrasoundRegions" not in image and measured == [None]
            continue
        (region,) = image.SequenceOfUltrasoundRegions
        spacing = [value / sample.row["letterbox_scale"] for value in SPACING]
        assert [region.PhysicalDeltaX * 10, region.PhysicalDeltaY * 10] == pytest.approx(spacing)
        assert [float(value) for value in measured[0][0].PixelSpacing] == pytest.approx(spacing[::-1])
    assert sides == {"L", None}
    text = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    assert not [word for word in SECRETS if word.encode() in text]


def test_what_is_written_is_read_as_healthy_images_are(painted: tuple[Path, Path], converted: Path) -> None:
    dataset, out = painted
    spaced = next(s for s in Dataset.open(dataset).samples(range(6)) if s.row["spacing_x"] is not None)
    again = read_image(out / "images" / f"{spaced.index:09}.dcm")
    assert np.array_equal(again.pixels, spaced.image)
    assert again.spacing == pytest.approx((spaced.row["spacing_x"], spaced.row["spacing_y"]))


@pytest.mark.skipif(shutil.which("dciodvfy") is None, reason="needs dciodvfy, of Debian's package dicom3tools")
def test_dciodvfy_finds_no_error(painted: tuple[Path, Path], converted: Path) -> None:
    for path in (*converted.rglob("*.dcm"), *painted[1].rglob("*.dcm")):
        done = subprocess.run(["dciodvfy", path], capture_output=True, text=True, check=False)
        # Its dictionary is older than Synthetic Data.
        errors = [line for line in done.stderr.splitlines() if "Error" in line and "(0x0008,0x001c)" not in line]
        assert not errors, path
        assert done.stderr.count("USImage") + done.stderr.count("Segmentation\n") == 1


def test_without_the_extra_an_error_says_how_to_install_it(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "highdicom.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'highdicom'\", name='highdicom')"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = run("convert", plain, "--to", "dicom", "--out", tmp_path / "out", env=environment)
    line = error_line(done, 7)
    assert "highdicom" in line and "[dicom]" in line and not (tmp_path / "out").exists()
