"""Telling real images that a generator has not seen from those it was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.prepared import Prepared
from busigen.evaluation.reading.inputs import split_by_training
from busigen.evaluation.reading.sets import read_set
from tests.harness.synthetic_datasets import draw_pairs


def test_the_prepared_folder_itself_keeps_its_splits(synthetic_prepared: Prepared) -> None:
    parted = split_by_training(read_set(synthetic_prepared.folder), synthetic_prepared)
    table = synthetic_prepared.table
    assert parted.train.table["id"].to_list() == table.filter(pl.col("split") == "train")["id"].to_list()
    assert parted.held_out.table["id"].to_list() == table.filter(pl.col("split").is_in(["val", "test"]))["id"].to_list()
    assert parted.near == 0


def test_a_source_folder_keeps_the_splits_of_its_files(synthetic_busi: Path, synthetic_prepared: Prepared) -> None:
    parted = split_by_training(read_set(synthetic_busi), synthetic_prepared)
    splits = dict(synthetic_prepared.table.select("id", "split").iter_rows())
    assert {splits[name] for name in parted.held_out.table["id"]} == {"val", "test"}
    kept = [name for name, split in splits.items() if name.startswith("busi/") and split in ("val", "test")]
    assert sorted(parted.held_out.table["id"]) == sorted(kept)
    # Training images that the real set lacks count all the same.
    assert any(name.startswith("busbra/") for name in parted.train.table["id"])


@pytest.mark.parametrize("change", ["saved again", "cropped and noisy", "mirrored"])
def test_copies_of_training_images_under_other_names_are_not_held_out(
    change: str, synthetic_busi: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    folder = draw_pairs(tmp_path / "mine", count=6)
    rng = np.random.default_rng(0)
    training = synthetic_prepared.table.filter((pl.col("split") == "train") & (pl.col("source") == "busi"))[
        "image_file"
    ]
    for number, file in enumerate(training[:4]):
        pixels = np.asarray(Image.open(synthetic_busi.parent / file).convert("L"))
        if change == "mirrored":
            pixels = np.ascontiguousarray(pixels[:, ::-1])
        elif change != "saved again":
            pixels = np.clip(pixels[3:-2, 2:-3] + rng.normal(0, 3, pixels[3:-2, 2:-3].shape), 0, 255).astype(np.uint8)
        image = Image.fromarray(pixels)
        image.save(folder / "images" / "benign" / f"other{number}.png", optimize=True)
        Image.new("L", image.size).save(folder / "masks" / f"other{number}.png")
    parted = split_by_training(read_set(folder), synthetic_prepared)
    assert sorted(parted.held_out.table["id"]) == sorted(
        f"mine/{label}/scan{number}" for number, label in enumerate(("benign", "malignant", "normal") * 2)
    )
    assert (parted.same, parted.near) == (0, 4)


def test_a_patient_of_a_training_image_is_not_held_out(
    synthetic_busbra: Path, synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    """Of two images of one patient, one a copy of a training image, neither is held out."""
    table = synthetic_prepared.table.filter((pl.col("split") == "train") & (pl.col("source") == "busbra"))
    file = table["image_file"][0]
    folder = draw_pairs(tmp_path / "mine", count=4, labels=True)  # Patient p0 has scans 0 and 1.
    copy = np.asarray(Image.open(synthetic_busbra.parent / file).convert("L"))
    Image.fromarray(copy).save(folder / "images" / "scan0.png", optimize=True)
    Image.new("L", copy.shape[::-1]).save(folder / "masks" / "scan0_mask.png")
    parted = split_by_training(read_set(folder), synthetic_prepared)
    assert sorted(parted.held_out.table["id"]) == ["mine/scan2", "mine/scan3"]
