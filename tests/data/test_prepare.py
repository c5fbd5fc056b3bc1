"""One command makes a table and arrays of real folders, whatever lies in them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image
from scipy import ndimage

from busigen.data.prepare import prepare
from busigen.data.prepared import COLUMNS, Prepared, split_hash
from busigen.errors import InputError, OutputError
from busigen.files import sha256_of
from tests.conftest import Sources
from tests.harness.synthetic_datasets import draw_pairs


@pytest.fixture
def busi(synthetic_busi: Path, tmp_path: Path) -> Path:
    """A copy of the drawn set, to be damaged."""
    return Path(shutil.copytree(synthetic_busi, tmp_path / "BUSI"))


def test_every_image_of_both_sets_is_prepared(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    table = prepared.table
    assert prepared.info["refused"] == []
    assert dict(table.schema) == COLUMNS
    assert table["row"].to_list() == list(range(table.height))
    assert table["id"].n_unique() == table.height
    files = [*table["image_file"], *table.explode("mask_files")["mask_files"].drop_nulls()]
    roots = {any_sources.busi.name: any_sources.busi.parent, any_sources.busbra.name: any_sources.busbra.parent}
    assert all((roots[file.split("/")[0]] / file).is_file() for file in files)


def test_lesions_are_where_their_masks_say(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    for row in prepared.table.iter_rows(named=True):
        mask = prepared.masks[row["row"]]
        assert sorted(set(np.unique(mask)) - {0}) == list(range(1, row["lesions"] + 1))
        assert (row["lesions"] == 0) == (row["class"] == "normal")
        assert (row["mask_area"] > 0) == (row["lesions"] > 0)
    assert prepared.table["lesions"].max() == 2


def test_lesions_are_darker_than_what_surrounds_them(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    darker = []
    for image, mask in zip(prepared.images, prepared.masks, strict=True):
        if mask.any():
            ring = ndimage.binary_dilation(mask > 0, iterations=6) & (mask == 0)
            darker.append(image[mask > 0].mean() < image[ring].mean())
    # Breast lesions are hypoechoic with few exceptions; a mask that is shifted or inverted would not show it.
    assert np.mean(darker) > 0.85


def test_the_same_input_gives_the_same_bytes(synthetic_busi: Path, tmp_path: Path) -> None:
    reports = [prepare([synthetic_busi], tmp_path / name) for name in "ab"]
    assert reports[0].split_hash == reports[1].split_hash
    for file in (
        "table.parquet",
        "images.npy",
        "masks.npy",
        "overlays.npy",
        "clean.npy",
        "suspects.npy",
        "prepared.json",
    ):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert str(tmp_path) not in (tmp_path / "a" / "prepared.json").read_text()
    assert prepare([synthetic_busi], tmp_path / "c", seed=1).split_hash != reports[0].split_hash


def _empty(path: Path) -> None:
    with Image.open(path) as mask:
        size = mask.size
    Image.new("L", size).save(path)


def _fill(path: Path) -> None:
    with Image.open(path) as mask:
        size = mask.size
    Image.new("L", size, 255).save(path)


def _change(path: Path, how: Callable[[np.ndarray], np.ndarray]) -> None:
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("L"))
    Image.fromarray(how(pixels)).save(path)


def _outline(mask: np.ndarray) -> np.ndarray:
    return mask - 255 * ndimage.binary_erosion(mask, iterations=2).astype(np.uint8)


def _open_outline(mask: np.ndarray) -> np.ndarray:
    line = _outline(mask)
    line[:, np.flatnonzero(mask.any(axis=0))[:12]] = 0
    return line


def _inverted(mask: np.ndarray) -> np.ndarray:
    # A lesion of a fifth of the image: its inverse is far below what no lesion reaches.
    y, x = np.mgrid[: mask.shape[0], : mask.shape[1]]
    large = np.hypot((y / mask.shape[0] - 0.5) / 0.25, (x / mask.shape[1] - 0.5) / 0.25) < 1
    return np.where(large, 0, 255).astype(np.uint8)


def _blob(grey: np.ndarray) -> np.ndarray:
    return 255 - _inverted(grey)


def _as_mask(path: Path) -> None:
    shutil.copy(path.with_name(path.name.replace("_mask", "")), path)


DAMAGES = {
    "truncated image": ("benign (8).png", lambda path: path.write_bytes(path.read_bytes()[:2000]), "damaged"),
    "text named .png": ("benign (8).png", lambda path: path.write_text("report"), "not a PNG"),
    "empty file": ("benign (8).png", lambda path: path.write_bytes(b""), "0 bytes"),
    "icon": ("benign (8).png", lambda path: Image.new("L", (16, 16)).save(path), "at least 32"),
    "missing mask": ("benign (8)_mask.png", lambda path: path.unlink(), "no mask"),
    "truncated mask": ("benign (8)_mask.png", lambda path: path.write_bytes(path.read_bytes()[:60]), "damaged"),
    "empty mask": ("benign (8)_mask.png", _empty, "empty"),
    "inverted mask": ("benign (8)_mask.png", _fill, "100%"),
    "inverted mask of a large lesion": ("benign (8)_mask.png", lambda path: _change(path, _inverted), "inverted"),
    "outline": ("benign (8)_mask.png", lambda path: _change(path, _outline), "an outline alone"),
    "open outline": ("benign (8)_mask.png", lambda path: _change(path, _open_outline), "an outline alone"),
    "the image as its mask": ("benign (8)_mask.png", _as_mask, "a picture"),
    "black image": ("benign (8).png", lambda path: _change(path, lambda grey: grey * 0), "too dark"),
    "image divided by 255": ("benign (8).png", lambda path: _change(path, lambda grey: grey // 128), "levels 0 to 1"),
    "flat image": ("benign (8).png", lambda path: _change(path, lambda grey: grey * 0 + 90), "flat"),
    "mask as its image": (
        "benign (8).png",
        lambda path: _change(path, _blob),
        "of two grey levels",
    ),
    "mask of another size": ("benign (8)_mask.png", lambda path: Image.new("L", (99, 77)).save(path), "99x77"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_named_and_the_rest_prepared(busi: Path, tmp_path: Path, damage: str) -> None:
    name, spoil, says = DAMAGES[damage]
    spoil(busi / "benign" / name)
    report = prepare([busi], tmp_path / "out")
    assert report.images == 31
    assert [refusal.file for refusal in report.refused] == ["BUSI/benign/benign (8).png"]
    assert says in report.refused[0].problem
    assert report.refused[0].fix
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["refused"] == [report.refused[0].to_dict()]
    with pytest.raises(InputError, match=r"benign \(8\)\.png"):
        prepare([busi], tmp_path / "strict", strict=True)


def test_what_is_read_otherwise_than_stored_is_counted_and_named(busi: Path, tmp_path: Path) -> None:
    for number in (8, 9):
        path = busi / "benign" / f"benign ({number}).png"
        with Image.open(path) as image:
            exif = Image.Exif()
            exif[0x0112] = 3
            turned = image.convert("L").transpose(Image.Transpose.ROTATE_180)
        turned.save(path, exif=exif)
    report = prepare([busi], tmp_path / "out")
    joined, note = report.notes
    assert joined == "1 with several masks, which are joined: BUSI/benign/benign (1).png"
    assert note.startswith("2 turned upright")
    assert note.endswith("BUSI/benign/benign (8).png, BUSI/benign/benign (9).png")
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["notes"] == [joined, note]
    prepared = Prepared.open(tmp_path / "out")
    row = prepared.table.filter(pl.col("id") == "busi/benign (8)")["row"].item()
    lesion, image = prepared.masks[row] > 0, prepared.images[row]
    around = ndimage.binary_dilation(lesion, iterations=8) & ~lesion
    assert image[lesion].mean() < image[around].mean(), "the mask was drawn on the upright image"


def test_levels_that_a_person_names_are_the_lesion(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "clinic")
    lesions = {}
    for path in (folder / "masks").iterdir():
        with Image.open(path) as image:
            mask = np.asarray(image) > 0
        tissue = ndimage.binary_dilation(mask, iterations=20)
        Image.fromarray(tissue.astype(np.uint8) + mask).save(path)
        lesions[f"clinic/{('benign', 'malignant')[int(path.stem[4:]) % 3]}/{path.stem}"] = mask.mean()
    refused = prepare([folder], tmp_path / "out").refused
    assert len(refused) == 4
    assert all("several structures, with the levels 1 (" in refusal.problem for refusal in refused)
    assert all("--mask-values" in refusal.fix for refusal in refused)
    table = prepare([folder], tmp_path / "named", mask_values=[2]).out / "table.parquet"
    found = dict(pl.read_parquet(table).filter(pl.col("lesions") > 0).select("id", "mask_area").iter_rows())
    assert found == pytest.approx(lesions)


def test_categories_that_are_not_learnt_are_counted(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "clinic", labels=True)
    lines = (folder / "labels.csv").read_text().splitlines()
    for row, category in enumerate(("4a", "4.0", "BI-RADS 5", "0", "0", "not done"), start=1):
        lines[row] = lines[row].rpartition(",")[0] + f",{category}"
    (folder / "labels.csv").write_text("\n".join([*lines, "gone.png,benign,p9,3"]))
    report = prepare([folder], tmp_path / "out")
    assert Prepared.open(tmp_path / "out").table["birads"].to_list() == ["4", "4", "5", "0", "0", "not done"]
    assert report.notes == (
        "1 rows of labels.csv have no image: gone.png",
        "3 with a BI-RADS category that is not learnt, which are 2, 3, 4, 5: '0' (2), 'not done' (1)",
    )


def test_copies_of_a_test_image_are_not_trained_on(synthetic_busi: Path, tmp_path: Path) -> None:
    """As augmented downloads hold them: mirrored, turned, cropped."""
    folder = tmp_path / "augmented"
    for name in ("images", "masks"):
        (folder / name / "benign").mkdir(parents=True)
    for number in range(2, 17):
        for kind, ending in (("images", ""), ("masks", "_mask")):
            with Image.open(synthetic_busi / "benign" / f"benign ({number}){ending}.png") as image:
                whole = image.convert("RGBA").getchannel("A") if (kind, number) == ("masks", 5) else image.convert("L")
            width, height = whole.size
            edge = round(0.06 * width), round(0.06 * height)
            copies = {
                "original": whole,
                "mirrored": whole.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
                "upside-down": whole.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
                "turned": whole.rotate(10),
                "cropped": whole.crop((*edge, width - edge[0], height - edge[1])),
            }
            for name, copy in copies.items():
                copy.save(folder / kind / "benign" / f"{number}_{name}.png")
    report = prepare([folder], tmp_path / "out")
    table = Prepared.open(tmp_path / "out").table.with_columns(pl.col("id").str.extract(r"(\d+)_").alias("original"))
    assert not report.refused
    assert len(report.by_split) > 1
    assert table.group_by("original").agg(pl.col("group").n_unique())["group"].to_list() == [1] * 15
    # Benign 7 is benign 2 again; all others are images of their own.
    assert table["group"].n_unique() == 14


def test_a_normal_image_with_a_lesion_is_refused(busi: Path, tmp_path: Path) -> None:
    with Image.open(busi / "normal" / "normal (1).png") as image:
        mask = Image.new("1", image.size)
    mask.paste(1, (50, 50, 120, 110))
    mask.save(busi / "normal" / "normal (1)_mask.png")
    assert "marks a lesion" in prepare([busi], tmp_path / "out").refused[0].problem


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    place = tmp_path / "BUSI" / "benign"
    place.mkdir(parents=True)
    (place / "benign (1).png").write_text("no image")
    with pytest.raises(InputError, match=r"No usable image.*benign \(1\)\.png"):
        prepare([tmp_path / "BUSI"], tmp_path / "out")
    (place / "benign (2).png").write_text("no image")
    with pytest.raises(InputError, match=r"Refused as well: BUSI/benign/benign \(2\)\.png\."):
        prepare([tmp_path / "BUSI"], tmp_path / "out")
    with pytest.raises(InputError, match="No source"):
        prepare([], tmp_path / "out")


def test_a_source_given_twice_is_an_error(synthetic_busi: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        prepare([synthetic_busi, synthetic_busi.parent], tmp_path / "out")
    again = Path(shutil.copytree(synthetic_busi, tmp_path / "other"))
    with pytest.raises(InputError, match="Two sources name"):
        prepare([synthetic_busi, again], tmp_path / "out")


def test_an_output_that_is_something_else_is_left_alone(synthetic_busi: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "work" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("chapter 1")
    for out in (thesis.parent, thesis):
        with pytest.raises(OutputError):
            prepare([synthetic_busi], out)
    assert [path.name for path in thesis.parent.iterdir()] == ["thesis.tex"]


def test_arrays_of_somebody_else_are_left_alone(synthetic_busi: Path, tmp_path: Path) -> None:
    for name in ("images.npy", "masks.npy", "table.parquet"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(OutputError, match="holds no prepared data"):
        prepare([synthetic_busi], tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images.npy.partial").symlink_to(tmp_path / "images.npy")
    with pytest.raises(OutputError, match=r"images\.npy\.partial is a link"):
        prepare([synthetic_busi], tmp_path / "out")
    assert (tmp_path / "images.npy").read_text() == "mine"


def test_the_rest_of_a_killed_run_is_replaced(synthetic_busi: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "images.npy.partial").write_bytes(b"half")
    (tmp_path / "out" / "masks.npy").write_bytes(b"half")
    prepare([synthetic_busi], tmp_path / "out")
    assert len(Prepared.open(tmp_path / "out", check=True)) == 32
    assert not list((tmp_path / "out").glob("*.partial"))


def test_adding_images_moves_nobody(busi: Path, synthetic_busi: Path, tmp_path: Path) -> None:
    for number in range(2, 17, 3):
        for path in (busi / "benign").glob(f"benign ({number})*"):
            path.unlink()
    (busi / "malignant" / "malignant (1).png").unlink()
    (busi / "malignant" / "malignant (1)_mask.png").unlink()
    first = prepare([busi], tmp_path / "out")
    before = dict(Prepared.open(tmp_path / "out").table.select("id", "split").iter_rows())
    second = prepare([synthetic_busi], tmp_path / "out")
    table = Prepared.open(tmp_path / "out", check=True).table
    after = dict(table.select("id", "split").iter_rows())
    assert first.images < second.images == 32
    assert second.kept_splits == first.images + 1, "malignant 1 is benign 3 byte for byte, so it is known too"
    assert all(after[name] == split for name, split in before.items())
    assert table.filter(pl.col("split") != "excluded").group_by("group").n_unique()["split"].max() == 1


def test_an_image_that_turns_out_to_be_a_copy_of_another_splits_is_excluded_and_named(tmp_path: Path) -> None:
    """As a folder that was prepared before copies were looked for holds them."""
    folder = draw_pairs(tmp_path / "clinic", count=12)
    out = prepare([folder], tmp_path / "out").out
    splits = dict(Prepared.open(out).table.select("id", "split").iter_rows())
    test, train = (next(name for name, split in splits.items() if split == kind) for kind in ("test", "train"))
    image = folder / "images" / f"{train.partition('/')[2]}.png"
    with Image.open(folder / "images" / f"{test.partition('/')[2]}.png") as original:
        mirrored = original.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    mirrored.save(image)
    _claim_split(out, image, train)
    report = prepare([folder], out)
    assert report.by_split["excluded"] == 1
    assert report.notes == (f"1 of the earlier run left out of every split, for they link two: {train}",)


def _claim_split(out: Path, image: Path, name: str) -> None:
    """Let a prepared folder say that this file is the image of that name."""
    table = pl.read_parquet(out / "table.parquet")
    digest = pl.lit(sha256_of(image))
    table = table.with_columns(sha256=pl.when(pl.col("id") == name).then(digest).otherwise("sha256"))
    table.write_parquet(out / "table.parquet")
    info = json.loads((out / "prepared.json").read_text())
    info["split_hash"] = split_hash(table["sha256"], table["split"])
    info["files"]["table.parquet"] = sha256_of(out / "table.parquet")
    (out / "prepared.json").write_text(json.dumps(info))


def test_file_names_that_are_no_text_do_no_harm(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "clinic")
    scan = folder / "images" / "normal" / "scan2.png"
    try:
        shutil.copy(scan, os.fsdecode(os.fsencode(scan).replace(b"scan2", b"M\xfcller")))
        shutil.copy(scan, os.fsdecode(os.fsencode(folder / "images") + b"/M\xfcller 2.png"))
    except OSError:
        return  # This file system takes only text.
    report = prepare([folder], tmp_path / "out")
    assert report.images == 7
    assert [refusal.file for refusal in report.refused] == ["clinic/images/M\\udcfcller 2.png"]
    assert "clinic/normal/M\\udcfcller" in Prepared.open(tmp_path / "out").table["id"]


def test_another_seed_over_the_same_folder_is_refused(synthetic_busi: Path, tmp_path: Path) -> None:
    prepare([synthetic_busi], tmp_path / "out")
    with pytest.raises(OutputError, match="seed 0, not 7"):
        prepare([synthetic_busi], tmp_path / "out", seed=7)


def test_progress_counts_every_image_and_pairs_join_in(synthetic_busi: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    sources = [synthetic_busi, draw_pairs(tmp_path / "clinic", labels=True)]
    report = prepare(sources, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(done, 38) for done in range(1, 39)]
    assert report.by_source == {"busi": 32, "clinic": 6}
    assert sum(report.by_split.values()) == sum(report.by_class.values()) == report.images == 38
