"""Folders of DICOM files as sets and as healthy images: what is taken, and that nothing tells a patient."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.images import read_image
from busigen.data.letterbox import fit
from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.data.sources.files import find_images
from busigen.data.sources.frames import chosen
from busigen.errors import InputError, IntegrityError, UsageError
from busigen.evaluation.reading.sets import read_set
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from tests.harness.command import error_line, run
from tests.harness.dicom_files import REGION, SECRETS, SIZE, SPACING, save, scan, scan_pixels
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.synthetic_datasets import draw_frame

NAMES = (f"{SECRETS[0]}_JANE.dcm", f"{SECRETS[4]}.1.2.3", f"{SECRETS[1]}/IM0001", f"{SECRETS[5]}.DCM")
WIDTH, HEIGHT = REGION[2] - REGION[0] + 1, REGION[3] - REGION[1] + 1
SCALE = 256 / WIDTH


def healthy(folder: Path, frames: int = 5) -> Path:
    """Three single frames of two patients, and a loop; file names hold names, identifiers and UIDs."""
    for seed, name in enumerate(NAMES[:3]):
        save(scan(scan_pixels(seed), PatientID=f"{SECRETS[1]}-{seed % 2}"), folder / name)
    loop = np.stack([scan_pixels(10 + seed) for seed in range(frames)])
    save(scan(loop, PatientID="", PatientName="", StudyInstanceUID="", ImageLaterality="R"), folder / NAMES[3])
    return folder


def written(*places: Path) -> Iterator[tuple[str, bytes]]:
    for place in places:
        for path in place.rglob("*"):
            if path.is_file():
                yield path.name, path.read_bytes()
                if path.suffix == ".parquet":  # Whose pages are compressed.
                    yield path.name, json.dumps(pl.read_parquet(path).to_dicts(), default=str).encode()


def assert_nobody_is_told(*places: Path, text: str = "") -> None:
    for name, content in (*written(*places), ("what was printed", text.encode())):
        assert not [word for word in SECRETS if word.encode() in content or word in name], name


@pytest.mark.parametrize(("count", "frames", "expected"), [(1, 1, [1]), (5, 1, [3]), (9, 3, [2, 5, 8]), (2, 9, [1, 2])])
def test_frames_are_chosen_evenly(count: int, frames: int, expected: list[int]) -> None:
    assert chosen(count, frames) == expected


def test_a_folder_of_healthy_dicom_is_painted_into_and_nobody_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "busigen")
    folder = healthy(tmp_path / "scans")
    # What cannot be used is named, but not by the name it has.
    save(scan(scan_pixels(7), Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.2"), folder / f"{SECRETS[0]}.dcm")
    out = tmp_path / "set"
    images = HealthyFolder(folder, frames=2)
    assert len(images) == 5
    generate(quick_sampler(QuickEngine(), healthy=images), out, count=8, seed=3, shard_size=4)
    rows = list(Dataset.open(out).samples(range(8)))
    assert {sample.row["laterality"] for sample in rows} == {"L", "R"}
    for sample in rows:
        assert sample.row["spacing_x"] == pytest.approx(SPACING[0] / SCALE)
        assert sample.row["spacing_y"] == pytest.approx(SPACING[1] / SCALE)
        assert sample.row["healthy_file"].endswith(".dcm")
    proven = verify(out, healthy=folder)
    assert proven.ok and proven.backgrounds_proven == 8
    assert "no ultrasound image (CT Image)" in caplog.text
    assert_nobody_is_told(out, text=caplog.text + "".join(proven.lines(proving=True)))
    images.refuse_changes()
    (folder / NAMES[0]).unlink()
    with pytest.raises(IntegrityError, match=r"cannot be read any more") as caught:
        images.refuse_changes()
    assert_nobody_is_told(text=str(caught.value))


def test_a_run_record_says_how_many_frames_were_taken_so_that_it_can_be_replayed(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "scans")
    sampler = quick_sampler(QuickEngine(), healthy=HealthyFolder(folder, frames=3))
    generate(sampler, tmp_path / "set", count=2, seed=3, shard_size=2)
    recorded = json.loads((tmp_path / "set" / "run.json").read_text())
    assert Inputs(healthy=folder)._healthy(recorded).fingerprint() == sampler.plan.healthy.fingerprint()
    recorded["options"]["--frames"] = "-1"
    with pytest.raises(IntegrityError, match="--frames '-1'"):
        Inputs(healthy=folder)._healthy(recorded)


def test_a_run_without_dicom_records_what_it_did_before(tmp_path: Path, synthetic_busi: Path) -> None:
    sampler = quick_sampler(QuickEngine(), healthy=HealthyFolder(synthetic_busi / "normal"))
    assert "spacing_x" not in sampler.row_types() and "--frames" not in sampler.options()
    assert "spacing_x" not in sampler.plan.healthy.pick(0.5).row


def test_images_that_are_no_dicom_have_no_spacing_beside_those_that_are(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "scans")
    Image.fromarray(draw_frame(np.random.default_rng(3), SIZE).pixels).save(folder / "plain.png")
    images = HealthyFolder(folder)
    rows = [images.pick((k + 0.5) / len(images)).row for k in range(len(images))]
    assert sorted(row["spacing_x"] is None for row in rows) == [False] * 4 + [True]
    assert {row["healthy_file"] for row in rows if row["spacing_x"] is None} == {"plain.png"}


def pairs(folder: Path) -> Path:
    """Lesions with masks of the whole frame and of the region alone, a healthy scan, and a loop with a mask."""
    left, top, right, bottom = REGION
    for seed, (label, name) in enumerate((("benign", NAMES[0]), ("malignant", NAMES[1]))):
        drawn = draw_frame(np.random.default_rng(20 + seed), (WIDTH, HEIGHT), label)
        pixels = scan_pixels(seed)
        pixels[top : bottom + 1, left : right + 1] = drawn.pixels
        whole = np.zeros(SIZE[::-1], np.uint8)
        whole[top : bottom + 1, left : right + 1] = drawn.lesions[0] * np.uint8(255)
        save(scan(pixels, PatientID=f"{SECRETS[1]}{seed}"), folder / "images" / label / name)
        mask = folder / "masks" / label / f"{name.removesuffix('.dcm')}.png"
        mask.parent.mkdir(parents=True)
        Image.fromarray(whole if seed else whole[top : bottom + 1, left : right + 1]).save(mask)
    for seed in (2, 3):
        save(scan(scan_pixels(seed)), folder / "images" / "normal" / f"{SECRETS[4]}.77.{seed}")
    loop = scan(np.stack([scan_pixels(4)] * 3))
    save(loop, folder / "images" / "benign" / f"{SECRETS[3]}.dcm")
    Image.fromarray(whole).save(folder / "masks" / "benign" / f"{SECRETS[3]}.png")
    return folder


def test_a_set_of_dicom_and_masks_is_prepared_and_nobody_is_told(tmp_path: Path) -> None:
    report = prepare([pairs(tmp_path / "scans")], tmp_path / "prepared")
    assert (report.images, report.by_class) == (4, {"benign": 1, "malignant": 1, "normal": 2})
    (refused,) = report.refused
    assert "3 frames, and nobody can tell of which one its mask is" in refused.problem
    table = Prepared.open(tmp_path / "prepared", check=True).table
    assert table["patient"].n_unique() == 3 and table["laterality"].to_list() == ["L"] * 4
    assert table["spacing_x"].to_list() == pytest.approx([SPACING[0] / SCALE] * 4)
    masks = Prepared.open(tmp_path / "prepared").masks
    assert [int(mask.max()) for mask in masks] == table["lesions"].to_list()
    for row in table.filter(pl.col("class") != "normal").to_dicts():
        assert row["mask_files"] == [row["image_file"].replace(".dcm", "_mask.png")]
    assert_nobody_is_told(tmp_path / "prepared", text=str(report))


def test_the_same_file_twice_is_taken_once(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "scans")
    images = folder / "images" / "normal"
    (images / "again.dcm").write_bytes(next(images.iterdir()).read_bytes())
    report = prepare([folder], tmp_path / "prepared")
    assert report.images == 4 and "It is the same file again" in str(report.refused)


def test_a_mask_of_another_size_is_refused_without_its_name(tmp_path: Path) -> None:
    folder = pairs(tmp_path / "scans")
    for mask in (folder / "masks").rglob("*.png"):
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(mask)
    report = prepare([folder], tmp_path / "prepared")
    assert "the mask is 40x40 pixels, its image 256x210, and its ultrasound region 200x160" in str(report.refused)
    assert_nobody_is_told(tmp_path / "prepared", text=str(report))


def test_the_audit_reads_the_same_images_and_tells_nobody(tmp_path: Path) -> None:
    found = read_set(pairs(tmp_path / "scans"))
    assert sorted(found.table["class"]) == ["benign", "malignant", "normal", "normal"]
    assert found.masks.any(axis=(1, 2)).sum() == 2
    assert (found.table["width"][0], found.table["height"][0]) == (WIDTH, HEIGHT)
    assert_nobody_is_told(text=str(found.table.to_dicts()) + str(found.refused) + str(found.notes))


def test_frames_of_one_patient_share_a_group_and_prepare_takes_as_many_as_asked(tmp_path: Path) -> None:
    folder = tmp_path / "scans"
    healthy(folder / "images" / "normal")
    (folder / "masks").mkdir()
    report = prepare([folder], tmp_path / "prepared", frames=4)
    table = Prepared.open(tmp_path / "prepared").table
    assert report.images == 7
    assert table.group_by("patient").len()["len"].sort().to_list() == [1, 2, 4]
    with pytest.raises(UsageError, match="--frames is 0"):
        prepare([folder], tmp_path / "other", frames=0)


def test_a_path_to_a_frame_names_the_pixels_of_its_file(tmp_path: Path) -> None:
    folder = healthy(tmp_path / "scans")
    found = find_images(folder)
    assert len(found) == 8
    assert {read_image(path).pixels.shape for path in found} == {(HEIGHT, WIDTH)}
    assert fit(WIDTH, HEIGHT).scale == SCALE


def test_a_folder_of_other_files_says_what_it_holds(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.nii").write_bytes(b"x")
    with pytest.raises(InputError, match=r"3 \.nii.*Convert them to PNG or DICOM"):
        HealthyFolder(tmp_path)
    with pytest.raises(InputError, match=r"it holds 3 \.nii"):
        prepare([tmp_path], tmp_path / "out")


@pytest.mark.parametrize("command", ["generate", "prepare"])
def test_without_the_extra_an_error_says_how_to_install_it(tmp_path: Path, command: str) -> None:
    folder = healthy(tmp_path / "scans")
    blocked = tmp_path / "without"
    blocked.mkdir()
    (blocked / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'pydicom' else find(name, *rest)\n"
    )

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(blocked), *filter(None, sys.path)])}
    typed = ["--healthy", folder, "--count", 1] if command == "generate" else [folder]
    done = run(command, *typed, "--out", tmp_path / "out", env=environment)
    line = error_line(done, 7)
    assert "pip install" in line and "[dicom]" in line
    assert_nobody_is_told(text=done.stderr)
