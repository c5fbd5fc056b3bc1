"""Defects planted into drawn and, where present, real images, and what the integrity section says of them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.api.pairs import Dataset
from busigen.data.geometry import edit_region
from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.evaluation.context import AuditContext, ImageSet, SectionResult
from busigen.evaluation.integrity import edge_fit, run
from busigen.evaluation.reading.inputs import draw
from busigen.evaluation.reading.sets import from_prepared, read_set
from busigen.evaluation.statistics.grouped import ALPHA
from busigen.runtime.execution.factory import generate
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from tests.conftest import Sources
from tests.harness.planted_defects import halved, repeated, with_calipers
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.several_lesions import healthy_images, written
from tests.harness.synthetic_datasets import draw_frame, draw_pairs
from tests.runtime.sampling.inputs.test_given_masks import save_image


@pytest.fixture(scope="module")
def lesions(any_sources: Sources, tmp_path_factory: pytest.TempPathFactory) -> ImageSet:
    """Lesion images: 160 held-out real ones, or 100 drawn ones where the sources are drawn and hold too few."""
    found = from_prepared(any_sources.prepared, ("val", "test"), lesions_only=True)
    if len(found) >= 100:
        return draw(found, 160, seed=0)
    return read_set(draw_pairs(tmp_path_factory.mktemp("pairs") / "set", count=150)).with_lesions()


def judge(synthetic: ImageSet, real: ImageSet, out: Path, **options: object) -> SectionResult:
    return run(AuditContext(synthetic, real, None, out, **options))


def flagged(result: SectionResult) -> set[str]:
    return {figure.key.removeprefix("integrity.") for figure in result.figures if figure.flagged}


def shifted(images: ImageSet) -> ImageSet:
    return replace(images, masks=np.roll(images.masks, 6, axis=2) & images.valid)


def flipped(images: ImageSet) -> ImageSet:
    return replace(images, masks=images.masks[:, :, ::-1] & images.valid)


def partly_flipped(images: ImageSet) -> ImageSet:
    rows = np.arange(len(images)) % 5 < 2
    return replace(images, masks=np.where(rows[:, None, None], flipped(images).masks, images.masks))


def squashed(images: ImageSet) -> ImageSet:
    arrays = []
    for image, mask, valid in zip(images.images, images.masks, images.valid, strict=True):
        inside = np.ix_(valid.any(axis=1), valid.any(axis=0))
        arrays.append([np.asarray(Image.fromarray(part[inside]).resize((256, 256))) for part in (image, mask)])
    pixels, masks = zip(*arrays, strict=True)
    return replace(images, images=np.stack(pixels), masks=np.stack(masks), valid=np.ones_like(images.valid))


def posterised(images: ImageSet) -> ImageSet:
    return replace(images, images=images.images // 32 * 32)


def specked(images: ImageSet) -> ImageSet:
    masks = images.masks.copy()
    masks[:, 60:64, 40:44] = True
    masks[:, 200:204, 210:214] = True
    return replace(images, masks=masks)


def coloured(images: ImageSet) -> ImageSet:
    return replace(images, table=images.table.with_columns(colour=True))


@pytest.mark.parametrize("seed", range(3))
def test_silent_on_half_of_the_set_against_the_other(lesions: ImageSet, seed: int, tmp_path: Path) -> None:
    """Real images have calipers, text, near-duplicates and clumsy masks: none of it is a defect among their like."""
    result = judge(*halved(lesions, seed), tmp_path)
    assert not result.flagged, result.findings


@pytest.mark.parametrize(
    ("defect", "keys"),
    [
        (shifted, {"mask.displacement", "mask.contrast"}),
        (flipped, {"mask.displacement", "mask.contrast"}),
        (partly_flipped, {"mask.displacement"}),
        (squashed, {"file.aspect"}),
        (with_calipers, {"overlay.calipers"}),
        (repeated, {"duplicate.exact", "duplicate.near", "duplicate.mask"}),
        (posterised, {"grey.levels"}),
        (specked, {"mask.parts"}),
        (coloured, {"file.colour"}),
    ],
)
def test_a_planted_defect_is_found(
    lesions: ImageSet, defect: Callable[[ImageSet], ImageSet], keys: set[str], tmp_path: Path
) -> None:
    first, second = halved(lesions)
    result = judge(defect(first), second, tmp_path)
    assert keys <= flagged(result)
    named = {key.removeprefix("integrity.") for finding in result.findings for key in finding.keys}
    assert keys <= named


def test_a_shift_is_measured_in_pixels(lesions: ImageSet, tmp_path: Path) -> None:
    first, second = halved(lesions)
    figure = judge(shifted(first), second, tmp_path).figure("integrity.mask.displacement")
    # By at least the shift less how far annotators' own outlines lie off, and not by much more than both together.
    assert 6 - figure.floor.value < figure.value.value < 6 + figure.floor.value + 1
    assert figure.value.low < figure.value.value < figure.value.high
    assert (figure.synthetic, figure.real) == (len(first), len(second))


def test_two_empty_masks_are_enough(lesions: ImageSet, tmp_path: Path) -> None:
    first, second = halved(lesions)
    masks = first.masks.copy()
    masks[:2] = False
    result = judge(replace(first, masks=masks), second, tmp_path)
    assert flagged(result) == {"mask.empty"}
    assert result.details["empty_masks"] == first.table["id"][:2].to_list()


@pytest.mark.parametrize(("without", "said"), [(None, "No image has a mask file"), (3, "3 of ")])
def test_masks_that_are_missing_are_not_empty(
    lesions: ImageSet, without: int | None, said: str, tmp_path: Path
) -> None:
    first, second = halved(lesions)
    masks, files = first.masks.copy(), first.table["mask_files"].to_numpy().copy()
    masks[:without], files[:without] = False, 0
    table = first.table.with_columns(pl.Series("mask_files", files))
    result = judge(replace(first, masks=masks, table=table), second, tmp_path)
    assert "mask.empty" not in flagged(result)
    assert any(said in finding.text and "mask file" in finding.text for finding in result.findings), result.findings


def test_a_lesion_in_a_normal_image_is_a_contradiction(lesions: ImageSet, tmp_path: Path) -> None:
    first, second = halved(lesions)
    classes = pl.Series("class", ["normal", *first.table["class"][1:]])
    result = judge(replace(first, table=first.table.with_columns(classes)), second, tmp_path)
    assert "mask.contradiction" in flagged(result)


def test_the_worst_masks_and_the_repeats_are_shown(lesions: ImageSet, tmp_path: Path) -> None:
    first, second = halved(lesions)
    result = judge(repeated(flipped(first)), second, tmp_path)
    assert {picture.file for picture in result.pictures} == {"masks-worst.png", "near-duplicates.png"}
    for picture in result.pictures:
        assert Image.open(tmp_path / "sections" / "integrity" / picture.file).size[0] > 256


def turned(images: ImageSet, axes: tuple[int, ...]) -> ImageSet:
    arrays = {name: np.flip(getattr(images, name), axes) for name in ("images", "masks", "valid", "overlays")}
    return replace(images, **arrays)


def joined(parts: list[ImageSet]) -> ImageSet:
    arrays = {
        name: np.concatenate([getattr(p, name) for p in parts]) for name in ("images", "masks", "valid", "overlays")
    }
    return replace(parts[0], table=pl.concat([part.table for part in parts]), **arrays)


@pytest.mark.parametrize(("copies", "defect"), [(np.arange(50), False), (np.zeros(100, np.int64), True)])
def test_repeats_count_at_the_real_sets_size(
    lesions: ImageSet, copies: np.ndarray, defect: bool, tmp_path: Path
) -> None:
    """Fifty images in two copies each among 210: of 30 images one repeats another. One image in a hundred copies."""
    first, second = halved(lesions)
    distinct = joined([turned(first.take(np.arange(40)), axes) for axes in ((), (1,), (2,), (1, 2))])
    many = joined([distinct, distinct.take(copies)])
    figure = judge(many, second.take(np.arange(30)), tmp_path).figure("integrity.duplicate.exact")
    assert figure.value.value == pytest.approx(100 * len(copies) / len(many))
    assert figure.p is not None and figure.p < ALPHA
    assert figure.flagged == defect
    assert f"here {len(many)} images stand against 30. Of 30 drawn at random, " in figure.note
    assert ("not flagged" in figure.note) != defect


def test_a_few_images_are_judged_without_flags(lesions: ImageSet, tmp_path: Path) -> None:
    first, second = halved(lesions)
    result = judge(flipped(first.take(np.arange(8))), second, tmp_path)
    assert flagged(result) == set()
    assert any("fewer than 20" in finding.text for finding in result.findings)
    assert result.figure("integrity.mask.displacement").synthetic == 8


def test_files_that_could_not_be_read_are_flagged(lesions: ImageSet, tmp_path: Path) -> None:
    folder = draw_pairs(tmp_path / "set", count=6)
    (folder / "images" / "benign" / "scan0.png").write_bytes(b"no image")
    result = judge(read_set(folder), lesions, tmp_path / "out")
    flags = [finding.text for finding in result.findings if finding.level == "flag"]
    assert any("set/images/benign/scan0.png" in text and "not a PNG" in text for text in flags)


def test_an_outline_fits_where_it_was_drawn() -> None:
    frame = draw_frame(np.random.default_rng(5), (256, 256), "benign")
    everywhere = np.ones((256, 256), bool)
    here = edge_fit(frame.pixels, frame.lesions[0], everywhere)
    away = edge_fit(frame.pixels, np.roll(frame.lesions[0], (6, -8), (0, 1)), everywhere)
    assert here["displacement"] <= 2
    # The step of the search is 2 px: 10 px away is found to within one step in each direction.
    assert abs(away["displacement"] - 10) <= np.hypot(2, 2)
    assert away["contrast"] < here["contrast"]
    assert edge_fit(frame.pixels, np.zeros((256, 256), bool), everywhere) == {}


# Sets painted into real images


def painted(tmp_path: Path, spoil: int | None = None) -> tuple[ImageSet, Path]:
    """A shard of four lesions in four healthy images, and the folder of these; ``spoil`` alters one background."""
    rng = np.random.default_rng(1)
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number in range(4):
            Image.fromarray(draw_frame(rng, (320, 260)).pixels).save(healthy / f"{number}.png")
            source = read_image(healthy / f"{number}.png")
            image, box = letterbox(source.pixels)
            mask = np.zeros((256, 256), bool)
            mask[100:140, 90:150] = True
            edit = edit_region(mask, box.valid)
            image[edit] //= 2
            if number == spoil:
                image[tuple(np.argwhere(~edit & box.valid)[0])] ^= 1
            row = {"class": "benign", "background": "real", "healthy_sha256": source.sha256}
            for name, content in (
                ("image.png", png(image)),
                ("mask.png", png(mask)),
                ("json", json.dumps(row).encode()),
            ):
                member = tarfile.TarInfo(f"{number:09d}.{name}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return read_set(tmp_path / "shard.tar"), healthy


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_backgrounds_are_proven_bit_for_bit(lesions: ImageSet, tmp_path: Path) -> None:
    images, healthy = painted(tmp_path)
    result = judge(images, lesions, tmp_path / "out", healthy=healthy)
    assert any("All 4 backgrounds equal" in finding.text for finding in result.findings)
    assert not result.figure("integrity.background.unproven").flagged


def test_one_changed_pixel_outside_the_edit_region_is_flagged(lesions: ImageSet, tmp_path: Path) -> None:
    images, healthy = painted(tmp_path, spoil=2)
    result = judge(images, lesions, tmp_path / "out", healthy=healthy)
    assert result.figure("integrity.background.unproven").value.value == 25
    assert any("000000002: 1 pixels outside its edit region" in finding.text for finding in result.findings)


def test_images_without_a_lesion_are_counted_and_proven_and_their_empty_masks_are_no_defect(
    synthetic_busi: Path, tmp_path: Path
) -> None:
    for number in range(6):
        save_image(tmp_path / f"healthy/{number}.png", (320, 260 + 20 * number), seed=number)
    sampler = quick_sampler(QuickEngine(), healthy=HealthyFolder(tmp_path / "healthy"), normals=0.4)
    generate(sampler, tmp_path / "set", count=10, seed=5, shard_size=5)
    images = read_set(tmp_path / "set")
    assert dict(images.table.group_by("class").len().iter_rows()) == {"benign": 3, "malignant": 3, "normal": 4}
    assert len(images.with_lesions()) == 6
    result = judge(images, read_set(synthetic_busi), tmp_path / "out", healthy=tmp_path / "healthy")
    assert result.details["empty_masks"] == []
    assert result.figure("integrity.background.unproven").value.value == 0
    assert not any("empty" in key or "contradiction" in key or "background" in key for key in flagged(result))


def test_several_lesions_are_read_from_one_mask_and_their_backgrounds_proven(
    synthetic_busi: Path, tmp_path: Path
) -> None:
    healthy = healthy_images(tmp_path / "healthy")
    written(tmp_path / "set", healthy, lesions={"1": 0.2, "3": 0.8})
    images, pairs = read_set(tmp_path / "set"), Dataset(tmp_path / "set")
    assert images.table["lesions"].to_list() == [len(pair.masks) for pair in pairs]
    assert all(np.array_equal(mask, pair.mask) for mask, pair in zip(images.masks, pairs, strict=True))
    result = judge(images, read_set(synthetic_busi), tmp_path / "out", healthy=healthy)
    assert result.figure("integrity.background.unproven").value.value == 0
    assert result.details["empty_masks"] == []


def test_without_the_healthy_folder_the_report_says_what_would_prove_them(lesions: ImageSet, tmp_path: Path) -> None:
    images, _ = painted(tmp_path)
    result = judge(images, lesions, tmp_path / "out")
    assert any("--healthy DIR" in finding.text for finding in result.findings)


def test_a_healthy_image_that_is_not_there_is_unproven(lesions: ImageSet, tmp_path: Path) -> None:
    images, healthy = painted(tmp_path)
    (healthy / "2.png").unlink()
    result = judge(images, lesions, tmp_path / "out", healthy=healthy)
    figure = result.figure("integrity.background.unproven")
    assert figure.value.value == 25
    assert figure.flagged
    said = "000000002 names a healthy image that is not below --healthy"
    assert any(said in finding.text for finding in result.findings)
