"""Several lesions an image in a dataset: proven, told, mended, merged, continued and described."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.api.pairs import Dataset
from busigen.errors import IntegrityError
from busigen.runtime.dataset.format import command_line
from busigen.runtime.dataset.reader import find_members
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.replay import recorded_conditions
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.viewing.pairs import Pairs, picture
from tests.harness.hashing import hashes
from tests.harness.replaying import flip, reseal
from tests.harness.several_lesions import MIX, QuickInputs, healthy_images, source, written

MASKS = ("mask_1.png", "mask_2.png", "mask_3.png")


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return healthy_images(tmp_path_factory.mktemp("several") / "healthy")


@pytest.fixture(scope="module")
def real(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("several") / "real", healthy)


def members(tar: Path) -> dict[str, bytes]:
    with tarfile.open(tar) as shard:
        return {one.name: shard.extractfile(one).read() for one in shard.getmembers()}  # type: ignore[union-attr]


def tampered(out: Path, edit: Callable[[dict[str, bytes], str], None]) -> None:
    """Edit the members of the first sample that has two lesions at least, so that all hashes fit."""
    files, table = members(out / "shards/000000.tar"), out / "shards/000000.parquet"
    rows = [json.loads(data) for name, data in files.items() if name.endswith(".json")]
    key = next(row["key"] for row in rows if (row["lesions"] or 0) > 1)
    edit(files, key)
    row = json.loads(files[f"{key}.json"])
    for kind in ("mask", "mask_1", "mask_2", "mask_3"):
        row[f"{kind}_sha256"] = hashlib.sha256(files[f"{key}.{kind}.png"]).hexdigest()
    files[f"{key}.json"] = json.dumps(row).encode()
    with tarfile.open(out / "shards/000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    rows = [json.loads(data) for name, data in files.items() if name.endswith(".json")]
    pl.DataFrame(rows, schema=pl.read_parquet_schema(table)).write_parquet(table)
    reseal(out, 0)


def test_every_background_is_proven_outside_of_all_edit_regions(real: Path, healthy: Path) -> None:
    report = verify(real, healthy=healthy)
    assert report.ok, report.problems
    assert (report.backgrounds_proven, report.normals, report.several) == (10, 2, 4)
    assert any("with more than one lesion: 4" in line for line in report.lines(proving=True))


def test_a_shard_has_the_same_files_of_each_sample_and_pairs_their_lesions(real: Path) -> None:
    names = list(members(real / "shards/000000.tar"))
    assert names == [
        f"{index:09}.{suffix}" for index in range(5) for suffix in ("image.png", "mask.png", *MASKS, "json")
    ]
    found = {len(pair.masks) for pair in Dataset(real)}
    assert found == {0, 1, 2, 3}
    for pair in Dataset(real):
        assert len(pair.masks) == pair.row["lesions"]
        assert np.array_equal(np.any([pair.mask & False, *pair.masks], axis=0), pair.mask)


def test_what_was_changed_between_lesions_is_found(real: Path, healthy: Path, tmp_path: Path) -> None:
    def swap(files: dict[str, bytes], key: str) -> None:
        first, second = f"{key}.mask_1.png", f"{key}.mask_2.png"
        files[first], files[second] = files[second], files[first]

    def drop(files: dict[str, bytes], key: str) -> None:
        empty = io.BytesIO()
        Image.fromarray(np.zeros((256, 256), np.bool_)).save(empty, "PNG")
        files[f"{key}.mask_2.png"] = empty.getvalue()

    for number, (edit, problem) in enumerate(((swap, "its mask_1 has another area"), (drop, "another number of les"))):
        out = written(tmp_path / f"set{number}", healthy)
        tampered(out, edit)
        assert any(problem in one.problem for one in verify(out).problems), verify(out).problems


def test_a_lesion_that_its_mask_hides_is_named_as_a_changed_background(healthy: Path, tmp_path: Path) -> None:
    """Without its mask, a painted lesion is pixels that differ from the healthy image for no reason."""
    out = written(tmp_path / "set", healthy)

    def hide(files: dict[str, bytes], key: str) -> None:
        row = json.loads(files[f"{key}.json"])
        empty = io.BytesIO()
        Image.fromarray(np.zeros((256, 256), np.bool_)).save(empty, "PNG")
        for number in range(2, 4):
            files[f"{key}.mask_{number}.png"] = empty.getvalue()
            row |= {name: None for name in row if name.startswith(f"lesion_{number}_")}
        files[f"{key}.mask.png"] = files[f"{key}.mask_1.png"]
        row |= {f"box_{side}": row[f"lesion_1_box_{side}"] for side in ("left", "top", "right", "bottom")}
        row |= {"lesions": 1, "lesion_pixels": row["lesion_1_pixels"]}
        files[f"{key}.json"] = json.dumps(row).encode()

    tampered(out, hide)
    report = verify(out, healthy=healthy)
    assert any("pixels outside its edit region differ" in one.problem for one in report.problems)


@pytest.mark.parametrize("kind", ["real", "synthetic"])
def test_explain_tells_each_lesion_and_draws_them_again(kind: str, real: Path, healthy: Path, tmp_path: Path) -> None:
    folder = healthy if kind == "real" else None
    out = real if folder else written(tmp_path / "set")
    pair = next(pair for pair in Dataset(out) if len(pair.masks) > 1)
    told = explain(out, pair.key, inputs=QuickInputs(healthy=folder), out=tmp_path / "again")
    assert told.error is None, told.replay
    assert told.history["asked"]["lesions"] == MIX
    links = {link["link"]: link["sha256"] for link in told.history["chain"]}
    assert links["mask 2"] == pair.row["mask_2_sha256"]
    assert told.replay is not None
    lines = list(told.lines())
    agreed = [f"mask {number}" for number in (1, 2, 3)]
    for name in ("the image", "the mask", *agreed):
        kind = name.removeprefix("the ").replace(" ", "_")
        assert f"  replay: {name}'s bytes agree ({pair.row[f'{kind}_sha256']})" in lines
    said = [line for line in lines if line.startswith("  lesion ")]
    assert len(said) == len(pair.masks)
    for line, mask in zip(said, pair.masks, strict=True):
        assert f"pixels {mask.sum()}," in line and f"box_top {np.flatnonzero(mask.any(axis=1))[0]}," in line
    shards = members(out / f"shards/{int(pair.key) // 5:06}.tar")
    for suffix in ("image.png", "mask.png", *MASKS, "json"):
        assert (tmp_path / f"again/{pair.key}.{suffix}").read_bytes() == shards[f"{pair.key}.{suffix}"]


def test_explain_names_the_lesion_whose_mask_was_changed(healthy: Path, tmp_path: Path) -> None:
    out, keys = written(tmp_path / "set", healthy), []

    def drop(files: dict[str, bytes], key: str) -> None:
        keys.append(key)
        files[f"{key}.mask_2.png"] = files[f"{key}.mask_1.png"]

    tampered(out, drop)
    told = explain(out, keys[0], inputs=QuickInputs(healthy=healthy))
    assert "does not replay: the bytes of mask 2 differ" in str(told.error)
    assert any(line.startswith("  replay: mask 2's bytes DIFFER") for line in told.lines())
    assert any(line.startswith("  replay: mask 1's bytes agree") for line in told.lines())


def test_repair_draws_them_again(healthy: Path, tmp_path: Path) -> None:
    out = written(tmp_path / "set", healthy)
    before = hashes(out)
    flip(out / "shards/000001.tar")
    (out / "shards/000000.parquet").unlink()
    assert repair(out, inputs=QuickInputs(healthy=healthy)).after.ok
    assert hashes(out) == before


def test_merged_datasets_keep_them(real: Path, healthy: Path, tmp_path: Path) -> None:
    merge(tmp_path / "all", [real, written(tmp_path / "other", healthy, seed=2)])
    report = verify(tmp_path / "all", healthy=healthy)
    assert report.ok, report.problems
    assert report.several == 8
    assert sum(len(pair.masks) > 1 for pair in Dataset(tmp_path / "all")) == 8


def test_a_run_that_was_cut_short_is_continued_to_the_same_bytes(real: Path, healthy: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    written(out, healthy)
    for name in ("dataset.json", "manifest.parquet", "shards/000001.json"):
        (out / name).unlink()
    written(out, healthy)
    assert hashes(out) == hashes(real)


def test_another_number_of_lesions_is_another_run(real: Path, healthy: Path) -> None:
    with pytest.raises(Exception, match="--lesions") as caught:
        generate(source("2", healthy, normals=0.2), real, count=10, seed=1, shard_size=5)
    assert f"{MIX} -> 2" in str(caught.value)


def test_card_record_and_command_say_what_was_dealt(real: Path) -> None:
    card = (real / "README.md").read_text()
    assert f"--lesions {MIX}" in card and "mask_1.png` to `<key>.mask_3.png" in card
    assert "1 with weight 0.5, 2 with weight 0.25" in card
    info = json.loads((real / "dataset.json").read_text())
    assert recorded_conditions(info)["lesions"] == {"1": 0.5, "2": 0.25, "3": 0.25}
    assert f"--lesions {MIX}" in command_line(info)


def test_runs_without_it_say_nothing_of_it(tmp_path: Path) -> None:
    out = written(tmp_path / "set", lesions={})
    run = json.loads((out / "run.json").read_text())
    assert "lesions" not in run["fingerprint"] and not [name for name in run["columns"] if "lesion" in name]
    assert "mask_1" not in (out / "README.md").read_text() + (out / "croissant.json").read_text()
    assert list(members(out / "shards/000000.tar"))[:3] == [
        "000000000.image.png",
        "000000000.mask.png",
        "000000000.json",
    ]


def test_view_outlines_all_of_them(real: Path) -> None:
    pairs = Pairs(real)
    for row in range(len(pairs)):
        svg = picture(pairs.member(row), "outline").decode()
        # Each closed outline begins with an M, and is drawn twice.
        assert svg.count("M") == 2 * pairs.row(row)["lesions"]
        assert pairs.problems(row, pairs.member(row)) == []


def test_a_shard_some_of_whose_samples_lack_masks_is_refused(healthy: Path, tmp_path: Path) -> None:
    out = written(tmp_path / "set", healthy)
    files = members(out / "shards/000000.tar")
    del files["000000002.mask_2.png"]
    with tarfile.open(out / "shards/000000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with pytest.raises(IntegrityError, match=r"only some of its samples have a mask_2\.png"):
        find_members(out / "shards/000000.tar", range(5))
    reseal(out, 0)
    assert any("mask_1 and mask_3 beside image and mask" in one.problem for one in verify(out).problems)
