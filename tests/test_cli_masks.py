"""``generate --masks`` as a user meets it: real processes, the shipped bundle, a kill, a replay, a repair."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import polars as pl
import pytest

from tests.harness.command import SMALL, Done, error_line, run
from tests.harness.hashing import hashes
from tests.harness.replaying import flip


@pytest.fixture(scope="module")
def places(synthetic_busi: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some of the set's malignant images with their masks, a folder of healthy images, and an empty place."""
    base = tmp_path_factory.mktemp("masks")
    shutil.copytree(synthetic_busi / "normal", base / "normal")
    for number in (2, 3, 6, 7):
        for path in (synthetic_busi / "malignant").glob(f"malignant ({number})*"):
            (base / "own/malignant").mkdir(parents=True, exist_ok=True)
            shutil.copy(path, base / "own/malignant")
    return {"masks": base / "own", "healthy": base / "normal", "out": base}


def generated(places: dict[str, Path], out: Path, *more: object) -> Done:
    folders = ("--masks", places["masks"], "--healthy", places["healthy"])
    return run("generate", *SMALL, "--out", out, *folders, "--jitter", 0.1, *more)


def test_a_dataset_of_own_masks_is_proven_replayed_and_mended_and_workers_change_no_byte(
    places: dict[str, Path], tmp_path: Path
) -> None:
    out, folders = tmp_path / "set", ("--masks", places["masks"], "--healthy", places["healthy"])
    done = generated(places, out)
    assert done.returncode == 0, done.stderr
    assert "masks: 4 used (4 malignant)" in done.stderr
    assert "masks: 0 on the healthy image of their name, 4 on images drawn at random" in done.stderr
    assert "not used" not in done.stderr
    table = pl.read_parquet(out / "manifest.parquet")
    assert table["given_mask_sha256"].n_unique() == 4
    whole = hashes(out)

    command = shlex.split(done.stdout.split("check with: ")[1])
    assert sorted(command) == sorted(map(str, ("busigen", "verify", out, *folders)))
    proven = run(*command[1:])
    assert proven.returncode == 0, proven.stdout
    assert "moved, scaled or mirrored as recorded: 6; not proven: 0" in proven.stdout
    assert "outside the edit region, bit for bit: 6; not proven: 0" in proven.stdout

    told = run("explain", out, "000000004", *folders, "--json")
    assert told.returncode == 0, told.stderr
    described = json.loads(told.stdout)
    assert described["replay"]["image_agrees"] and described["replay"]["mask_agrees"]
    assert described["given_mask"]["folder"] == "own"
    assert described["given_mask"]["sha256"] == table["given_mask_sha256"][4]
    assert not any("mask-" in link["link"] for link in described["chain"])
    without = run("explain", out, "4", "--healthy", places["healthy"])
    assert without.returncode == 3
    assert "the dataset's masks are those of a folder named 'own', which is not given" in without.stderr

    flip(out / "shards/000001.tar")
    mended = run("verify", out, "--repair", *folders)
    assert mended.returncode == 0, mended.stderr
    assert hashes(out) == whole

    by_two = generated(places, tmp_path / "workers", "--workers", 2)
    assert by_two.returncode == 0
    assert by_two.stderr.count("4 on images drawn at random") == 1
    assert hashes(tmp_path / "workers") == whole


def test_what_becomes_of_the_masks_is_said(places: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(places["healthy"], tmp_path / "healthy")
    shutil.copytree(places["masks"], tmp_path / "own")
    # A healthy image whose name called it malignant would be left out.
    for path in (tmp_path / "own/malignant").iterdir():
        path.rename(path.with_name(path.name.replace("malignant", "case")))
    shutil.copy(places["healthy"] / "normal (2).png", tmp_path / "healthy/case (2).png")
    places = {**places, "masks": tmp_path / "own", "healthy": tmp_path / "healthy"}
    done = generated(places, tmp_path / "set", "--count", 4, "--shard-size", 4, "--normals", 0.5)
    assert "masks: 1 on the healthy image of their name, 3 on images drawn at random" in done.stderr
    assert "masks: 2 of 4 are not used; a larger --count uses more" in done.stderr


def test_what_is_missing_or_asked_for_twice_is_said_in_a_line(places: dict[str, Path], tmp_path: Path) -> None:
    assert "is no folder" in error_line(run("generate", *SMALL, "--out", tmp_path / "a", "--masks", tmp_path / "b"), 3)
    refused = run("generate", *SMALL, "--out", tmp_path / "a", "--masks", places["masks"], "--depth", 0.3)
    assert "--depth asks for outlines, and --masks" in error_line(refused, 2)
    assert "--jitter is 0.2, without masks" in error_line(
        run("generate", *SMALL, "--out", tmp_path / "a", "--jitter", 0.2), 2
    )
    assert not (tmp_path / "a").exists()
