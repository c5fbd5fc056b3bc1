"""A dataset, plain or merged, as Hugging Face's `datasets` and MLCommons' `mlcroissant` read it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from busigen.registry import LESION_CLASSES
from busigen.runtime.dataset.format import key_of
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import merge, open_parts
from tests.harness.noise_source import NoiseSource

KINDS = ("plain", "merged")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset in three shards, whose columns ``rarely`` and ``never`` lack values, and one that is merged of two."""
    place = tmp_path_factory.mktemp("made")
    generate(NoiseSource(), place / "plain", count=10, seed=7, shard_size=4)
    generate(NoiseSource(), place / "other", count=5, seed=8, shard_size=4)
    merge(place / "merged", [place / "plain", place / "other"])
    return place


@pytest.fixture(scope="module")
def mlcroissant(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library, which decides where to unpack archives when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CROISSANT_CACHE", str(tmp_path_factory.mktemp("croissant")))
        return pytest.importorskip("mlcroissant")


def samples(folder: Path) -> Iterator[Any]:
    for part in open_parts(folder):
        yield from part.samples(part.plan.span)


def plain(record: dict[str, Any]) -> dict[str, Any]:
    """A record of Croissant's by its fields' own names, texts as such."""
    return {
        name.rpartition("/")[2]: value.decode() if isinstance(value, bytes) else value for name, value in record.items()
    }


@pytest.mark.parametrize("kind", KINDS)
def test_load_dataset_reads_pictures_labels_and_typed_rows(made: Path, tmp_path: Path, kind: str) -> None:
    hub = pytest.importorskip("datasets")
    folder = made / kind
    rows = hub.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
    manifest = pl.read_parquet(folder / "manifest.parquet")
    table = rows.features["json"]
    assert isinstance(rows.features["image.png"], hub.Image) and isinstance(rows.features["mask.png"], hub.Image)
    assert table["class"].names == list(LESION_CLASSES)
    kinds = {pl.String: "string", pl.Int64: "int64", pl.Float64: "float64", pl.Boolean: "bool"}
    columns = {name: kinds[type(kind)] for name, kind in manifest.drop("part", strict=False).schema.items()}
    assert {name: value.dtype for name, value in table.items()} == columns | {"class": "int64"}
    for row, sample, wanted in zip(rows, samples(folder), manifest.iter_rows(named=True), strict=True):
        assert np.array_equal(np.asarray(row["image.png"]), sample.image)
        assert np.array_equal(np.asarray(row["mask.png"]), sample.mask)
        found = row["json"] | {"class": LESION_CLASSES[row["json"]["class"]]}
        assert found == {name: value for name, value in wanted.items() if name != "part"}


def test_the_header_is_what_the_hub_asks_for(made: Path) -> None:
    hub = pytest.importorskip("huggingface_hub")
    for kind in KINDS:
        data = hub.DatasetCard.load(made / kind / "README.md").data.to_dict()
        assert data["license"] == "other" and data["size_categories"] == ["n<1K"]
        assert data["task_categories"] == ["image-segmentation", "image-classification"]
        assert "synthetic" in data["tags"]


@pytest.mark.parametrize("kind", KINDS)
def test_croissant_is_valid_without_a_warning_and_gives_rows_and_pictures(
    made: Path, mlcroissant: Any, kind: str
) -> None:
    folder = made / kind
    dataset = mlcroissant.Dataset(str(folder / "croissant.json"))
    assert dataset.metadata.ctx.issues.report() == ""
    manifest = pl.read_parquet(folder / "manifest.parquet")
    rows = [plain(row) for row in dataset.records("samples")]
    assert rows == manifest.to_dicts()
    for part in open_parts(folder):
        start = "" if part.folder == folder else f"parts-{part.folder.name}-"
        wanted = list(part.samples(part.plan.span))
        for kind in ("image", "mask"):
            found = {row["key"]: row["pixels"] for row in map(plain, dataset.records(f"{start}{kind}s_content"))}
            assert len(found) == len(wanted)
            assert all(np.array_equal(np.asarray(found[key_of(one.index)]), getattr(one, kind)) for one in wanted)
