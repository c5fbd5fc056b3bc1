"""A user's folder of masks: what counts as one, which sample gets which, and that it comes out as it went in."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from busigen.data.letterbox import fit, letterbox_mask
from busigen.data.masks import read_mask
from busigen.errors import AcceptanceError, InputError, IntegrityError, UsageError
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.run import SourceOptions
from busigen.runtime.sampling.inputs.given_masks import MaskFolder
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.inputs.placement import Placement
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.hashing import hashes
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.synthetic_datasets import draw_frame
from tests.runtime.sampling.inputs.test_placement import blob

SEED = 5


def save(path: Path, mask: NDArray[np.bool_]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(mask.astype(np.uint8) * 255).save(path)
    return path


def save_image(path: Path, size: tuple[int, int], seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw_frame(np.random.default_rng(seed), size).pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Masks alone: two benign ones, a malignant one, and one of which nothing says what it is."""
    save(tmp_path / "masks/benign/a.png", blob((310, 190)))
    save(tmp_path / "masks/benign/b.png", blob((300, 420), down=0.4))
    save(tmp_path / "masks/malignant/c.png", blob((380, 380), across=0.4))
    save(tmp_path / "masks/d.png", blob((310, 334), down=0.6))
    return tmp_path / "masks"


def draw(sampler: Sampler, count: int, first: int = 0) -> SampleBatch:
    return sampler.draw(SEED, range(first, first + count), lambda done: None)


def letterboxed(files: list[Path]) -> NDArray[np.bool_]:
    native = np.logical_or.reduce([read_mask(file, None) for file in files])
    return letterbox_mask(native, fit(width=native.shape[1], height=native.shape[0]))


@pytest.mark.parametrize("real_backgrounds", [False, True])
def test_every_mask_is_painted_once_in_turn_as_it_is_and_stage_1_is_left_out(
    folder: Path, tmp_path: Path, real_backgrounds: bool
) -> None:
    engine = QuickEngine()
    healthy = None
    if real_backgrounds:
        save_image(tmp_path / "healthy/1.png", (400, 400))
        healthy = HealthyFolder(tmp_path / "healthy")
    sampler = quick_sampler(engine, masks=MaskFolder(folder), healthy=healthy)
    samples = draw(sampler, 8).samples
    files = [sample.row["given_mask_file"] for sample in samples]
    assert sorted(files[:4]) == ["benign/a.png", "benign/b.png", "d.png", "malignant/c.png"]
    assert files[4:] == files[:4]
    for sample in samples:
        assert np.array_equal(sample.mask, letterboxed([folder / sample.row["given_mask_file"]]))
        if "/" in sample.row["given_mask_file"]:
            assert sample.label == Path(sample.row["given_mask_file"]).parts[0]
    assert len({sample.image.tobytes() for sample in samples}) == 8
    assert not any(stage.startswith("mask") for stage, _ in engine.calls)


def assert_whole(masks: MaskFolder, indices: list[int]) -> None:
    """The samples' masks are those of the folder, as its files have them, and so are their classes."""
    for sample in quick_sampler(QuickEngine(), masks=masks).draw(SEED, indices, lambda done: None).samples:
        item = masks.items[sample.index]
        assert np.array_equal(sample.mask, letterboxed(list(item.record.masks)))
        assert sample.label == item.record.image_class
        assert sample.row["given_mask_file"] == ", ".join(f"{item.label}/{mask.name}" for mask in item.record.masks)
        assert Placement.recorded(sample.row) == Placement.letterboxed(item.size)


def test_the_masks_of_a_labelled_set_come_back_whole(synthetic_busi: Path) -> None:
    masks = MaskFolder(synthetic_busi)
    images = [path for name in ("benign", "malignant") for path in (synthetic_busi / name).glob("*).png")]
    assert len(masks) == len(images)
    # Some mask file of the set is not as the others: two for one image, alpha, colour, one bit.
    assert any(len(item.record.masks) == 2 for item in masks.items)
    assert_whole(masks, list(range(len(masks))))


@pytest.mark.slow
def test_the_masks_of_busi_come_back_whole(real_data: Path | None) -> None:
    if real_data is None:
        pytest.skip("needs BUSI")
    masks = MaskFolder(real_data / "Dataset_BUSI_with_GT")
    assert masks.left_out.keys() == {"with nothing marked"}
    several = [number for number, item in enumerate(masks.items) if len(item.record.masks) > 1]
    assert_whole(masks, [*range(0, len(masks), 20), *several])


@pytest.mark.parametrize("jitter", [0.0, 0.2])
def test_samples_depend_on_seed_and_index_alone(folder: Path, jitter: float) -> None:
    whole = draw(quick_sampler(QuickEngine(), masks=MaskFolder(folder), jitter=jitter), 9)
    for first in (3, 7):
        sampler = quick_sampler(QuickEngine(), masks=MaskFolder(folder), jitter=jitter, batch_size=1)
        for found, expected in zip(draw(sampler, 2, first).samples, whole.samples[first:], strict=False):
            assert (found.attempt, found.label, found.row) == (expected.attempt, expected.label, expected.row)
            assert found.mask.tobytes() == expected.mask.tobytes()
            assert found.image.tobytes() == expected.image.tobytes()
    moved = [Placement.recorded(sample.row) for sample in whole.samples]
    assert len(
        {(place, sample.row["given_mask_file"]) for place, sample in zip(moved, whole.samples, strict=True)}
    ) == (9 if jitter else 4)


def test_bytes_do_not_depend_on_the_batch_size_nor_on_file_names(folder: Path, tmp_path: Path) -> None:
    for name, batch_size in (("one", 1), ("many", 16)):
        sampler = quick_sampler(QuickEngine(), masks=MaskFolder(folder), jitter=0.1, batch_size=batch_size)
        generate(sampler, tmp_path / name, count=7, seed=SEED, shard_size=3)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")
    before = quick_sampler(QuickEngine(), masks=MaskFolder(folder)).fingerprint()
    (folder / "benign/a.png").rename(folder / "benign/z.png")
    assert quick_sampler(QuickEngine(), masks=MaskFolder(folder)).fingerprint() == before
    (folder / "benign/z.png").rename(folder / "malignant/z.png")
    assert quick_sampler(QuickEngine(), masks=MaskFolder(folder)).fingerprint() != before


def test_a_mask_is_painted_into_the_healthy_image_of_its_name_and_others_are_drawn(
    folder: Path, tmp_path: Path
) -> None:
    for number, name in enumerate(("A.png", "x.png", "y.jpg", "c.png", "c.jpg")):
        save_image(tmp_path / "healthy" / name, (400, 400), seed=number)
    sampler = quick_sampler(QuickEngine(), masks=MaskFolder(folder), healthy=HealthyFolder(tmp_path / "healthy"))
    painted: dict[str, set[str]] = {}
    for sample in draw(sampler, 40).samples:
        painted.setdefault(sample.row["given_mask_file"], set()).add(sample.row["healthy_file"])
    assert painted["benign/a.png"] == {"A.png"}
    # Two images are called c, so neither is its own.
    assert all(len(painted[name]) > 2 for name in ("benign/b.png", "malignant/c.png", "d.png"))
    before = sampler.fingerprint()
    (tmp_path / "healthy/A.png").rename(tmp_path / "healthy/other.png")
    other = quick_sampler(QuickEngine(), masks=MaskFolder(folder), healthy=HealthyFolder(tmp_path / "healthy"))
    assert other.fingerprint()["healthy"] == before["healthy"]
    assert other.fingerprint()["masks"] != before["masks"]


def test_a_mask_goes_where_an_image_holds_it_and_is_moved_only_where_none_does(tmp_path: Path) -> None:
    save(tmp_path / "masks/a.png", blob((300, 300), across=0.2))
    for number in range(6):
        save_image(tmp_path / f"healthy/narrow{number}.png", (200, 400), seed=number)
    masks = MaskFolder(tmp_path / "masks")
    samples = draw(quick_sampler(QuickEngine(), masks=masks, healthy=HealthyFolder(tmp_path / "healthy")), 6).samples
    assert len({sample.row["healthy_file"] for sample in samples}) > 1
    assert {Placement.recorded(sample.row).left > 0 for sample in samples} == {True}
    save_image(tmp_path / "healthy/wide.png", (400, 300), seed=6)
    samples = draw(quick_sampler(QuickEngine(), masks=masks, healthy=HealthyFolder(tmp_path / "healthy")), 6).samples
    assert {sample.row["healthy_file"] for sample in samples} == {"wide.png"}
    assert all(np.array_equal(sample.mask, letterboxed([tmp_path / "masks/a.png"])) for sample in samples)


def test_classes_of_masks_that_nothing_names_follow_the_shares(folder: Path) -> None:
    (folder / "d.png").rename(folder / "benign.png")
    (folder / "benign/a.png").rename(folder / "a.png")
    (folder / "benign/b.png").rename(folder / "b.png")
    (folder / "labels.csv").write_text("file,class\nb.png,malignant\n")
    masks = MaskFolder(folder)
    assert {item.file: item.label for item in masks.items} == {
        "benign.png": "benign",
        "a.png": None,
        "b.png": "malignant",
        "malignant/c.png": "malignant",
    }
    samples = draw(quick_sampler(QuickEngine(), masks=masks), 24).samples
    labels = {
        name: Counter(s.label for s in samples if s.row["given_mask_file"] == name) for name in ("a.png", "b.png")
    }
    assert labels == {"a.png": {"benign": 3, "malignant": 3}, "b.png": {"malignant": 6}}
    only = MaskFolder(folder, classes=["benign"])
    assert sorted(item.file for item in only.items) == ["a.png", "benign.png"]
    assert {
        sample.label for sample in draw(quick_sampler(QuickEngine(), masks=only, classes={"benign": 1.0}), 4).samples
    } == {"benign"}


def test_what_is_no_mask_is_named_and_the_rest_is_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    shutil.copy(folder / "benign/a.png", folder / "benign/again.png")
    save(folder / "empty.png", np.zeros((300, 300), dtype=bool))
    speck = np.zeros((300, 300), dtype=bool)
    speck[100:110, 100:110] = True
    save(folder / "speck.png", speck)
    save(folder / "inverted.png", ~blob((300, 300)))
    save_image(folder / "picture.png", (300, 300))
    save(folder / "normal/n.png", blob((200, 300)))
    masks = MaskFolder(folder)
    assert len(masks) == 4
    assert masks.left_out == {
        "the same mask again": 1,
        "with nothing marked": 1,
        "too small": 1,
        "no mask or unreadable": 2,
        "of images called normal": 1,
    }
    for name, words in (
        ("speck.png", "0.12% of its image"),
        ("inverted.png", "at most 90% is plausible"),
        ("picture.png", "is a picture"),
        ("normal/n.png", "called normal. Name both otherwise"),
    ):
        assert any(name in line and words in line for line in caplog.messages), name
    assert "masks: 4 used (2 benign, 1 malignant, 1 of no class), 6 left out" in caplog.text


def test_a_folder_without_masks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no folder"):
        MaskFolder(tmp_path / "missing")
    save_image(tmp_path / "images/scan.png", (300, 300))
    with pytest.raises(
        InputError, match=r"no mask that can be used, 1 left out \(1 no mask or unreadable\).*scan.png is a picture"
    ):
        MaskFolder(tmp_path / "images")
    save(tmp_path / "masks/benign/a.png", blob((310, 190)))
    with pytest.raises(InputError, match="1 of a class that --classes leaves out") as refused:
        MaskFolder(tmp_path / "masks", classes=["malignant"])
    assert "--classes" in str(refused.value.fix)


def test_masks_that_change_behind_a_run_end_it(folder: Path) -> None:
    for change in (
        lambda: save(folder / "benign/a.png", blob((310, 190), down=0.3)),
        lambda: (folder / "benign/b.png").unlink(),
        lambda: save(folder / "benign/new.png", blob((300, 300))),
    ):
        masks = MaskFolder(folder)
        sampler = quick_sampler(QuickEngine(), masks=masks)
        draw(sampler, 2)
        change()
        with pytest.raises(IntegrityError, match="was changed, added or removed"):
            draw(sampler, 2)


def test_a_mask_that_no_image_can_hold_ends_the_run_with_its_name(tmp_path: Path) -> None:
    wide = np.zeros((300, 300), dtype=bool)
    wide[100:160, 20:280] = True
    save(tmp_path / "masks/wide.png", wide)
    save_image(tmp_path / "healthy/1.png", (200, 400))
    sampler = quick_sampler(
        QuickEngine(), masks=MaskFolder(tmp_path / "masks"), healthy=HealthyFolder(tmp_path / "healthy")
    )
    with pytest.raises(AcceptanceError, match=r"mask larger than the image\. Its mask is wide\.png"):
        draw(sampler, 1)


def test_options_that_ask_for_outlines_are_refused_with_masks(folder: Path) -> None:
    for options, words in (
        ({"masks": folder, "size": "0.03"}, "--size asks for outlines"),
        ({"masks": folder, "taller_than_wide": True}, "--taller-than-wide"),
        ({"masks": folder, "birads": "4"}, "--birads"),
        ({"jitter": 0.1}, "without masks"),
        ({"masks": folder, "jitter": 0.7}, "--jitter is 0.7"),
        ({"masks": folder, "jitter": float("nan")}, "--jitter is nan"),
    ):
        with pytest.raises(UsageError, match=words):
            SourceOptions(**options).conditions()
