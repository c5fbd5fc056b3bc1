"""Hugging Face's Parquet, read by `datasets`: what it reads equals the dataset."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from busigen.errors import InputError, UsageError
from busigen.registry import LESION_CLASSES
from busigen.runtime.convert.run import convert
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import open_parts
from tests.harness.noise_source import NoiseSource


@pytest.mark.parametrize("split", [None, "train=0.6,val=0.2,test=0.2"])
@pytest.mark.parametrize("kind", ["plain", "merged"])
def test_datasets_reads_every_pair_with_its_row(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str, split: str | None
) -> None:
    datasets = pytest.importorskip("datasets")
    folder = request.getfixturevalue(kind)
    convert(folder, tmp_path / "out", to="hf", split=split)
    found = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert list(found) == (["train", "val", "test"] if split else ["train"])
    features = found["train"].features
    manifest = pl.read_parquet(folder / "manifest.parquet")
    kinds = {pl.String: "string", pl.Int64: "int64", pl.Float64: "float64", pl.Boolean: "bool"}
    columns = {name: kinds[type(kind)] for name, kind in manifest.drop("class", "part", strict=False).schema.items()}
    assert isinstance(features.pop("image"), datasets.Image) and isinstance(features.pop("mask"), datasets.Image)
    assert features.pop("label").names == list(LESION_CLASSES)
    assert {name: value.dtype for name, value in features.items()} == {"name": "string"} | columns

    rows = [row for part in found.values() for row in part]
    if split is None:
        assert [row["image_sha256"] for row in rows] == manifest["image_sha256"].to_list()
    by_hash = {row["image_sha256"]: row for row in rows}
    samples = [sample for part in open_parts(folder) for sample in part.samples(part.plan.span)]
    assert len(rows) == len(by_hash) == len(samples)
    for sample, wanted in zip(samples, manifest.iter_rows(named=True), strict=True):
        row = by_hash[wanted["image_sha256"]]
        assert np.array_equal(np.asarray(row.pop("image")), sample.image)
        assert np.array_equal(np.asarray(row.pop("mask")), sample.mask)
        assert LESION_CLASSES[row.pop("label")] == wanted.pop("class")
        part = wanted.pop("part", None)
        assert row.pop("name") == (f"{part.removeprefix('parts/')}-{wanted['key']}" if part else wanted["key"])
        assert row == wanted


class Labelled(NoiseSource):
    """Noise whose rows have a column of a name that the format needs for itself."""

    def row_types(self) -> Mapping[str, type]:
        return {**super().row_types(), "label": str}

    def draw(self, seed: int, indices: Any, done: Any) -> SampleBatch:
        drawn = super().draw(seed, indices, done)
        for sample in drawn.samples:
            sample.row["label"] = sample.label
        return drawn


def test_what_it_cannot_say_is_refused_before_anything_is_written(plain: Path, tmp_path: Path) -> None:
    for split, name in (("train=0.5,hold-out=0.5", "hold-out"), ("train=0.5,all=0.5", "all")):
        with pytest.raises(UsageError, match=f"'{name}', which is no name of a split to Hugging Face"):
            convert(plain, tmp_path / "out", to="hf", split=split)
    generate(Labelled(), tmp_path / "set", count=4, seed=7, shard_size=4)
    with pytest.raises(InputError, match="has a column 'label' of its own"):
        convert(tmp_path / "set", tmp_path / "out", to="hf")
    assert not list(tmp_path.glob("out/*"))
