"""Every format of a dataset that holds samples without a lesion, as its tool reads them."""

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
from busigen.runtime.execution.factory import generate
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.runtime.sampling.inputs.test_given_masks import save_image


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("normals")
    for number in range(4):
        save_image(folder / f"healthy/{number}.png", (400, 300 + 30 * number), seed=number)
    sampler = quick_sampler(QuickEngine(), healthy=HealthyFolder(folder / "healthy"), normals=0.4)
    generate(sampler, folder / "set", count=10, seed=5, shard_size=5)
    return folder / "set"


@pytest.fixture(scope="module")
def samples(dataset: Path) -> dict[str, Sample]:
    return {f"{sample.index:09}": sample for sample in Dataset.open(dataset).samples(range(10))}


def empty(path: Path) -> bool:
    with Image.open(path) as image:
        return not np.asarray(image).any()


@pytest.mark.parametrize("to", ["files", "busi"])
def test_folders_have_one_of_normals_with_empty_masks_that_prepare_reads(
    dataset: Path, tmp_path: Path, to: str
) -> None:
    convert(dataset, tmp_path / "out", to=to)
    if to == "busi":
        assert all(empty(tmp_path / f"out/normal/normal ({number})_mask.png") for number in range(1, 5))
    else:
        assert len(list((tmp_path / "out/images/normal").iterdir())) == 4
    prepare([tmp_path / "out"], tmp_path / "prepared", strict=True)
    table = Prepared.open(tmp_path / "prepared").table
    assert dict(table.group_by("class").len().iter_rows()) == {"benign": 3, "malignant": 3, "normal": 4}
    assert table.filter(pl.col("class") == "normal")["lesions"].to_list() == [0] * 4


def test_coco_has_their_images_and_no_annotations(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    convert(dataset, tmp_path / "out", to="coco")
    read = coco.COCO(str(tmp_path / "out/annotations/instances.json"))
    assert {one["name"] for one in read.loadCats(read.getCatIds())} == {"benign", "malignant"}
    assert len(read.getImgIds()) == 10
    for image in read.loadImgs(read.getImgIds()):
        label = samples[Path(image["file_name"]).stem].label
        assert len(read.getAnnIds(image["id"])) == (label != "normal")


def test_label_files_and_maps_are_empty(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    for to, out in (("yolo", "yolo"), ("nnunet", "Dataset501_Normals"), ("monai", "monai")):
        convert(dataset, tmp_path / out, to=to)
    for name, sample in samples.items():
        (text,) = (tmp_path / "yolo/labels").glob(f"*/{name}.txt")
        assert (text.read_text() == "") == (sample.label == "normal")
        maps = (tmp_path / f"Dataset501_Normals/labelsTr/busigen_{name}.png", tmp_path / f"monai/labels/{name}.png")
        assert [empty(path) for path in maps] == [sample.label == "normal"] * 2
    assert json.loads((tmp_path / "Dataset501_Normals/dataset.json").read_text())["labels"] == {
        "background": 0,
        "benign": 1,
        "malignant": 2,
    }
    assert "normal" not in (tmp_path / "yolo/data.yaml").read_text()


def test_hugging_face_has_a_third_label(dataset: Path, samples: dict[str, Sample], tmp_path: Path) -> None:
    convert(dataset, tmp_path / "out", to="hf")
    table = pl.read_parquet(tmp_path / "out/data/*.parquet")
    assert [(name, "normal") for name in table.filter(pl.col("label") == 2)["name"]] == [
        (name, sample.label) for name, sample in samples.items() if sample.label == "normal"
    ]
    card = (tmp_path / "out/README.md").read_text()
    assert '"2": "normal"' in card and "Normal images have no lesion" in card


def test_chosen_by_class(dataset: Path, tmp_path: Path) -> None:
    assert convert(dataset, tmp_path / "out", to="files", classes="normal").pairs == 4
    assert convert(dataset, tmp_path / "rest", to="hf", classes="benign,malignant").pairs == 6
    card = (tmp_path / "rest/README.md").read_text()
    assert '"2": "normal"' not in card and "Normal images" not in card


def test_dicom_has_no_segmentation_of_them_and_says_that_nothing_was_drawn(
    dataset: Path, samples: dict[str, Sample], tmp_path: Path
) -> None:
    pytest.importorskip("highdicom", reason="what it needs has no wheels for Python 3.14")
    import pydicom

    report = convert(dataset, tmp_path / "out", to="dicom")
    assert any("normal images have none" in note for note in report.notes)
    for name, sample in samples.items():
        image = pydicom.dcmread(tmp_path / f"out/images/{name}.dcm")
        assert np.array_equal(image.pixel_array, sample.image)
        assert image.SyntheticData == ("NO" if sample.label == "normal" else "YES")
        assert (tmp_path / f"out/segmentations/{name}.dcm").exists() == (sample.label != "normal")
