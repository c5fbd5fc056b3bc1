"""A shard's bytes, its table's schema, and the contract it holds a source to."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.dataset.shards import ShardRecord, lesion_box, schema_of, write_shard
from tests.harness.noise_source import NoiseSource, noise_sample

TYPES = NoiseSource().row_types()


def generated(*indices: int) -> SampleBatch:
    return NoiseSource().draw(7, indices, lambda _: None)


def write(folder: Path, number: int, answer: SampleBatch) -> ShardRecord:
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    return write_shard(folder, number, answer, TYPES)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_equal_samples_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name, 0, generated(0, 1, 2, 3))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_record_reads_back(tmp_path: Path) -> None:
    record = write(tmp_path, 0, generated(0, 1, 2, 3))
    assert record.rejected == {"too dark": 1}
    assert record.rejections[0].index == 3
    assert ShardRecord.read(tmp_path, 0) == record


def test_plain_tarfile_reads_pixels_back(tmp_path: Path) -> None:
    write(tmp_path, 0, generated(0, 1))
    sample = noise_sample(7, 1)
    with tarfile.open(tmp_path / "shards/000000.tar") as tar:
        suffixes = ("image.png", "mask.png", "json")
        assert tar.getnames() == [f"00000000{n}.{suffix}" for n in range(2) for suffix in suffixes]
        for member in tar:
            assert (member.mtime, member.uid, member.gid, member.mode, member.uname) == (0, 0, 0, 0o644, "")
        image, mask = (
            Image.open(io.BytesIO(tar.extractfile(f"000000001.{kind}.png").read())) for kind in ("image", "mask")
        )
        row = json.load(tar.extractfile("000000001.json"))
    assert (image.mode, mask.mode, image.info, mask.info) == ("L", "1", {}, {})
    assert np.array_equal(np.asarray(image), sample.image)
    assert np.array_equal(np.asarray(mask), sample.mask)
    assert row["lesion_pixels"] == sample.mask.sum()
    assert row == pl.read_parquet(tmp_path / "shards/000000.parquet").row(1, named=True)


def test_schema_does_not_depend_on_values(tmp_path: Path) -> None:
    write(tmp_path, 0, generated(0))
    write(tmp_path, 1, generated(1))
    with_value, without = (pl.read_parquet(tmp_path / f"shards/00000{number}.parquet") for number in range(2))
    assert with_value.schema == without.schema == schema_of(TYPES)
    assert without["rarely"].to_list() == without["never"].to_list() == [None]
    # A float column whose values happen to be whole numbers stays a float column.
    assert without.schema["whole"] == pl.Float64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 5}, "expected the sample of index"),
        ({"image": np.zeros((8, 8), np.uint8)}, r"image must be \(256, 256\) uint8"),
        ({"mask": np.zeros((256, 256), np.uint8)}, r"mask must be \(256, 256\) bool"),
        ({"label": "cyst"}, "label must be one of"),
        ({"label": "normal"}, "a normal one has no lesion"),
        ({"row": {"other": 1}}, "row must have fields"),
        ({"row": noise_sample(7, 1).row | {"rarely": 2.5}}, "rarely must be int or None, got 2.5"),
        ({"row": noise_sample(7, 1).row | {"flipped": 1}}, "flipped must be bool"),
        ({"row": noise_sample(7, 1).row | {"score": float("nan")}}, "score must be finite"),
    ],
)
def test_a_source_that_breaks_its_contract_is_refused(tmp_path: Path, change: dict, message: str) -> None:
    samples = [noise_sample(7, 0), replace(noise_sample(7, 1), **change)]
    with pytest.raises(ValueError, match=message):
        write(tmp_path, 0, SampleBatch(samples, []))
    assert contents(tmp_path) == {}


def test_row_fields_may_not_shadow_fixed_columns() -> None:
    with pytest.raises(ValueError, match="'index' has the name of a fixed column"):
        schema_of({"index": int})


def test_box_of_empty_mask_is_none_and_edges_are_exclusive() -> None:
    mask = np.zeros((256, 256), bool)
    assert lesion_box(mask) is None
    mask[10:20, 30:35] = True
    assert lesion_box(mask) == (30, 10, 35, 20)
