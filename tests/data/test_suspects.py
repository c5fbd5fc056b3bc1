"""What a scanner paints is suspected, whatever its shape; little of plain tissue is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw

from busigen.data.overlays import find_overlays, suspect_mask
from tests.conftest import Sources
from tests.harness.synthetic_datasets import draw_frame

Pixels = np.ndarray


def tissue(seed: int = 0) -> Pixels:
    return draw_frame(np.random.default_rng(seed), (420, 380), "benign").pixels


def _cross(pixels: Pixels, row: int, column: int, level: int) -> None:
    pixels[row - 6 : row + 7, column] = level
    pixels[row, column - 6 : column + 7] = level


def _single_caliper(pixels: Pixels) -> None:
    _cross(pixels, 160, 150, 250)


def _faint_caliper(pixels: Pixels) -> None:
    for row, column in ((160, 150), (220, 260)):
        _cross(pixels, row, column, min(255, int(pixels[row - 8 : row + 9, column - 8 : column + 9].max()) + 25))


def _dark_caliper(pixels: Pixels) -> None:
    pixels[130:260, 120:300] = pixels[130:260, 120:300] // 2 + 120
    for row, column in ((160, 150), (220, 260)):
        _cross(pixels, row, column, 5)


def _dotted_line(pixels: Pixels) -> None:
    for step in range(0, 160, 4):
        pixels[150 + step // 4, 120 + step] = 230


def _steep_dotted_line(pixels: Pixels) -> None:
    for step in range(0, 160, 4):
        pixels[120 + step, 210 - step // 5] = 230


def _ruler(pixels: Pixels) -> None:
    for row in range(30, 370, 34):
        pixels[row : row + 2, 2:10] = 220


def _grey_scale(pixels: Pixels) -> None:
    pixels[40:180, 404:414] = np.linspace(250, 90, 140)[:, None].astype(np.uint8)


def _badge(pixels: Pixels) -> None:
    pixels[:18, :18] = 0
    pixels[4:14, 4:6] = pixels[4:14, 12:14] = pixels[4:6, 4:14] = pixels[12:14, 4:14] = 255


def _cursor(pixels: Pixels) -> None:
    pixels[300:340, 200:300] //= 4
    pixels[320:322, 240:256] = 235


MARKS = (
    _single_caliper,
    _faint_caliper,
    _dark_caliper,
    _dotted_line,
    _steep_dotted_line,
    _ruler,
    _grey_scale,
    _badge,
    _cursor,
)


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: mark.__name__.strip("_"))
@pytest.mark.parametrize("seed", range(3))
def test_what_is_painted_is_suspected(mark: Callable[[Pixels], None], seed: int) -> None:
    pixels = tissue(seed) // 2
    before = pixels.copy()
    mark(pixels)
    # The dark caliper needs bright ground, which is drawn with it: its own pixels are the darkest there.
    generated = pixels < 10 if mark is _dark_caliper else pixels.astype(int) - before > 50
    if mark is _dark_caliper:
        generated[:130], generated[260:], generated[:, :120], generated[:, 300:] = False, False, False, False
    if mark is _faint_caliper:
        generated = pixels != before
    suspects = suspect_mask(pixels)
    # The ends of thin marks may be lost in speckle of the same brightness.
    assert suspects[generated].mean() > 0.9
    assert suspects.mean() < 0.08


@pytest.mark.parametrize("seed", range(6))
def test_little_of_plain_tissue_is_suspected(seed: int) -> None:
    # The drawn speckle is grainier than any scanner's, and grain is what is mistaken for marks.
    assert suspect_mask(tissue(seed)).mean() < 0.025


def test_it_holds_all_that_the_strict_search_finds_and_colour() -> None:
    image = Image.fromarray(tissue() // 2)
    ImageDraw.Draw(image).text((120, 330), "RT AXILLA 10H", fill=235, font_size=18)
    pixels = np.asarray(image)
    coloured = np.zeros(pixels.shape, dtype=np.bool_)
    coloured[200:210, 100:130] = True
    suspects = suspect_mask(pixels, coloured)
    assert suspects[find_overlays(pixels).mask].all()
    assert suspects[coloured].all()


def test_the_mask_is_a_function_of_the_pixels() -> None:
    pixels = tissue()
    np.testing.assert_array_equal(suspect_mask(pixels), suspect_mask(pixels.copy()))


@pytest.mark.parametrize("shape", [(32, 32), (33, 200), (200, 35)])
def test_small_and_flat_images_are_no_problem(shape: tuple[int, int]) -> None:
    assert not suspect_mask(np.zeros(shape, dtype=np.uint8)).any()
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    assert suspect_mask(noise).shape == shape


def test_a_prepared_folder_holds_clean_images(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    images, clean, suspects = prepared.images, prepared.clean, prepared.suspects
    assert (suspects | ~np.asarray(prepared.overlays)).all()
    # Letterboxing antialiases over little more than one pixel, and two pixels around each mark are replaced anyway.
    changed = np.asarray(images) != np.asarray(clean)
    near = suspects | np.roll(suspects, 1, 1) | np.roll(suspects, -1, 1)
    near |= np.roll(near, 1, 2) | np.roll(near, -1, 2)
    assert not (changed & ~near).any()
    # Where text was, the clean image is no more conspicuous than tissue: the search that found it finds less.
    text = [row for row, found in enumerate(prepared.table["overlay_text"]) if found][:20]
    assert text
    before, after = (sum(find_overlays(np.array(array[row])).mask.sum() for row in text) for array in (images, clean))
    assert after < 0.2 * before
