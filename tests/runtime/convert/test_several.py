"""Every format of a dataset whose images have several lesions, as its tool reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.runtime.convert.run import convert
from busigen.runtime.dataset.format import Sample
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.sampling.conditions import parse_conditions
from tests.harness.several_lesions import SMALL, written


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    asked = parse_conditions(**SMALL, birads="4")
    return written(tmp_path_factory.mktemp("several") / "set", asked=asked)


@pytest.fixture(scope="module")
def samples(dataset: Path) -> dict[str, Sample]:
    return {f"{sample.index:09}": sample for sample in Dataset.open(dataset).samples(range(10))}


def marked(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image) > 0


def test_coco_has_an_annotation_for_each_lesion(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    convert(dataset, tmp_path / "out", to="coco")
    for name in ("instances", "polygons"):
        read = coco.COCO(str(tmp_path / f"out/annotations/{name}.json"))
        assert sum(len(sample.masks) for sample in samples.values()) == 14
        assert sorted(read.getAnnIds()) == list(range(1, 15))
        for image in read.loadImgs(read.getImgIds()):
            masks = samples[Path(image["file_name"]).stem].masks
            found = read.loadAnns(sorted(read.getAnnIds(image["id"])))
            assert len(found) == len(masks)
            for annotation, mask in zip(found, masks, strict=True):
                assert np.array_equal(read.annToMask(annotation) > 0, mask)
                assert annotation["area"] == mask.sum()
            row = samples[Path(image["file_name"]).stem].row
            for number, annotation in enumerate(found, start=1):
                told = {key: row[f"lesion_{number}_{key}"] for key in ("area_share", "across", "depth", "height_width")}
                assert annotation["attributes"] == {"asked_birads": "4", **told}
            assert image["attributes"]["lesions"] == len(masks) and image["attributes"]["background"] == "synthetic"


def test_yolo_has_a_line_for_each_lesion(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    convert(dataset, tmp_path / "out", to="yolo")
    for name, sample in samples.items():
        (text,) = (tmp_path / "out/labels").glob(f"*/{name}.txt")
        lines = text.read_text().splitlines()
        assert len(lines) == len(sample.masks)
        for line, mask in zip(lines, sample.masks, strict=True):
            x, y = np.array(line.split()[1:], float).reshape(-1, 2).T * 256
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            assert (x.min(), x.max(), y.min(), y.max()) == (columns[0], columns[-1] + 1, rows[0], rows[-1] + 1)


def test_busi_numbers_further_masks_and_prepare_joins_them(
    dataset: Path, samples: dict[str, Sample], tmp_path: Path
) -> None:
    convert(dataset, tmp_path / "out", to="busi")
    for line in (tmp_path / "out/keys.csv").read_text().splitlines()[1:]:
        file, key = line.split(",")
        image, masks = tmp_path / "out" / file, samples[key].masks
        names = [f"{image.stem}_mask{f'_{number}' if number else ''}.png" for number in range(max(1, len(masks)))]
        assert sorted(path.name for path in image.parent.glob(f"{image.stem}_mask*")) == sorted(names)
        for name, mask in zip(names, masks, strict=False):
            assert np.array_equal(marked(image.parent / name), mask)
    prepare([tmp_path / "out"], tmp_path / "prepared", strict=True)
    prepared = Prepared.open(tmp_path / "prepared")
    assert sorted(prepared.table["lesions"]) == sorted(len(sample.masks) for sample in samples.values())


def test_label_maps_and_files_mark_all_of_them(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    for to, out in (("files", "files"), ("nnunet", "Dataset501_Several"), ("monai", "monai")):
        convert(dataset, tmp_path / out, to=to)
    for name, sample in samples.items():
        for path in (
            tmp_path / f"files/masks/{sample.label}/{name}.png",
            tmp_path / f"Dataset501_Several/labelsTr/busigen_{name}.png",
            tmp_path / f"monai/labels/{name}.png",
        ):
            assert np.array_equal(marked(path), sample.mask)


def test_hugging_face_has_the_mask_of_all_and_columns_of_each(
    dataset: Path, samples: dict[str, Sample], tmp_path: Path
) -> None:
    convert(dataset, tmp_path / "out", to="hf")
    table = pl.read_parquet(tmp_path / "out/data/*.parquet")
    assert dict(table.select("name", "lesions").iter_rows()) == {k: len(s.masks) for k, s in samples.items()}
    assert "lesion_3_box_left" in table.columns


def test_load_dataset_reads_the_shards_as_they_are(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    hub = pytest.importorskip("datasets")
    rows = hub.load_dataset(str(dataset), split="train", cache_dir=str(tmp_path / "cache"))
    for row, sample in zip(rows, samples.values(), strict=True):
        for number in range(1, 4):
            mask = sample.masks[number - 1] if number <= len(sample.masks) else np.zeros_like(sample.mask)
            assert np.array_equal(np.asarray(row[f"mask_{number}.png"]), mask)
        assert row["json"]["lesions"] == len(sample.masks)


def test_croissant_names_the_masks_of_each(dataset: Path) -> None:
    described = json.loads((dataset / "croissant.json").read_text())
    patterns = {one.get("includes") for one in described["distribution"]}
    assert {"*.mask.png", "*.mask_1.png", "*.mask_2.png", "*.mask_3.png"} <= patterns


def test_dicom_has_a_segment_for_each_lesion(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    highdicom = pytest.importorskip("highdicom", reason="what it needs has no wheels for Python 3.14")
    import pydicom

    convert(dataset, tmp_path / "out", to="dicom")
    tracked = set()
    for name, sample in samples.items():
        if not sample.masks:
            continue
        image = pydicom.dcmread(tmp_path / f"out/images/{name}.dcm")
        read = highdicom.seg.segread(tmp_path / f"out/segmentations/{name}.dcm")
        assert read.number_of_segments == len(sample.masks)
        pixels = read.get_pixels_by_source_instance([image.SOPInstanceUID])[0]
        for number, mask in enumerate(sample.masks):
            assert np.array_equal(pixels[..., number] > 0, mask)
            described = read.get_segment_description(number + 1)
            assert described.segment_label == sample.label
            tracked.add(described.tracking_uid)
    assert len(tracked) == 14
