"""Reading sets of every layout for an audit, and refusing what an archive from anywhere may hold."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.letterbox import letterbox
from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.errors import InputError, UsageError
from busigen.evaluation.reading.sets import background_mode, read_set
from busigen.evaluation.reading.within import Within
from busigen.runtime.dataset.format import DATASET_FILE
from busigen.runtime.execution.factory import generate
from tests.harness.noise_source import NoiseSource, noise_sample
from tests.harness.synthetic_datasets import draw_frame, draw_pairs


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def pair(seed: int = 0, size: tuple[int, int] = (300, 240)) -> tuple[bytes, bytes]:
    frame = draw_frame(np.random.default_rng(seed), size, "benign")
    return png(frame.pixels), png(frame.lesions[0])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished busigen dataset of seven samples in three shards; treat it as read-only."""
    out = tmp_path_factory.mktemp("dataset") / "set"
    generate(NoiseSource(), out, count=7, seed=7, shard_size=3)
    return out


def test_busi_with_all_its_quirks(synthetic_busi: Path) -> None:
    found = read_set(synthetic_busi)
    rows = {row["id"]: row for row in found.table.iter_rows(named=True)}
    assert found.layout == "BUSI"
    assert len(found) == 32
    assert found.table["class"].value_counts().sort("class").rows() == [("benign", 16), ("malignant", 8), ("normal", 8)]
    assert rows["busi/benign (1)"]["lesions"] == 2
    assert rows["busi/benign (7)"]["group"] == rows["busi/benign (2)"]["group"]
    assert rows["busi/benign (7)"]["calipers"]
    assert rows["busi/malignant (5)"]["text"]
    assert [name for name, row in rows.items() if row["colour"]] == ["busi/benign (6)", "busi/malignant (4)"]
    assert rows["busi/malignant (3)"]["mode"] == "RGBA"
    assert rows["busi/normal (2)"]["mask_files"] == 0
    assert background_mode(found) == "unknown"


def test_the_audit_names_what_prepare_names(synthetic_busi: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(synthetic_busi, tmp_path / "BUSI"))
    with Image.open(folder / "benign" / "benign (8).png") as image:
        turned = image.convert("L").transpose(Image.Transpose.ROTATE_180)
    exif = Image.Exif()
    exif[0x0112] = 3
    turned.save(folder / "benign" / "benign (8).png", exif=exif)
    with Image.open(folder / "benign" / "benign (9).png") as image:
        black = Image.new("L", image.size)
    black.save(folder / "benign" / "benign (9).png")
    shutil.copy(folder / "benign" / "benign (10).png", folder / "benign" / "benign (10)_mask.png")
    found = read_set(folder)
    report = prepare([folder], tmp_path / "out")
    assert sorted(found.refused, key=str) == sorted(report.refused, key=str)
    assert [refusal.file[-14:] for refusal in found.refused] == ["benign (9).png", "enign (10).png"]
    assert found.notes == report.notes
    assert found.notes[-1].startswith("1 turned upright")


def test_an_archive_is_read_upright_and_without_pictures_for_masks(tmp_path: Path) -> None:
    image, mask = pair()
    exif = Image.Exif()
    exif[0x0112] = 8
    members = {"a.png": image, "a.mask.png": mask, "b.png": image, "b.mask.png": image}
    for name in ("a.png", "a.mask.png"):
        buffer = io.BytesIO()
        Image.open(io.BytesIO(members[name])).transpose(Image.Transpose.ROTATE_270).save(buffer, "PNG", exif=exif)
        members[f"turned_{name}"] = buffer.getvalue()
    found = read_set(write_tar(tmp_path / "set.tar", members))
    assert found.table["id"].to_list() == ["a", "turned_a"]
    np.testing.assert_array_equal(found.images[0], found.images[1])
    np.testing.assert_array_equal(found.masks[0], found.masks[1])
    assert found.notes == ("1 turned upright, as its EXIF orientation says: set.tar/turned_a.png",)
    assert ["a picture" in refusal.problem for refusal in found.refused] == [True]


def test_the_working_frame_is_that_of_prepare(
    synthetic_busi: Path, synthetic_busbra: Path, synthetic_prepared: Prepared
) -> None:
    prepared = read_set(synthetic_prepared.folder)
    by_id = {name: row for row, name in enumerate(prepared.table["id"])}
    for folder in (synthetic_busi, synthetic_busbra):
        found = read_set(folder)
        for row, name in enumerate(found.table["id"]):
            if name not in by_id:  # Left out of every split.
                continue
            other = by_id[name]
            assert np.array_equal(found.images[row], prepared.images[other])
            assert np.array_equal(found.masks[row], prepared.masks[other])
            assert np.array_equal(found.valid[row], prepared.valid[other])
            assert np.array_equal(found.overlays[row], prepared.overlays[other])
            assert np.array_equal(found.clean[row], prepared.clean[other])
            assert found.table["sha256"][row] == prepared.table["sha256"][other]


def test_bus_bra_groups_are_patients(synthetic_busbra: Path) -> None:
    found = read_set(synthetic_busbra)
    patients = [name.split("_")[1].split("-")[0] for name in found.table["id"]]
    assert found.layout == "BUS-BRA"
    assert len(set(zip(patients, found.groups.tolist(), strict=True))) == len(set(patients)) == 8


def test_pairs_without_classes_are_read_as_unknown(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set", count=3, labels=True)
    (folder / "labels.csv").unlink()
    found = read_set(folder)
    assert found.classes.tolist() == ["unknown"] * 3
    assert found.masks.any(axis=(1, 2)).tolist() == [True, True, False]


def test_masks_that_prepare_refuses_are_there_to_be_judged(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set", count=3)
    for name, value in (("scan0", 0), ("scan1", 255)):
        Image.fromarray(np.full((280, 320), value, np.uint8)).save(folder / "masks" / f"{name}.png")
    found = read_set(folder)
    share = dict(zip(found.table["id"], found.masks.sum(axis=(1, 2)) / found.valid.sum(axis=(1, 2)), strict=True))
    assert share == {"set/benign/scan0": 0, "set/malignant/scan1": 1, "set/normal/scan2": 0}
    assert found.refused == ()


def test_damaged_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set", count=6)
    (folder / "images" / "benign" / "scan0.png").write_bytes(b"no image")
    Image.new("L", (50, 50)).save(folder / "masks" / "scan1.png")
    found = read_set(folder)
    assert len(found) == 4
    assert [refusal.file for refusal in found.refused] == [
        "set/images/benign/scan0.png",
        "set/images/malignant/scan1.png",
    ]
    assert "not a PNG" in found.refused[0].problem
    assert "50x50" in found.refused[1].problem


def test_a_busigen_dataset(dataset: Path) -> None:
    found = read_set(dataset)
    assert found.layout == "busigen dataset"
    assert found.table["id"].to_list() == [f"{index:09d}" for index in range(7)]
    for index in range(7):
        sample = noise_sample(7, index, attempt=int(index == 3))
        assert np.array_equal(found.images[index], sample.image)
        assert np.array_equal(found.masks[index], sample.mask)
        assert found.classes[index] == sample.label
    manifest = pl.read_parquet(dataset / "manifest.parquet")
    assert found.table["sha256"].to_list() == manifest["image_sha256"].to_list()
    assert found.refused == ()


def test_a_dataset_with_a_lost_shard_and_a_changed_image(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "set"))
    (copy / "shards" / "000000.tar").unlink()
    row = json.dumps({"key": "000000006", "class": "benign", "image_sha256": "0" * 64}).encode()
    image, mask = pair()
    members = {"000000006.image.png": image, "000000006.mask.png": mask, "000000006.json": row}
    write_tar(copy / "shards" / "000002.tar", members)
    found = read_set(copy)
    assert found.table["id"].to_list() == ["000000003", "000000004", "000000005"]
    problems = [refusal.problem for refusal in found.refused]
    assert problems == ["Its shards hold 4 of 7 samples.", "000000006: its image is not the one that its row names."]


def test_an_unfinished_dataset_is_read_and_said_to_be(dataset: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dataset, tmp_path / "set"))
    (copy / DATASET_FILE).unlink()
    found = read_set(copy)
    assert len(found) == 7
    assert "is not finished" in found.refused[0].problem


@pytest.mark.parametrize(
    ("rows", "mode"),
    [
        ([{"background": "synthetic", "healthy_sha256": None}] * 2, "synthetic"),
        ([{"background": "real", "healthy_sha256": "ab"}] * 2, "real"),
        ([{"background": "real", "healthy_sha256": "ab"}, {"background": "synthetic"}], "real"),
        ([{}, {}], "unknown"),
    ],
)
def test_shards_tell_their_backgrounds(tmp_path: Path, rows: list[dict], mode: str) -> None:
    members: dict[str, bytes] = {}
    for number, row in enumerate(rows):
        members[f"{number}.image.png"], members[f"{number}.mask.png"] = pair(number)
        members[f"{number}.json"] = json.dumps({"class": "malignant", **row}).encode()
    write_tar(tmp_path / "shard.tar", members)
    found = read_set(tmp_path)
    assert background_mode(found) == mode
    assert found.classes.tolist() == ["malignant"] * 2
    # Two images of one healthy breast are not independent of each other.
    assert (found.groups[0] == found.groups[1]) == (rows == [{"background": "real", "healthy_sha256": "ab"}] * 2)


def test_plain_shards(tmp_path: Path) -> None:
    image, mask = pair()
    other, other_mask = pair(1)
    alone, _ = pair(2)
    members = {
        "benign/a.png": image,
        "benign/a.mask.png": mask,
        "b.jpg": other,
        "b.seg.png": other_mask,
        "c.png": alone,
        "readme.txt": b"hello",
    }
    found = read_set(write_tar(tmp_path / "any.tar", members))
    assert found.layout == "WebDataset shards"
    assert found.table.select("id", "class", "mask_files").rows() == [
        ("benign/a", "benign", 1),
        ("b", "unknown", 1),
        ("c", "unknown", 0),
    ]
    assert found.refused == ()
    # 300 x 240 in a square of 256: bars of 26 pixels above, of 25 below.
    assert found.valid[0].sum() == 256 * 205


@pytest.mark.parametrize(
    ("image", "masks", "key"),
    [
        ("a.jpg", ["a.mask.jpg"], "a"),
        ("a.png", ["a.segmentation.png"], "a"),
        ("a_image.png", ["a_mask.png"], "a"),
        ("benign (1).png", ["benign (1)_mask.png", "benign (1)_mask_1.png"], "benign (1)"),
        ("bus_0001-l.png", ["mask_0001-l.png"], "0001-l"),
        ("images/x/a.png", ["masks/x/a.png"], "x/a"),
        ("case.0001.png", ["case.0001.mask.png"], "case.0001"),
        ("a.png", ["a_tumor.png"], "a"),
        ("A.PNG", ["A.Label.PNG"], "A"),
    ],
)
def test_masks_of_shards_go_by_any_usual_name(tmp_path: Path, image: str, masks: list[str], key: str) -> None:
    picture, mask = pair()
    write_tar(tmp_path / "a.tar", {image: picture, **dict.fromkeys(masks, mask)})
    found = read_set(tmp_path)
    assert found.table.select("id", "mask_files").rows() == [(key, len(masks))]
    assert found.masks.any()
    assert (found.refused, found.notes) == ((), ())


def test_two_masks_of_a_sample_are_joined(tmp_path: Path) -> None:
    picture, _ = pair()
    halves = []
    for rows in (slice(60, 90), slice(120, 150)):
        half = np.zeros((240, 300), np.uint8)
        half[rows, 100:200] = 255
        halves.append(png(half))
    write_tar(tmp_path / "a.tar", {"a.png": picture, "a.mask.0.png": halves[0], "a.mask.1.png": halves[1]})
    found = read_set(tmp_path)
    assert found.table.select("mask_files", "lesions").rows() == [(2, 2)]


def test_members_of_unknown_role_are_no_images_and_are_named(tmp_path: Path) -> None:
    members = {}
    for number in range(3):
        members[f"{number}.png"], members[f"{number}.left.png"] = pair(number)
        members[f"{number}.txt"] = b"a caption"
        members[f"._{number}.png"] = members[f"._{number}.mask.png"] = b"of a Mac"
    found = read_set(write_tar(tmp_path / "a.tar", members))
    assert found.table["id"].to_list() == ["0", "1", "2"]
    (note,) = found.notes
    assert "12 members of shards are passed over" in note
    assert "*.left.png: 3, such as 0.left.png" in note and "*.txt: 3" in note and "hidden files: 6" in note
    assert found.refused == ()


def test_nothing_but_members_of_unknown_role_says_so(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\*\.mask\.npy: 1, such as 0\.mask\.npy"):
        read_set(write_tar(tmp_path / "a.tar", {"0.mask.npy": b"x"}))


@pytest.mark.parametrize(
    ("described", "label", "said"),
    [
        (b"malignant\n", "malignant", ""),
        (b"1", "benign", "0 normal, 1 benign, 2 malignant"),
        (b"7", "unknown", "name no known class, most of them '7'"),
        (b"\xff", "unknown", "name no known class"),
    ],
)
def test_cls_gives_the_class(tmp_path: Path, described: bytes, label: str, said: str) -> None:
    picture, mask = pair()
    found = read_set(write_tar(tmp_path / "a.tar", {"a.png": picture, "a.mask.png": mask, "a.cls": described}))
    assert found.classes.tolist() == [label]
    assert said in "".join(found.notes) if said else found.notes == ()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("size", [(256, 190), (190, 256)])
def test_where_tissue_ends_at_a_bar_that_a_file_brought_along_nothing_is_painted_over(
    tmp_path: Path, size: tuple[int, int], seed: int
) -> None:
    frame = draw_frame(np.random.default_rng(seed), size, "benign")
    for name, fit in (("bare", np.array), ("barred", lambda pixels: letterbox(pixels)[0])):
        for kind, pixels in (("images", frame.pixels.clip(20)), ("masks", np.uint8(255) * frame.lesions[0])):
            (tmp_path / name / kind).mkdir(parents=True)
            Image.fromarray(fit(pixels)).save(tmp_path / name / kind / "benign_1.png")
    bare, barred = (read_set(tmp_path / name) for name in ("bare", "barred"))
    assert barred.clean is not None and bare.clean is not None
    for before, after in zip(
        (bare.images, bare.valid, bare.overlays, bare.clean),
        (barred.images, barred.valid, barred.overlays, barred.clean),
        strict=True,
    ):
        np.testing.assert_array_equal(after, before)


def test_bars_that_a_square_file_brought_along_are_no_image(tmp_path: Path) -> None:
    frame = draw_frame(np.random.default_rng(3), (256, 200), "benign")
    boxed, mask = np.zeros((256, 256), np.uint8), np.zeros((256, 256), bool)
    boxed[28:228] = frame.pixels.clip(20)
    mask[28:228] = frame.lesions[0]
    found = read_set(write_tar(tmp_path / "a.tar", {"a.png": png(boxed), "a.mask.png": png(mask)}))
    assert np.flatnonzero(found.valid[0].all(axis=1)).tolist() == list(range(28, 228))
    assert np.array_equal(found.images[0], boxed)


def test_a_limit_draws_the_same_images_again(synthetic_busi: Path) -> None:
    first, second, other = (read_set(synthetic_busi, limit=10, seed=seed).table["id"].to_list() for seed in (1, 1, 2))
    assert first == second
    assert len(first) == len(set(first)) == 10
    assert first != other


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "other"])
def test_what_is_no_set_is_refused_with_the_layouts_that_are(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "set"
    if kind == "file":
        path.write_text("x")
    elif kind != "missing":
        path.mkdir()
        if kind == "other":
            (path / "thesis.docx").write_text("x")
    with pytest.raises(InputError) as caught:
        read_set(path)
    assert str(path) in caught.value.problem
    if kind in ("empty", "other"):
        assert "images/ and masks/" in caught.value.fix
        assert ".tar" in caught.value.fix


@pytest.mark.parametrize(("there", "lacking"), [("images", "masks"), ("masks", "images")])
def test_half_of_a_folder_of_pairs_is_told_what_it_lacks(tmp_path: Path, there: str, lacking: str) -> None:
    folder = draw_pairs(tmp_path / "set", count=3)
    shutil.rmtree(folder / lacking)
    with pytest.raises(InputError, match=rf"set has none of the layouts that are read: it lacks {lacking}/;"):
        read_set(folder)


def test_images_within_a_column_are_read_from_prepared_folders_and_rows(
    synthetic_prepared: Prepared, tmp_path: Path
) -> None:
    whole = read_set(synthetic_prepared.folder)
    busi = read_set(synthetic_prepared.folder, within=Within.parse("source=busi"))
    assert 0 < len(busi) < len(whole) and all(name.startswith("busi/") for name in busi.table["id"])
    members = {}
    for key, scanner in enumerate(("A 7", "B", "A 7")):
        members |= dict(zip((f"{key}.image.png", f"{key}.mask.png"), pair(key), strict=True))
        members[f"{key}.json"] = json.dumps({"class": "benign", "scanner": scanner}).encode()
    shards = write_tar(tmp_path / "a.tar", members)
    assert read_set(shards, within=Within.parse("scanner = A 7")).table["id"].to_list() == ["0", "2"]
    with pytest.raises(InputError, match=r"no image of .* has that value") as caught:
        read_set(shards, within=Within.parse("scanner=C"))
    assert "A 7 (2), B (1)" in caught.value.fix


def test_columns_that_are_asked_for_are_read_besides(synthetic_prepared: Prepared, tmp_path: Path) -> None:
    folder, told = synthetic_prepared.folder, ("scanner", "source")
    found, known = read_set(folder, also=told).table, synthetic_prepared.table
    assert found.select("id", *told).rows() == known.filter(pl.col("split") != "excluded").select("id", *told).rows()
    members = dict(zip(("0.image.png", "0.mask.png"), pair(), strict=True))
    members |= dict(zip(("1.image.png", "1.mask.png"), pair(1), strict=True))
    members["0.json"] = json.dumps({"class": "benign", "scanner": "A 7", "source": 3}).encode()
    rows = read_set(write_tar(tmp_path / "a.tar", members), also=told).table
    # What is no text is nobody's name.
    assert rows.select("id", *told).rows() == [("0", "A 7", None), ("1", None, None)]
    assert set(rows.columns) == {*read_set(tmp_path / "a.tar").table.columns, *told}


def test_a_set_without_the_column_is_read_whole_and_says_so_unless_it_has_to_have_it(synthetic_busi: Path) -> None:
    found = read_set(synthetic_busi, within=Within("scanner", "A"))
    assert len(found) == 32
    assert any("no column 'scanner'" in note for note in found.notes)
    with pytest.raises(InputError, match="has no column of that name"):
        read_set(synthetic_busi, within=Within("scanner", "A", required=True))


@pytest.mark.parametrize("text", ["source", "=busi", "source= "])
def test_a_condition_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--within is"):
        Within.parse(text)
