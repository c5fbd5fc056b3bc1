"""Text and calipers are suspected, tissue is not."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw

from busigen.data.overlays import find_overlays
from tests.conftest import Sources
from tests.harness.synthetic_datasets import draw_frame


def _tissue(seed: int = 0) -> np.ndarray:
    return draw_frame(np.random.default_rng(seed), (500, 420), "benign").pixels


@pytest.mark.parametrize("seed", range(6))
def test_plain_tissue_raises_no_suspicion(seed: int) -> None:
    found = find_overlays(_tissue(seed))
    assert not found.text
    assert not found.calipers
    assert found.mask.mean() < 0.005


def test_a_line_of_text_is_found_and_covered() -> None:
    image = Image.fromarray(_tissue() // 2)
    ImageDraw.Draw(image).text((120, 330), "RT AXILLA 10H", fill=235, font_size=18)
    pixels = np.asarray(image)
    found = find_overlays(pixels)
    letters = pixels.astype(int) - _tissue() // 2 > 60
    assert found.text
    assert found.mask[letters].mean() > 0.95
    assert found.mask.mean() < 0.05


@pytest.mark.parametrize("tilted", [False, True])
def test_a_pair_of_calipers_is_found_and_covered(tilted: bool) -> None:
    pixels = _tissue() // 2
    for row, column in ((150, 120), (210, 330)):
        for step in range(-6, 7):
            pixels[row + step, column + (step if tilted else 0)] = 240
            pixels[row + (-step if tilted else 0), column + step] = 240
    found = find_overlays(pixels)
    assert found.calipers
    assert found.mask[150, 120]
    assert found.mask[210, 330]


def test_the_mask_alone_is_the_same_mask() -> None:
    pixels = _tissue()
    mask = find_overlays(pixels).mask
    assert mask.shape == pixels.shape
    assert mask.dtype == np.bool_
    np.testing.assert_array_equal(mask, find_overlays(pixels).mask)


def test_little_of_a_set_is_suspected(any_sources: Sources) -> None:
    overlays = any_sources.prepared.overlays
    assert 0 < overlays.mean() < 0.03
    assert max(overlay.mean() for overlay in overlays) < 0.25


def test_known_images(any_sources: Sources) -> None:
    rows = {row["id"]: row for row in any_sources.prepared.table.iter_rows(named=True)}
    # By eye. Of the drawn set, two images carry what is looked for; the others are real ones.
    known = {"busi/malignant (110)": ("text", "calipers"), "busi/benign (290)": ("text", "calipers")}
    if "busi/malignant (110)" not in rows:
        known = {"busi/malignant (5)": ("text",), "busi/benign (7)": ("calipers",)}
    for name, kinds in known.items():
        assert all(rows[name][f"overlay_{kind}"] for kind in kinds), name
