"""What replaces an overlay looks like the speckle around it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from busigen.data.inpainting import without_overlays
from busigen.data.overlays import suspect_mask
from tests.harness.synthetic_datasets import draw_frame


def _speckle(seed: int = 0, shape: tuple[int, int] = (200, 240)) -> np.ndarray:
    rng = np.random.default_rng(seed)
    grain = ndimage.gaussian_filter(rng.rayleigh(1.0, shape), (0.7, 1.3))
    slope = np.linspace(140, 60, shape[0])[:, None]
    return np.clip(slope * (0.4 + 0.6 * grain / grain.mean()), 0, 255).astype(np.uint8)


def _gap(shape: tuple[int, int], rows: slice, columns: slice) -> np.ndarray:
    gap = np.zeros(shape, dtype=np.bool_)
    gap[rows, columns] = True
    return gap


GAPS = {
    "caliper": (slice(90, 106), slice(110, 126)),
    "line of text": (slice(120, 142), slice(40, 200)),
    "side bar": (slice(20, 160), slice(222, 240)),
    "corner": (slice(0, 22), slice(0, 22)),
}


@pytest.mark.parametrize("gap", GAPS.values(), ids=GAPS)
def test_the_patch_has_the_level_and_the_grain_of_its_surroundings(gap: tuple[slice, slice]) -> None:
    original = _speckle()
    suspect = _gap(original.shape, *gap)
    painted = np.where(suspect, 255, original).astype(np.uint8)
    clean = without_overlays(painted, suspect)
    np.testing.assert_array_equal(clean[~suspect], original[~suspect])
    patch, truth = clean[suspect].astype(float), original[suspect].astype(float)
    # Level within a tenth of the range that is 60 to 140 here; a smooth blob's grain would be a few per cent of it.
    assert abs(patch.mean() - truth.mean()) < 8
    fine = [part.astype(float) - ndimage.gaussian_filter(part.astype(float), 2.0) for part in (clean, original)]
    assert 0.7 < fine[0][suspect].std() / fine[1][suspect].std() < 1.3


def test_texture_is_never_taken_from_another_overlay() -> None:
    original = _speckle(1)
    suspect = _gap(original.shape, slice(90, 110), slice(100, 120))
    suspect |= _gap(original.shape, slice(40, 160), slice(125, 150)) | _gap(
        original.shape, slice(40, 160), slice(60, 95)
    )
    painted = np.where(suspect, np.where(np.indices(suspect.shape).sum(axis=0) % 2, 255, 0), original).astype(np.uint8)
    other = np.where(suspect, 128, original).astype(np.uint8)
    # What lies under the marks plays no part at all.
    np.testing.assert_array_equal(without_overlays(painted, suspect), without_overlays(other, suspect))


@pytest.mark.parametrize("seed", range(4))
def test_an_image_without_overlays_hardly_changes(seed: int) -> None:
    pixels = draw_frame(np.random.default_rng(seed), (420, 380), "benign").pixels
    clean = without_overlays(pixels, suspect_mask(pixels))
    # Drawn speckle is grainier than any scanner's; a fifth of its range is what two of its grains differ by.
    assert (clean != pixels).mean() < 0.025
    assert np.abs(clean.astype(int) - pixels).mean() < 1


def test_nothing_suspected_changes_nothing_and_everything_suspected_cannot_be_helped() -> None:
    pixels = _speckle()
    for suspect in (np.zeros(pixels.shape, dtype=np.bool_), np.ones(pixels.shape, dtype=np.bool_)):
        clean = without_overlays(pixels, suspect)
        np.testing.assert_array_equal(clean, pixels)
        assert clean is not pixels


def test_the_same_input_gives_the_same_bytes() -> None:
    pixels = _speckle(2)
    suspect = _gap(pixels.shape, slice(50, 70), slice(30, 200))
    np.testing.assert_array_equal(without_overlays(pixels, suspect), without_overlays(pixels.copy(), suspect.copy()))


@pytest.mark.parametrize("shape", [(32, 33), (33, 32), (35, 64)])
def test_odd_sizes_and_marks_on_the_border_are_filled(shape: tuple[int, int]) -> None:
    pixels = _speckle(3, shape)
    suspect = np.ones(shape, dtype=np.bool_)
    suspect[10:20, 10:20] = False
    clean = without_overlays(np.where(suspect, 255, pixels).astype(np.uint8), suspect)
    assert clean.max() < 255 or pixels[10:20, 10:20].max() == 255


def test_other_types_and_shapes_are_refused() -> None:
    pixels = _speckle()
    with pytest.raises(ValueError, match="float32"):
        without_overlays(pixels.astype(np.float32), pixels > 0)
    with pytest.raises(ValueError, match="bool"):
        without_overlays(pixels, np.zeros((3, 3), dtype=np.bool_))
