"""A prepared folder that was changed is not used."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from busigen.data.prepared import Prepared
from busigen.errors import BusigenError, InputError, IntegrityError
from busigen.evaluation.reading.sets import read_set
from busigen.files import sha256_of, temporary_name


@pytest.fixture
def folder(synthetic_prepared: Prepared, tmp_path: Path) -> Path:
    """A copy of the drawn prepared folder, to be damaged."""
    return Path(shutil.copytree(synthetic_prepared.folder, tmp_path / "prepared"))


def test_arrays_are_read_only_and_match_the_table(synthetic_prepared: Prepared) -> None:
    shape = (synthetic_prepared.table.height, 256, 256)
    assert (
        synthetic_prepared.images.shape == synthetic_prepared.masks.shape == synthetic_prepared.overlays.shape == shape
    )
    assert synthetic_prepared.clean.shape == synthetic_prepared.suspects.shape == shape
    assert (
        synthetic_prepared.images.dtype == synthetic_prepared.masks.dtype == synthetic_prepared.clean.dtype == np.uint8
    )
    assert synthetic_prepared.overlays.dtype == synthetic_prepared.suspects.dtype == np.bool_
    with pytest.raises(ValueError, match="read-only"):
        synthetic_prepared.images[0, 0, 0] = 1
    assert synthetic_prepared.split_hash == synthetic_prepared.info["split_hash"]


def test_other_folders_are_not_prepared_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no prepared folder"):
        Prepared.open(tmp_path)
    with pytest.raises(InputError, match="no prepared folder"):
        Prepared.open(tmp_path / "nowhere")
    for content in ("", "[]", "{", '{"schema": 99}', "[" * 100_000, '"\\ud800"'):
        (tmp_path / "prepared.json").write_text(content)
        with pytest.raises(BusigenError):
            Prepared.open(tmp_path)


def test_a_run_that_was_killed_is_said_to_be_unfinished(tmp_path: Path) -> None:
    (tmp_path / temporary_name("images.npy")).write_bytes(b"half")
    for read in (Prepared.open, read_set):
        with pytest.raises(InputError, match="prepare` was not finished") as refusal:
            read(tmp_path)
        assert refusal.value.fix == "Give the same command again."


def test_a_folder_of_the_old_schema_is_refused_with_what_to_do(folder: Path) -> None:
    info = json.loads((folder / "prepared.json").read_text())
    info["schema"] = 1
    (folder / "prepared.json").write_text(json.dumps(info))
    for name in ("clean.npy", "suspects.npy"):
        (folder / name).unlink()
    with pytest.raises(InputError, match="schema 1; this busigen reads 2") as refusal:
        Prepared.open(folder)
    assert "busigen prepare" in refusal.value.fix


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: _flip(folder / "table.parquet", 100),
        lambda folder: (folder / "table.parquet").unlink(),
        lambda folder: (folder / "masks.npy").unlink(),
        lambda folder: (folder / "images.npy").write_bytes(b"\x93NUMPY"),
        lambda folder: (folder / "images.npy").write_bytes((folder / "images.npy").read_bytes()[:-9]),
        lambda folder: np.save(folder / "masks.npy", np.zeros((3, 256, 256), np.uint8)),
        lambda folder: np.save(folder / "overlays.npy", np.array([{}], dtype=object), allow_pickle=True),
    ],
    ids=["table", "no table", "no masks", "header", "cut short", "other shape", "pickle"],
)
def test_damage_is_noticed_on_opening(folder: Path, change: Callable[[Path], object]) -> None:
    change(folder)
    with pytest.raises(IntegrityError) as refusal:
        Prepared.open(folder)
    assert refusal.value.fix


def test_a_changed_pixel_is_noticed_by_a_full_check(folder: Path) -> None:
    _flip(folder / "images.npy", -5)
    Prepared.open(folder)
    with pytest.raises(IntegrityError, match=r"images\.npy"):
        Prepared.open(folder, check=True)


def test_a_rewritten_split_is_noticed(folder: Path) -> None:
    info = json.loads((folder / "prepared.json").read_text())
    info["split_hash"] = "0" * 64
    (folder / "prepared.json").write_text(json.dumps(info))
    with pytest.raises(IntegrityError, match="splits"):
        Prepared.open(folder)


def test_a_folder_of_before_there_were_scanners_is_read_with_none(folder: Path) -> None:
    table = pl.read_parquet(folder / "table.parquet")
    assert table["scanner"].drop_nulls().len()
    table.drop("scanner").write_parquet(folder / "table.parquet")
    info = json.loads((folder / "prepared.json").read_text())
    info["files"]["table.parquet"] = sha256_of(folder / "table.parquet")
    (folder / "prepared.json").write_text(json.dumps(info))
    found = Prepared.open(folder).table
    assert found["scanner"].is_null().all()
    assert found.drop("scanner").equals(table.drop("scanner"))
