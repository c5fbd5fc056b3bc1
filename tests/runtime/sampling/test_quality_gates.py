"""Each gate refuses what it is for, by name, and lets plausible draws pass."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import largest_component
from busigen.data.letterbox import letterbox, letterbox_mask
from busigen.evaluation.reading.sets import from_prepared
from busigen.runtime.sampling.quality_gates import (
    MIN_CONTRAST,
    background_reason,
    cut_pixels,
    image_reason,
    mask_reason,
)
from tests.conftest import Sources
from tests.harness.synthetic_datasets import draw_frame

ROWS, COLUMNS = np.mgrid[0:256, 0:256]
EVERYWHERE = np.ones((256, 256), dtype=bool)
STRIP = (ROWS >= 48) & (ROWS < 208)
"""A wide image between letterbox bars."""


def ellipse(row: float, column: float, height: float, width: float) -> NDArray[np.bool_]:
    return ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 <= 1


def judge(raw: NDArray[np.bool_], valid: NDArray[np.bool_] = EVERYWHERE) -> str | None:
    return mask_reason(raw, largest_component(raw & valid), valid)


SPECKS = np.random.default_rng(0).random((256, 256)) < 0.02


@pytest.mark.parametrize(
    ("raw", "valid", "reason"),
    [
        (~EVERYWHERE, EVERYWHERE, "empty mask"),
        (ellipse(20, 128, 15, 30), STRIP, "empty mask"),
        (ellipse(128, 128, 5, 5), EVERYWHERE, "tiny mask"),
        (ellipse(128, 128, 105, 105), EVERYWHERE, "huge mask"),
        (ellipse(128, 128, 76, 100), STRIP, "huge mask"),
        (ellipse(128, 128, 25, 30) | SPECKS, EVERYWHERE, "crumbling mask"),
        (ellipse(128, 80, 25, 25) | ellipse(128, 180, 15, 15), EVERYWHERE, "crumbling mask"),
        (ellipse(128, 0, 25, 40), EVERYWHERE, "mask cut by the border"),
        (ellipse(255, 128, 40, 40), EVERYWHERE, "mask cut by the border"),
        (ellipse(48, 128, 30, 40), STRIP, "mask cut by the border"),
        # Cut by no more than two pixels: 12 to 15 % of their outlines lie on the border.
        (ellipse(128, 28, 25, 30), EVERYWHERE, "mask cut by the border"),
        (ellipse(128, 227, 25, 30), EVERYWHERE, "mask cut by the border"),
        (ellipse(76, 128, 30, 40), STRIP, "mask cut by the border"),
    ],
)
def test_bad_outlines_are_refused(raw: NDArray[np.bool_], valid: NDArray[np.bool_], reason: str) -> None:
    assert judge(raw, valid) == reason


@pytest.mark.parametrize(
    ("raw", "valid"),
    [
        (ellipse(120, 128, 20, 30), EVERYWHERE),
        (ellipse(120, 128, 7, 8), EVERYWHERE),
        (ellipse(128, 128, 70, 100), EVERYWHERE),
        (ellipse(110, 128, 30, 40) | ellipse(200, 30, 6, 6), EVERYWHERE),
        (ellipse(27, 128, 27, 30), EVERYWHERE),
        # A real outline may graze the border.
        (ellipse(128, 30, 25, 30), EVERYWHERE),
        (ellipse(128, 128, 30, 40), STRIP),
        # What lies on the bars is not image and judges nothing.
        (ellipse(128, 128, 30, 40) | (ROWS < 20), STRIP),
    ],
)
def test_plausible_outlines_pass(raw: NDArray[np.bool_], valid: NDArray[np.bool_]) -> None:
    assert judge(raw, valid) is None


def test_the_gates_refuse_hardly_any_annotated_lesion(any_sources: Sources) -> None:
    found = from_prepared(any_sources.prepared, ("train",), lesions_only=True)
    reasons = [judge(mask, valid) for mask, valid in zip(found.masks, found.valid, strict=True)]
    cut = sum(reason == "mask cut by the border" for reason in reasons)
    # 0.7 % of the real ones; a gate that refused more than two in a hundred would choose what lesions look like.
    assert cut <= 0.02 * len(reasons)


def test_a_lesion_must_differ_from_what_surrounds_it() -> None:
    mask = ellipse(120, 128, 20, 30)
    tissue = np.random.default_rng(0).normal(90, 10, mask.shape)
    for step, reason in ((0, "no contrast"), (-2, "no contrast"), (-30, None), (30, None)):
        image = np.clip(tissue + step * mask, 0, 255).astype(np.uint8)
        assert image_reason(image, mask, EVERYWHERE) == reason, step


def test_only_the_band_around_the_lesion_counts() -> None:
    mask = ellipse(120, 128, 20, 30)
    band = ndimage.binary_dilation(mask, iterations=8)
    far_away = np.where(band, 90, 10).astype(np.uint8)
    assert image_reason(far_away, mask, EVERYWHERE) == "no contrast"
    # The bars next to a lesion are black, and so is many a lesion: they are no surroundings.
    cut = ellipse(60, 128, 14, 30)
    strip = (ROWS >= 46) & (ROWS <= 74)
    lonely = cut & strip
    assert image_reason(np.where(strip, 90, 0).astype(np.uint8), lonely, strip) == "no contrast"
    assert image_reason(np.full((256, 256), 90, np.uint8), strip, strip) == "no surroundings"


def test_what_is_judged_in_the_lesions_box_is_what_the_whole_image_has() -> None:
    rng = np.random.default_rng(3)
    for _ in range(40):
        # Anywhere, also cut by the image's border and by the letterbox bars.
        mask = ellipse(*rng.uniform(0, 256, 2), *rng.uniform(3, 90, 2)) & STRIP
        if not mask.any():
            continue
        inner = ndimage.binary_erosion(STRIP, structure=np.ones((3, 3)))
        assert cut_pixels(mask, STRIP) == (mask & ~inner).sum()
        band = ndimage.binary_dilation(mask, iterations=8) & ~mask & STRIP
        # Levels on either side of the least contrast, so that a pixel more or less in the band would tip it.
        image = np.where(mask, 90, 90 + MIN_CONTRAST + rng.normal(0, 0.5)).round() + rng.integers(-3, 4, mask.shape)
        image = image.astype(np.uint8)
        contrast = abs(float(image[mask].mean()) - float(image[band].mean()))
        assert image_reason(image, mask, STRIP) == (None if contrast >= MIN_CONTRAST else "no contrast")


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (np.zeros((256, 256)), "background too dark or too bright"),
        (np.full((256, 256), 255), "background too dark or too bright"),
        (np.full((256, 256), 90), "flat background"),
        (np.where(np.hypot(*np.mgrid[-128:128, -128:128]) < 60, 255, 0), "background of two grey levels"),
    ],
)
def test_broken_backgrounds_are_refused(image: NDArray[np.float64], reason: str) -> None:
    assert background_reason(image.astype(np.uint8)) == reason


@pytest.mark.parametrize("image_class", ["benign", "malignant"])
def test_drawn_ultrasound_passes_every_gate(image_class: str) -> None:
    for seed in range(8):
        frame = draw_frame(np.random.default_rng(seed), (420, 380), image_class)
        image, box = letterbox(frame.pixels)
        mask = letterbox_mask(frame.lesions[0], box)
        assert mask_reason(mask, mask, box.valid) is None
        assert image_reason(image, mask, box.valid) is None
        assert background_reason(letterbox(draw_frame(np.random.default_rng(seed), (420, 380)).pixels)[0]) is None
