"""A user's folder of healthy images: what counts as one, what is left out, and that nothing changes behind a run."""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.errors import InputError, IntegrityError
from busigen.runtime.execution.factory import generate
from busigen.runtime.sampling.inputs import healthy_images as healthy_module
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder, synthetic
from tests.harness.hashing import hash_of
from tests.harness.noise_source import NoiseSource
from tests.harness.synthetic_datasets import draw_frame


@pytest.fixture
def normal(synthetic_busi: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synthetic_busi / "normal", tmp_path / "normal"))


def save(path: Path, width: int, height: int) -> None:
    pixels = np.random.default_rng(0).integers(40, 140, (height, width), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def text(path: Path) -> None:
    path.write_text("This is no image.")


def cut_short(path: Path) -> None:
    save(path, 300, 300)
    path.write_bytes(path.read_bytes()[:-40])


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "tiny": (lambda path: save(path, 1, 1), "1x1"),
    "wide": (lambda path: save(path, 40_000, 60), "40000x60"),
    "text": (text, "not a PNG"),
    "empty": (lambda path: path.write_bytes(b""), "empty"),
    "torn": (cut_short, "damaged"),
}


def test_a_busi_folder_gives_its_images_without_masks(normal: Path) -> None:
    images = [path for path in normal.glob("*.png") if "_mask" not in path.name]
    assert len(images) < len(list(normal.glob("*.png"))), "the drawn set has mask files"
    folder = HealthyFolder(normal)
    assert len(folder) == len(images)
    assert {path for _, path in folder.items} == set(images)


def test_a_whole_folder_of_normals_is_read_without_a_complaint(
    any_busi: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = HealthyFolder(any_busi / "normal")
    assert len(folder) == len({hash_of(path) for path in (any_busi / "normal").glob("*).png")})
    assert not any("_mask" in path.name for _, path in folder.items)
    assert not caplog.records


def test_images_stored_turned_are_painted_upright_and_drawings_are_left_out(
    normal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = sorted(normal.glob("normal (?).png"))[2]
    with Image.open(path) as image:
        upright = image.convert("L")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    drawing = Image.new("L", (300, 200))
    drawing.paste(255, (80, 60, 220, 140))
    drawing.save(normal / "drawing.png")
    folder = HealthyFolder(normal)
    number = next(n for n, (_, used) in enumerate(folder.items) if used == path)
    picked = folder.pick((number + 0.5) / len(folder))
    np.testing.assert_array_equal(picked.pixels, letterbox(np.asarray(upright))[0])
    assert folder.left_out == {"background of two grey levels": 1}
    assert f"1 turned upright, as its EXIF orientation says: {path.name}" in caplog.messages


def test_every_image_can_be_picked_and_is_letterboxed(normal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = HealthyFolder(normal)
    count = len(folder)
    picked = [folder.pick((n + 0.5) / count) for n in range(count)]
    assert len({healthy.row["healthy_sha256"] for healthy in picked}) == count
    assert folder.pick(0.0).row == picked[0].row
    assert folder.pick(np.nextafter(1.0, 0.0)).row == picked[-1].row
    monkeypatch.setattr(healthy_module, "CACHED_IMAGES", 2)
    again = HealthyFolder(normal)
    for number, healthy in enumerate(picked):
        reread = again.pick((number + 0.5) / count)
        assert np.array_equal(healthy.pixels, reread.pixels) and healthy.row == reread.row
        image = read_image(normal / healthy.row["healthy_file"])
        pixels, box = letterbox(image.pixels)
        assert np.array_equal(healthy.pixels, pixels)
        assert np.array_equal(healthy.valid, box.valid)
        assert healthy.row["healthy_sha256"] == image.sha256
        assert healthy.row["background"] == "real"
        assert (healthy.row["letterbox_left"], healthy.row["letterbox_top"]) == (box.left, box.top)
        assert healthy.row["letterbox_scale"] == box.scale


def test_images_with_a_lesion_are_left_out_of_a_whole_set(
    synthetic_busi: Path, normal: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="busigen.runtime"):
        folder = HealthyFolder(synthetic_busi)
    sound = HealthyFolder(normal)
    assert folder.fingerprint() == sound.fingerprint()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    count = len(list(synthetic_busi.glob("*/*).png"))) - len(sound)
    assert record.getMessage() == (
        f"healthy images: {len(sound)} used, {count} left out ({count} in a folder named benign or malignant)"
    )


def test_what_counts_is_the_mask_and_not_only_the_name_of_the_folder(synthetic_busi: Path, normal: Path) -> None:
    (normal / "more").mkdir()
    for number in (1, 2):
        for path in (synthetic_busi / "malignant").glob(f"malignant ({number})*.png"):
            shutil.copy(path, normal / "more")
    shutil.copytree(synthetic_busi / "benign", normal / "Benign")
    folder = HealthyFolder(normal)
    assert folder.left_out["with a lesion in its mask file"] == 2
    assert folder.left_out["in a folder named benign or malignant"] == len(list(normal.glob("Benign/*).png")))
    assert {path.parent for _, path in folder.items} == {normal}


@pytest.mark.parametrize("given", [".", "Images"])
def test_bus_bra_holds_no_healthy_image(synthetic_busbra: Path, given: str) -> None:
    images = len(list(synthetic_busbra.glob("Images/*.png")))
    with pytest.raises(InputError, match=rf"{images} left out \({images} with a lesion in its mask file\)"):
        HealthyFolder(synthetic_busbra / given)


@pytest.mark.parametrize("given", ["hospital", "hospital/images", "hospital/images/normal", "."])
@pytest.mark.parametrize("ending", ["", "_mask", "_mask_1"])
def test_images_with_a_lesion_in_a_folder_of_masks_are_left_out(
    synthetic_busi: Path, tmp_path: Path, given: str, ending: str
) -> None:
    images, masks = tmp_path / "hospital" / "images" / "normal", tmp_path / "hospital" / "masks" / "normal"
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number, (source, lesion) in enumerate((("normal", ""), ("benign", ""), ("benign", "_mask"), ("malignant", ""))):
        shutil.copy(synthetic_busi / source / f"{source} ({number + 1}).png", images / f"{number}.png")
        if lesion:
            shutil.copy(
                synthetic_busi / source / f"{source} ({number + 1}){lesion}.png", masks / f"{number}{ending}.png"
            )
    folder = HealthyFolder(tmp_path / given)
    assert folder.left_out == {"with a lesion in its mask file": 1}
    assert {path.stem for _, path in folder.items} == {"0", "1", "3"}


def test_a_folder_of_lesions_is_refused_and_its_neighbour_proposed(synthetic_busi: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="with a lesion in its mask file") as caught:
        HealthyFolder(synthetic_busi / "benign")
    assert caught.value.fix == f"Did you mean {synthetic_busi / 'normal'}?"
    alone = shutil.copytree(synthetic_busi / "benign", tmp_path / "scans")
    with pytest.raises(InputError) as caught:
        HealthyFolder(alone)
    assert "healthy breasts" in caught.value.fix


@pytest.mark.parametrize(("grey", "reason"), [(0, "too dark"), (255, "too bright"), (90, "flat background")])
def test_black_white_and_flat_images_are_left_out_by_name(
    normal: Path, caplog: pytest.LogCaptureFixture, grey: int, reason: str
) -> None:
    sound = HealthyFolder(normal)
    # Wide, so that letterbox bars would give it a deviation of their own.
    Image.new("L", (400, 200), grey).save(normal / "blank.png")
    with caplog.at_level(logging.INFO, logger="busigen.runtime"):
        folder = HealthyFolder(normal)
    assert folder.fingerprint() == sound.fingerprint()
    named, counted = (record.getMessage() for record in caplog.records)
    assert "blank.png" in named and reason in named
    assert "1 left out" in counted


@pytest.mark.parametrize("kind", BAD)
def test_an_unreadable_file_is_left_out_by_name(normal: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    sound = HealthyFolder(normal)
    make, reason = BAD[kind]
    make(normal / f"{kind}.png")
    with caplog.at_level(logging.WARNING, logger="busigen.runtime"):
        folder = HealthyFolder(normal)
    assert folder.fingerprint() == sound.fingerprint()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{kind}.png" in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("kind", BAD)
def test_a_folder_without_a_readable_image_is_refused_with_the_reason(tmp_path: Path, kind: str) -> None:
    make, reason = BAD[kind]
    make(tmp_path / f"{kind}.png")
    with pytest.raises(InputError, match="no healthy image that can be used") as caught:
        HealthyFolder(tmp_path)
    assert str(tmp_path) in caught.value.problem
    assert f"{kind}.png" in caught.value.problem
    assert reason in caught.value.problem
    assert "synthetic" in caught.value.fix


def test_empty_and_missing_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InputError, match="no healthy image that can be used"):
        HealthyFolder(tmp_path / "empty")
    for name in ("missing", "notes.txt"):
        with pytest.raises(InputError, match=f"{name} is no folder"):
            HealthyFolder(tmp_path / name)


def test_renaming_and_sorting_files_changes_nothing(normal: Path, tmp_path: Path) -> None:
    before = HealthyFolder(normal)
    other = tmp_path / "elsewhere"
    images = sorted(path for path in normal.iterdir() if "_mask" not in path.name)
    for number, path in enumerate(reversed(images)):
        place = other / f"scanner {number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place / f"{number:03d}.png")
    shutil.copy(images[0], other / "the same again.png")
    after = HealthyFolder(other)
    assert after.fingerprint() == before.fingerprint()
    assert len(after) == len(before)
    for position in np.linspace(0, 1, 23, endpoint=False):
        assert np.array_equal(after.pick(position).pixels, before.pick(position).pixels)


def test_a_changed_image_is_another_source(normal: Path) -> None:
    before = HealthyFolder(normal)
    _, path = before.items[0]
    pixels = read_image(path).pixels.copy()
    pixels[5, 5] ^= 1
    Image.fromarray(pixels).save(path)
    assert HealthyFolder(normal).fingerprint() != before.fingerprint()


def test_a_file_that_changes_before_it_is_read_again_is_noticed(normal: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of a larger folder, not all images are kept.
    monkeypatch.setattr(healthy_module, "CACHED_IMAGES", 2)
    folder = HealthyFolder(normal)
    (_, used), (_, changed), (_, gone), *_ = folder.items
    kept = folder.pick(0.0).pixels.copy()
    for path in (used, changed):
        save(path, 300, 300)
    gone.unlink()
    count = len(folder)
    with pytest.raises(IntegrityError, match="has changed since the run began") as caught:
        folder.pick(1.5 / count)
    assert str(changed) in caught.value.problem
    with pytest.raises(IntegrityError, match="cannot be read any more") as missing:
        folder.pick(2.5 / count)
    assert gone.name in missing.value.problem
    assert "Put the folder back as it was" in missing.value.fix
    # What has been read before is what the run goes on with: half of the samples must not show another image.
    assert np.array_equal(folder.pick(0.0).pixels, kept)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: save(path, 300, 300), "has changed since the run began"),
        (lambda path: path.write_bytes(path.read_bytes()[:-40]), "has changed since the run began"),
        (lambda path: path.unlink(), "cannot be read any more"),
        (lambda path: save(path.with_name("new.png"), 300, 300), "is new among the healthy images"),
    ],
    ids=["another image", "cut short", "gone", "one more"],
)
def test_a_folder_that_changes_during_the_run_is_refused(
    normal: Path, change: Callable[[Path], object], said: str
) -> None:
    folder = HealthyFolder(normal)
    folder.pick(0.0)  # Remembered: only looking at the folder again can tell.
    folder.refuse_changes()
    _, path = folder.items[0]
    whole = path.read_bytes()
    change(path)
    with pytest.raises(IntegrityError, match=said) as caught:
        folder.refuse_changes()
    assert str(path if "new" not in said else normal / "new.png") in caught.value.problem
    assert "the same command again" in caught.value.fix
    path.write_bytes(whole)
    (normal / "new.png").unlink(missing_ok=True)
    folder.refuse_changes()


def test_what_is_no_healthy_image_may_come_and_go(normal: Path) -> None:
    folder = HealthyFolder(normal)
    (normal / "notes.txt").write_text("")
    os.utime(folder.items[0][1])
    folder.refuse_changes()
    assert not folder.left_out


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_file_names_that_are_no_text_do_not_spoil_the_rows(tmp_path: Path) -> None:
    save(tmp_path / "a.png", 64, 64)
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/scan \xff.png")
    row = HealthyFolder(tmp_path).pick(0.0).row
    assert row["healthy_file"].encode() == b"scan ?.png"


@pytest.mark.parametrize(("frame", "top", "left"), [((256, 256), 0, 0), ((180, 256), 38, 0), ((256, 200), 0, 28)])
def test_a_synthetic_background_has_the_bars_of_its_frame_and_shows_skin_on_top(
    frame: tuple[int, int], top: int, left: int
) -> None:
    painted = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 256, axis=1)
    painted[:, :28] = 255
    healthy = synthetic(painted, frame)
    height, width = frame
    assert healthy.valid[top : top + height, left : left + width].all()
    assert healthy.valid.sum() == height * width
    assert not healthy.pixels[~healthy.valid].any()
    assert np.array_equal(healthy.pixels[healthy.valid].reshape(frame), painted[:height, left : left + width])
    assert (healthy.row["letterbox_top"], healthy.row["letterbox_left"]) == (top, left)


def test_a_synthetic_background_names_no_file() -> None:
    healthy = synthetic(np.full((256, 256), 90, np.uint8))
    assert healthy.row["background"] == "synthetic"
    assert healthy.row["healthy_file"] is healthy.row["healthy_sha256"] is None
    # Rows of both kinds go into one table.
    assert healthy.row.keys() == {
        "background",
        "healthy_file",
        "healthy_sha256",
        "letterbox_scale",
        "letterbox_left",
        "letterbox_top",
    }


def lesion(folder: Path, image: str, mask: str = "", seed: int = 3) -> Path:
    """Draw an image with a lesion, and its mask if it is to have one."""
    frame = draw_frame(np.random.default_rng(seed), (300, 280), "malignant")
    for name, pixels in ((image, frame.pixels), (mask, frame.lesions[0].astype(np.uint8) * 255)):
        if name:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name)
    return folder


def with_table(folder: Path, image: str, table: str, rows: str) -> Path:
    lesion(folder, image)
    (folder / table).write_text(rows)
    return folder


LESIONS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "labels.csv": (lambda f: with_table(f, "images/m1.png", "labels.csv", "file,class\nm1.png,malignant\n"), "calls"),
    "labels.csv beside": (lambda f: with_table(f, "m1.png", "labels.csv", "file,class\nm1.png,benign\n"), "calls"),
    "labels.csv above": (
        lambda f: with_table(f, "images/a/m1.png", "labels.csv", "file,class\nm1.png,benign\n") / "images" / "a",
        "calls",
    ),
    "BUS-BRA's table": (
        lambda f: with_table(f, "Images/bus_1.png", "bus_data.csv", "ID,Case,Pathology,BIRADS\nbus_1,1,benign,2\n"),
        "calls",
    ),
    "two rows": (
        lambda f: with_table(f, "images/m1.png", "labels.csv", "file,class\nm1.png,benign\nm1.png,normal\n"),
        "nobody can tell",
    ),
    "BUSI's name": (lambda f: lesion(f, "malignant (3).png"), "calls"),
    "other case": (lambda f: lesion(f, "IMG1.png", "img1_mask.png"), "mask file"),
    "other Unicode form": (lambda f: lesion(f, "L\u00e4sion.png", "La\u0308sion_mask.png"), "mask file"),
    "BrEaST": (lambda f: lesion(f, "case001.png", "case001_tumor.png"), "mask file"),
    "USG Masks": (lambda f: lesion(f, "USG Images/case001.png", "USG Masks/case001_tumor.png"), "mask file"),
    "GT": (lambda f: lesion(f, "original/0001.png", "GT/0001.png"), "mask file"),
    "GT beside": (lambda f: lesion(f, "original/0001.png", "GT/0001.png") / "original", "mask file"),
    "nnU-Net": (lambda f: lesion(f, "imagesTr/a_0000.png", "labelsTr/a.png"), "mask file"),
    "masks elsewhere": (lambda f: lesion(f, "scans/0001.png", "drawn by hand/0001 outline.png"), "mask file"),
}


@pytest.mark.parametrize("kind", LESIONS)
def test_what_anything_says_to_have_a_lesion_is_left_out(tmp_path: Path, kind: str) -> None:
    make, reason = LESIONS[kind]
    with pytest.raises(InputError, match="no healthy image that can be used") as caught:
        HealthyFolder(make(tmp_path / "set"))
    assert reason in caught.value.problem


@pytest.mark.parametrize("ending", ["png", "jpg"])
def test_masks_are_no_healthy_images(
    normal: Path, tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    sound = HealthyFolder(normal)
    lesion(normal, "../spare.png", f"some drawing.{ending}")
    folder = HealthyFolder(normal)
    assert folder.fingerprint() == sound.fingerprint()
    assert folder.left_out.total() == 1
    assert f"some drawing.{ending}" in caplog.text


def test_a_mask_of_another_class_marks_no_normal_image(synthetic_busi: Path, tmp_path: Path) -> None:
    lesion(tmp_path / "set", "images/benign/2.png", "masks/benign/2.png")
    (tmp_path / "set" / "images" / "normal").mkdir()
    shutil.copy(synthetic_busi / "normal" / "normal (1).png", tmp_path / "set" / "images" / "normal" / "2.png")
    for given in ("set", "set/images", "set/images/normal"):
        assert len(HealthyFolder(tmp_path / given)) == 1


def test_what_a_run_wrote_below_the_folder_is_no_healthy_image(normal: Path, caplog: pytest.LogCaptureFixture) -> None:
    sound = HealthyFolder(normal)
    generate(NoiseSource(), normal / "out", count=2, seed=1, shard_size=2)
    shutil.copy(normal / "normal (1).png", normal / "out" / "preview.png")
    with caplog.at_level(logging.INFO, logger="busigen.runtime"):
        assert HealthyFolder(normal).fingerprint() == sound.fingerprint()
    assert "1 written by busigen, passed over: normal/out" in caplog.text
    # Where a run has only begun, nothing tells its folder but the option.
    begun = lesion(normal / "begun", "x.png").parent / "begun"
    assert HealthyFolder(normal, out=begun).fingerprint() == sound.fingerprint()
    assert len(HealthyFolder(normal)) == len(sound) + 1


def test_where_nothing_says_healthy_a_line_says_that_nothing_was_checked(
    normal: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    HealthyFolder(normal)
    assert "not checked" not in caplog.text
    for number in (1, 3):
        (tmp_path / "scans").mkdir(exist_ok=True)
        shutil.copy(normal / f"normal ({number}).png", tmp_path / "scans" / f"{number}.png")
    HealthyFolder(tmp_path / "scans")
    assert "nothing says that 2 of them are healthy" in caplog.text


@pytest.mark.parametrize("name", ["a.mha", "a.nii.gz", "a.webp"])
def test_a_folder_that_others_can_read_is_not_called_empty(normal: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / name).write_bytes(b"-")
    with pytest.raises(InputError, match=rf"it holds 1 {name[1:]}"):
        HealthyFolder(tmp_path / "scans")
