"""``grid`` as a user meets it: real processes, the shipped bundle, proven backgrounds, a replay of one of a group."""

from __future__ import annotations

from pathlib import Path

import polars as pl

import busigen
from busigen.evaluation.reading.sets import read_set
from tests.harness.command import error_line, run
from tests.harness.hashing import hashes

GRID = ("--vary", "class,size=0.03/0.06", "--backgrounds", 2, "--batch-size", 4, "--seed", 3)


def test_a_grid_is_written_proven_and_replayed_and_workers_change_no_byte(tmp_path: Path) -> None:
    out = tmp_path / "set"
    done = run("grid", *GRID, "--out", out)
    assert done.returncode == 0, done.stderr
    table = pl.read_parquet(out / "manifest.parquet")
    assert table["grid_group"].to_list() == [0] * 4 + [1] * 4
    assert table["grid_level"].to_list()[:4] == [
        f"{label}, size {size}" for label in ("benign", "malignant") for size in ("0.03", "0.06")
    ]
    proven = run("verify", out)
    assert proven.returncode == 0, proven.stdout
    assert "equal outside of their edit regions, bit for bit: 2 of 2" in proven.stdout
    audited = read_set(out).table
    assert audited["grid_group"].n_unique() == 2 and audited["grid_level"].to_list() == table["grid_level"].to_list()
    assert audited["group"].n_unique() <= 2, "images of one background belong together"
    told = run("explain", out, "6")
    assert told.returncode == 0, told.stderr
    assert "the image's bytes agree" in told.stdout and "the mask's bytes agree" in told.stdout
    whole = hashes(out)
    (out / "shards/000000.json").unlink()
    assert run("grid", *GRID, "--out", out, "--workers", 2).returncode == 0
    assert hashes(out) == whole
    by_python = tmp_path / "by-python"
    busigen.grid(by_python, ["class", "size=0.03/0.06"], 2, batch_size=4, seed=3, progress=False)
    for file in ("shards/000000.tar", "manifest.parquet", "run.json"):
        assert (by_python / file).read_bytes() == (out / file).read_bytes()


def test_what_cannot_be_varied_is_said_in_a_line(tmp_path: Path) -> None:
    for options, words in (
        (("--vary", "colour"), "--vary names 'colour'"),
        (("--vary", "size", "--size", "0.03"), "--size holds what --vary varies"),
        (("--vary", "class", "--backgrounds", "0"), "--backgrounds is 0"),
    ):
        assert words in error_line(run("grid", *options, "--out", tmp_path / "set"), 2)
    assert not (tmp_path / "set").exists()


def test_a_category_that_the_bundle_hardly_knows_is_said_whether_asked_or_varied(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("mine")  # So that nothing is drawn: the folder is someone's.
    for options, told in (
        (("--vary", "size", "--birads", "2"), ["BI-RADS 2 with malignant"]),
        (("--vary", "birads=2/4", "--classes", "benign"), []),
        (("--vary", "class,birads=2/5"), ["BI-RADS 5 with benign", "BI-RADS 2 with malignant"]),
    ):
        done = run("grid", *options, "--out", tmp_path)
        assert done.returncode == 4, done.stderr
        assert [line.partition(":")[0] for line in done.stderr.splitlines() if "learned it from" in line] == told
