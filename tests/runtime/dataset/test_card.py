"""The card that travels with a dataset: its code runs, its command is the one that was given, its privacy text fits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import busigen
from busigen.registry import LESION_CLASSES, SYNTHETIC
from busigen.runtime.dataset.card import dataset_card
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import merge
from tests.harness.command import ROOT
from tests.harness.noise_source import NoiseSource

CLASSES = {"benign": 0.5, "malignant": 0.5}


class NamedSource(NoiseSource):
    """Noise that says which folders it would have come from."""

    def options(self) -> Mapping[str, str | None]:
        return {"--bundle": None, "--healthy": "my normals"}


def test_card_and_croissant_describe_the_dataset(tmp_path: Path) -> None:
    generate(NoiseSource(), tmp_path, count=8, seed=7, shard_size=3)
    assert "{000000..000002}.tar" in (tmp_path / "README.md").read_text()
    croissant = json.loads((tmp_path / "croissant.json").read_text())
    assert croissant["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    ids = [node["@id"] for node in croissant["distribution"] + croissant["recordSet"]]
    assert len(ids) == len(set(ids))
    fields = {field["name"] for field in croissant["recordSet"][0]["field"]}
    assert fields == set(Dataset.open(tmp_path).manifest().columns)


@pytest.mark.parametrize("shard_size", [2, 5])
def test_the_code_in_the_card_gives_images_and_masks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_size: int
) -> None:
    pytest.importorskip("webdataset")
    generate(NoiseSource(), tmp_path, count=5, seed=7, shard_size=shard_size)
    text = (tmp_path / "README.md").read_text()
    assert "pip install webdataset" in text
    (code, hub, bare) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    found: list[tuple[np.ndarray, np.ndarray, dict]] = []
    exec(code + "    found.append((image, mask, row))\n", {"found": found})
    expected = Dataset.open(tmp_path).samples(range(5))
    for (image, mask, row), sample in zip(found, expected, strict=True):
        assert (image.dtype, mask.dtype) == (np.uint8, np.bool_)
        assert np.array_equal(image, sample.image)
        assert np.array_equal(mask, sample.mask)
        assert row["index"] == sample.index
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path.parent / "cache")
    first: dict[str, Any] = {}
    exec(hub, first)
    assert np.array_equal(np.asarray(first["image"]), expected[0].image)
    assert np.array_equal(np.asarray(first["mask"]), expected[0].mask)
    assert LESION_CLASSES[first["row"]["class"]] == expected[0].label
    names: dict[str, bytes] = {}
    exec(bare, names)
    assert names["png"].startswith(b"\x89PNG")


def test_the_card_names_the_command_with_folders_by_name_alone(tmp_path: Path) -> None:
    source = NamedSource(healthy="0123", bundle="4567", classes={"malignant": 1.0}, provider="cpu")
    generate(source, tmp_path / "set", count=4, seed=7, shard_size=3)
    text = (tmp_path / "set" / "README.md").read_text()
    wanted = (
        "busigen generate --count 4 --healthy 'my normals' --classes malignant=1 --seed 7 --shard-size 3 --provider cpu"
    )
    assert f"\n{wanted}\n" in text
    assert str(tmp_path) not in "".join(path.read_text() for path in (tmp_path / "set").glob("*.[jm][sd]*"))


def test_the_card_names_the_classes_that_there_are(tmp_path: Path) -> None:
    generate(NoiseSource(), tmp_path, count=8, seed=7, shard_size=3)
    info = Dataset.open(tmp_path).info
    assert set(info["classes"]) == set(CLASSES)
    assert "a synthetic benign or malignant lesion" in dataset_card(info)
    assert "a synthetic malignant lesion" in dataset_card({**info, "classes": {"malignant": 8}})


def test_what_a_dataset_cites_is_this_version() -> None:
    """The version's date stands for the dataset's, so it has to move with the version."""
    cited = dict(re.findall(r"^(version|date-released): (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert cited == {"version": busigen.__version__, "date-released": busigen.RELEASED}


def test_privacy_and_letterbox_fit_the_backgrounds(tmp_path: Path) -> None:
    texts = {}
    for healthy in (SYNTHETIC, "0123"):
        generate(NoiseSource(healthy=healthy), tmp_path / healthy, count=2, seed=7, shard_size=2)
        info = Dataset.open(tmp_path / healthy).info
        texts[healthy] = dataset_card({**info, "columns": {**info["columns"], "letterbox_scale": "float"}})
        about = json.loads((tmp_path / healthy / "croissant.json").read_text())["description"]
        assert ("not anonymous" in about) == (healthy != SYNTHETIC)
    assert "not anonymous" in texts["0123"]
    assert "x = (X - letterbox_left) / letterbox_scale" in texts["0123"]
    assert "not anonymous" not in texts[SYNTHETIC]
    assert "given no patient's image" in texts[SYNTHETIC]
    assert "letterbox_scale, y" not in texts[SYNTHETIC]
    assert "black bars" in texts[SYNTHETIC] and "black bars" not in texts["0123"]


def test_the_header_names_the_shards_so_that_nothing_else_is_taken_for_samples(tmp_path: Path) -> None:
    """Read by ``datasets.load_dataset``, which takes the most frequent kind of file where a card names none: JSON."""
    for seed in (1, 2):
        generate(NoiseSource(), tmp_path / str(seed), count=2, seed=seed, shard_size=2)
    merge(tmp_path / "both", [tmp_path / "1", tmp_path / "2"])
    for folder, count in ((tmp_path / "1", 1), (tmp_path / "both", 2)):
        _, header, _ = (folder / "README.md").read_text().split("---\n", 2)
        (pattern,) = re.findall(r'^    path: "(.*)"$', header, re.MULTILINE)
        assert len(list(folder.glob(pattern))) == count
