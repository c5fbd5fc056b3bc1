"""Every format, read by the tool that it is for: what it reads equals the dataset."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from PIL import Image

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.errors import InputError, UsageError
from busigen.registry import LESION_CLASSES
from busigen.runtime.convert.run import convert
from busigen.runtime.dataset.format import Sample, SampleBatch
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import open_parts
from tests.harness.noise_source import NoiseSource, noise_sample
from tests.runtime.convert.test_outlines import filled

Samples = dict[str, Sample]


def samples_of(folder: Path) -> Samples:
    """All samples by the name that formats give them."""
    parts = open_parts(folder)
    return {
        f"{part.folder.name}-{key:09d}" if len(parts) > 1 else f"{key:09d}": sample
        for part in parts
        for key, sample in zip(part.plan.span, part.samples(part.plan.span), strict=True)
    }


@pytest.fixture(scope="module", params=["plain", "merged"])
def dataset(request: pytest.FixtureRequest) -> Path:
    return Path(request.getfixturevalue(request.param))


def pixels(path: Path) -> NDArray[Any]:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.asarray(image)


@pytest.mark.parametrize("split", [None, "train=0.6,test=0.4"])
@pytest.mark.parametrize("to", ["files", "busi"])
def test_prepare_reads_every_pair_of_plain_folders_and_of_busis_layout(
    dataset: Path, tmp_path: Path, to: str, split: str | None
) -> None:
    convert(dataset, tmp_path / "out", to=to, split=split)
    report = prepare([tmp_path / "out"], tmp_path / "prepared", strict=True)
    samples, read = samples_of(dataset), Prepared.open(tmp_path / "prepared")
    assert report.images == len(samples) and not report.refused
    if to == "busi":
        rows = pl.read_csv(tmp_path / "out" / "keys.csv", schema={"file": pl.String, "key": pl.String})
        keys = {Path(file).stem: key for file, key in rows.iter_rows()}
    for row in read.table.iter_rows(named=True):
        stem = row["id"].rpartition("/")[2]
        sample = samples[keys[stem] if to == "busi" else stem]
        assert row["class"] == sample.label
        np.testing.assert_array_equal(read.images[row["row"]], sample.image)
        np.testing.assert_array_equal(read.masks[row["row"]] > 0, sample.mask)


@pytest.mark.parametrize("split", [None, "train=0.7,val=0.3"])
def test_pycocotools_reads_masks_areas_and_boxes_as_the_manifest_has_them(
    dataset: Path, tmp_path: Path, split: str | None
) -> None:
    coco = pytest.importorskip("pycocotools.coco")
    convert(dataset, tmp_path / "out", to="coco", split=split)
    samples = samples_of(dataset)
    manifest = pl.read_parquet(dataset / "manifest.parquet")
    prefix = pl.col("part").str.slice(6) + "-" if "part" in manifest.columns else pl.lit("")
    rows = {row["name"]: row for row in manifest.with_columns(name=prefix + pl.col("key")).iter_rows(named=True)}
    for kind in ("instances", "polygons"):
        seen = set()
        for part in ("train", "val") if split else ("",):
            file = tmp_path / "out" / "annotations" / f"{kind}{f'_{part}' if part else ''}.json"
            read = coco.COCO(str(file))
            assert {one["name"]: one["id"] for one in read.loadCats(read.getCatIds())} == {"benign": 1, "malignant": 2}
            for image in read.loadImgs(read.getImgIds()):
                name = Path(image["file_name"]).stem
                row, sample = rows[name], samples[name]
                (annotation,) = read.loadAnns(read.getAnnIds(image["id"]))
                assert annotation["area"] == row["lesion_pixels"]
                left, top, width, height = annotation["bbox"]
                box = [left, top, left + width, top + height]
                assert box == [row[f"box_{side}"] for side in ("left", "top", "right", "bottom")]
                assert read.loadCats(annotation["category_id"])[0]["name"] == sample.label
                np.testing.assert_array_equal(read.annToMask(annotation), sample.mask)
                image_file = tmp_path / "out" / "images" / part / image["file_name"]
                np.testing.assert_array_equal(pixels(image_file), sample.image)
                seen.add(name)
        assert seen == set(samples)


def yolo_labels(folder: Path) -> Iterator[tuple[str, str, Path, list[tuple[int, NDArray[np.float64]]]]]:
    """Checks a YOLO data set as its trainer does; yields split, name, image and labels: class and (N, 2) corners."""
    yaml = pytest.importorskip("yaml")
    described = yaml.safe_load((folder / "data.yaml").read_text())
    assert {"train", "val", "names"} <= described.keys() and "path" not in described
    for split in set(described) - {"names"}:
        images = sorted((folder / described[split]).iterdir())
        assert images
        for image in images:
            lines = Path(str(image).replace("/images/", "/labels/")).with_suffix(".txt").read_text().splitlines()
            labels = []
            for line in lines:
                number, *numbers = line.split(" ")
                corners = np.array(numbers, dtype=np.float64).reshape(-1, 2)
                assert len(corners) >= 3 and corners.min() >= 0 and corners.max() <= 1
                assert described["names"][int(number)] in LESION_CLASSES
                labels.append((int(number), corners))
            yield split, image.stem, image, labels


@pytest.mark.parametrize("split", [None, "train=0.5,val=0.3,test=0.2"])
def test_yolos_labels_are_the_masks(dataset: Path, tmp_path: Path, split: str | None) -> None:
    convert(dataset, tmp_path / "out", to="yolo", split=split)
    samples, splits = samples_of(dataset), set()
    names = []
    for part, name, image, labels in yolo_labels(tmp_path / "out"):
        ((number, corners),) = labels
        assert LESION_CLASSES[number] == samples[name].label
        np.testing.assert_array_equal(filled([(x * 256, y * 256) for x, y in corners.tolist()]), samples[name].mask)
        np.testing.assert_array_equal(pixels(image), samples[name].image)
        names.append(name)
        splits.add(part)
    assert sorted(names) == sorted(samples)
    assert splits == {"train", "val"} | ({"test"} if split else set())


def test_ultralytics_finds_no_fault_with_the_labels(merged: Path, tmp_path: Path) -> None:
    utils = pytest.importorskip("ultralytics.data.utils")
    convert(merged, tmp_path / "out", to="yolo")
    checked = utils.check_det_dataset(str(tmp_path / "out" / "data.yaml"))
    assert checked["names"] == dict(enumerate(LESION_CLASSES))
    from ultralytics.data import YOLODataset

    found = YOLODataset(img_path=checked["train"], data=checked, task="segment", imgsz=256)
    assert len(found) == 13
    for label in found.labels:
        sample = samples_of(merged)[Path(label["im_file"]).stem]
        rows, columns = np.nonzero(sample.mask)
        x, y, width, height = (256 * label["bboxes"][0]).tolist()
        assert (x - width / 2, y - height / 2) == (columns.min(), rows.min())
        assert (width, height) == (np.ptp(columns) + 1, np.ptp(rows) + 1)


@pytest.mark.parametrize("split", [None, "train=0.6,val=0.2,test=0.2"])
def test_monais_transforms_read_images_and_label_maps(dataset: Path, tmp_path: Path, split: str | None) -> None:
    data = pytest.importorskip("monai.data")
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged

    convert(dataset, tmp_path / "out", to="monai", split=split)
    load = Compose([LoadImaged(["image", "label"], reverse_indexing=False), EnsureChannelFirstd(["image", "label"])])
    samples, seen, folds = samples_of(dataset), [], set()
    for key in ("training", "validation", "testing") if split else ("training",):
        for case in data.load_decathlon_datalist(str(tmp_path / "out" / "datalist.json"), True, key):
            name = Path(case["image"]).stem
            read, sample = load(case), samples[name]
            np.testing.assert_array_equal(np.asarray(read["image"]), sample.image[None])
            number = LESION_CLASSES.index(sample.label) + 1
            np.testing.assert_array_equal(np.asarray(read["label"]), (sample.mask * number)[None])
            assert case["class"] == sample.label
            folds.add(case.get("fold"))
            seen.append(name)
    assert sorted(seen) == sorted(samples)
    assert folds == ({None} if split else {0, 1, 2, 3, 4})


def nnunet_cases(folder: Path, part: str) -> Iterator[tuple[str, NDArray[Any], NDArray[Any]]]:
    """Name, image and labels of each case in imagesTr or imagesTs."""
    for path in sorted(folder.glob(f"images{part}/*")):
        case = path.name.removesuffix("_0000.png")
        yield case, pixels(path), pixels(folder / f"labels{part}" / f"{case}.png")


@pytest.mark.parametrize("split", [None, "train=0.8,test=0.2"])
def test_nnunets_cases_are_the_pairs_and_its_folds_part_them(dataset: Path, tmp_path: Path, split: str | None) -> None:
    out = tmp_path / "Dataset501_Busigen"
    convert(dataset, out, to="nnunet", split=split)
    samples = samples_of(dataset)
    trained, tested = (
        list(nnunet_cases(out, part)) if (out / f"images{part}").exists() else [] for part in ("Tr", "Ts")
    )
    for case, image, labels in trained + tested:
        sample = samples[case.removeprefix("busigen_")]
        np.testing.assert_array_equal(image, sample.image)
        np.testing.assert_array_equal(labels, sample.mask * (LESION_CLASSES.index(sample.label) + 1))
    assert len(trained) + len(tested) == len(samples) and bool(tested) == (split is not None)
    described = json.loads((out / "dataset.json").read_text())
    assert described["numTraining"] == len(trained)
    names = sorted(case for case, _, _ in trained)
    folds = json.loads((out / "splits_final.json").read_text())
    assert len(folds) == 5 and all(sorted(fold["train"] + fold["val"]) == names for fold in folds)
    assert sorted(case for fold in folds for case in fold["val"]) == names


def verify_with_nnunet(folder: Path) -> None:
    checking = pytest.importorskip("nnunetv2.experiment_planning.verify_dataset_integrity")
    checking.verify_dataset_integrity(str(folder), 1)


def test_nnunet_itself_finds_the_dataset_whole(merged: Path, synthetic_prepared: Prepared, tmp_path: Path) -> None:
    pytest.importorskip("nnunetv2")
    convert(merged, tmp_path / "Dataset501_A", to="nnunet")
    verify_with_nnunet(tmp_path / "Dataset501_A")
    convert(merged, tmp_path / "Dataset502_B", to="nnunet", real=synthetic_prepared.folder)
    verify_with_nnunet(tmp_path / "Dataset502_B")


def test_a_real_set_keeps_its_splits_beside_the_pairs(
    plain: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    out = tmp_path / "Dataset501_Busigen"
    convert(plain, out, to="nnunet", real=synthetic_prepared.folder)
    table = synthetic_prepared.table
    rows = {split: set(table.filter(pl.col("split") == split)["row"]) for split in ("train", "val", "test")}
    (fold,) = json.loads((out / "splits_final.json").read_text())
    named = {name: {case for case in fold[name] if case.startswith("real_")} for name in ("train", "val")}
    assert {name: {int(case[5:]) for case in cases} for name, cases in named.items()} == {
        "train": rows["train"],
        "val": rows["val"],
    }
    assert set(fold["train"]) - named["train"] == {f"busigen_{name}" for name in samples_of(plain)}
    assert not set(fold["val"]) - named["val"]
    tested = dict((int(case[5:]), labels) for case, _, labels in nnunet_cases(out, "Ts"))
    assert tested.keys() == rows["test"]
    for case, image, labels in nnunet_cases(out, "Tr"):
        if case.startswith("real_"):
            row = int(case[5:])
            np.testing.assert_array_equal(image, synthetic_prepared.clean[row])
            label = ("normal", *LESION_CLASSES).index(table["class"][row])
            np.testing.assert_array_equal(labels, (synthetic_prepared.masks[row] > 0) * label)
    assert json.loads((out / "dataset.json").read_text())["numTraining"] == 10 + len(rows["train"] | rows["val"])


class Painted(NoiseSource):
    """Pairs on given backgrounds: every third has none, the others share those of these hashes."""

    def __init__(self, hashes: list[str]) -> None:
        super().__init__()
        self.hashes = hashes

    def draw(self, seed: int, indices: Any, done: Any) -> SampleBatch:
        samples = []
        for index in indices:
            sample = noise_sample(seed, index)
            sample.row["healthy_sha256"] = None if index % 3 == 0 else self.hashes[index % len(self.hashes)]
            samples.append(sample)
        done(len(samples))
        return SampleBatch(samples, [])


def test_pairs_painted_into_images_to_be_tested_on_are_left_out(synthetic_prepared: Prepared, tmp_path: Path) -> None:
    table = synthetic_prepared.table
    some = {split: table.filter(pl.col("split") == split)["sha256"][0] for split in ("train", "val", "test")}
    generate(Painted([*some.values(), "0" * 64]), tmp_path / "set", count=24, seed=7, shard_size=8)
    report = convert(tmp_path / "set", tmp_path / "Dataset501_A", to="nnunet", real=synthetic_prepared.folder)
    rows = pl.read_parquet(tmp_path / "set" / "manifest.parquet")
    kept = rows.filter(pl.col("healthy_sha256").is_null() | pl.col("healthy_sha256").is_in([some["train"], "0" * 64]))
    (fold,) = json.loads((tmp_path / "Dataset501_A" / "splits_final.json").read_text())
    made = {case for case in fold["train"] if case.startswith("busigen_")}
    assert made == {f"busigen_{key}" for key in kept["key"]}
    assert (report.pairs, report.left_out) == (kept.height, 24 - kept.height) and report.left_out > 0
    assert any(f"left out: {report.left_out} pairs" in line for line in report.lines())
    assert not any(key in str(path) for key in set(rows["key"]) - set(kept["key"]) for path in tmp_path.glob("D*/*/*"))


@pytest.mark.parametrize("to", ["monai", "nnunet"])
def test_pairs_of_one_background_are_in_one_fold_and_one_split(tmp_path: Path, to: str) -> None:
    hashes = [f"{number:064x}" for number in range(7)]
    generate(Painted(hashes), tmp_path / "set", count=60, seed=7, shard_size=20)
    healthy = dict(pl.read_parquet(tmp_path / "set" / "manifest.parquet")["key", "healthy_sha256"].iter_rows())
    for split in (None, "train=0.6,val=0.2,test=0.2"):
        out = tmp_path / f"Dataset50{int(split is None)}_A"
        convert(tmp_path / "set", out, to=to, split=split)
        if to == "monai":
            lists = json.loads((out / "datalist.json").read_text())
            cases = [(case["image"], f"{name} {case.get('fold')}") for name in lists for case in lists[name]]
        else:
            folds = json.loads((out / "splits_final.json").read_text())
            cases = [(case, f"fold {number}") for number, fold in enumerate(folds) for case in fold["val"]]
            cases += [(case, "train") for case in folds[0]["train"] if split]
            cases += [(path.name, "test") for path in out.glob("imagesTs/*")]
        places: dict[str, set[str]] = {}
        for case, place in cases:
            key = re.search(r"\d{9}", case)
            assert key is not None
            places.setdefault(healthy[key[0]] or key[0], set()).add(place)
        assert len(cases) == 60
        assert all(len(where) == 1 for where in places.values()) and set(hashes) <= places.keys()


def test_masks_of_several_parts_with_holes_are_said_exactly(tmp_path: Path) -> None:
    class Odd(NoiseSource):
        def draw(self, seed: int, indices: Any, done: Any) -> SampleBatch:
            samples = [noise_sample(seed, index) for index in indices]
            for sample in samples:
                rows, columns = np.nonzero(sample.mask)
                sample.mask[int(rows.mean()), int(columns.mean())] = False
                sample.mask[4:9, 4:9] = True
            done(len(samples))
            return SampleBatch(samples, [])

    generate(Odd(), tmp_path / "set", count=3, seed=7, shard_size=3)
    samples = samples_of(tmp_path / "set")
    convert(tmp_path / "set", tmp_path / "yolo", to="yolo", split="train=0.5,val=0.5")
    for _, name, _, ((_, corners),) in yolo_labels(tmp_path / "yolo"):
        np.testing.assert_array_equal(filled([(x * 256, y * 256) for x, y in corners.tolist()]), samples[name].mask)


def test_what_a_format_cannot_say_is_refused_before_anything_is_written(plain: Path, tmp_path: Path) -> None:
    for to, options, problem in (
        ("nnunet", {}, "has no name that nnU-Net would find"),
        ("yolo", {"split": "train=1"}, "has no 'val', which YOLO needs"),
        ("yolo", {"split": "train=0.5,dev=0.5"}, "names 'dev'"),
        ("monai", {"split": "train=0.5,dev=0.5"}, "names 'dev'"),
        ("coco", {"real": plain}, "--real means nothing to coco"),
    ):
        with pytest.raises(UsageError, match=problem):
            convert(plain, tmp_path / "out", to=to, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="--split and --real are both given"):
        convert(plain, tmp_path / "Dataset501_A", to="nnunet", real=plain, split="train=0.5,val=0.5")
    with pytest.raises(InputError, match="prepared"):
        convert(plain, tmp_path / "Dataset501_A", to="nnunet", real=plain)
    assert list(tmp_path.iterdir()) == []
