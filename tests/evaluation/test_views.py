import numpy as np
import pytest

from busigen.evaluation.realness.classifiers import BAND, VIEWS, lesion, ring, whole
from tests.harness.synthetic_sets import BAR, synthetic_set

Y, X = np.mgrid[:256, :256]
FULL = np.ones((256, 256), np.bool_)


def _ellipse(y, x, high, wide):
    return ((Y - y) / high) ** 2 + ((X - x) / wide) ** 2 < 1


@pytest.mark.parametrize("mask", [_ellipse(120, 130, 30, 55), _ellipse(120, 130, 24, 24)])
def test_the_ring_shows_the_inside_above_and_the_outside_below(mask):
    strip = ring(np.where(mask, 200, 50).astype(np.uint8), mask, FULL)
    assert strip.shape == (2 * BAND, 256)
    # Two rows on either side of the edge are left to interpolation and to the outline's jags.
    assert (strip[: BAND - 2] == 200).all()
    assert (strip[BAND + 2 :] == 50).all()


def test_the_ring_sees_nothing_beyond_its_band():
    mask = _ellipse(120, 130, 40, 60)
    near = _ellipse(120, 130, 40 + BAND + 3, 60 + BAND + 3) & ~_ellipse(120, 130, 40 - BAND - 3, 60 - BAND - 3)
    grey = np.random.default_rng(0).integers(0, 255, (256, 256)).astype(np.uint8)
    assert np.array_equal(ring(grey, mask, FULL), ring(np.where(near, grey, 0).astype(np.uint8), mask, FULL))


@pytest.mark.parametrize("name", list(VIEWS))
def test_letterbox_bars_are_never_seen(name):
    images = synthetic_set(4, 0)
    before = VIEWS[name].of(images)
    images.images[~images.valid] = 255
    assert np.array_equal(before, VIEWS[name].of(images))


def test_a_lesion_at_the_border_is_cropped_inside_the_image():
    mask = _ellipse(BAR + 3, 5, 20, 30) & (Y >= BAR)
    valid = (Y >= BAR) & (Y < 256 - BAR)
    crop = lesion(np.where(valid, 100, 0).astype(np.uint8), mask, valid)
    assert crop.shape == (128, 128)
    assert (crop == 100).all()


def test_only_the_largest_part_counts():
    grey = np.random.default_rng(0).integers(0, 255, (256, 256)).astype(np.uint8)
    large = _ellipse(120, 80, 30, 40)
    for view in (lesion, ring):
        assert np.array_equal(view(grey, large, FULL), view(grey, large | _ellipse(200, 220, 5, 5), FULL))


def test_whole_images_are_never_squashed():
    valid = (Y >= 60) & (Y < 196)
    disc = np.where(_ellipse(128, 128, 40, 40), 200, 10).astype(np.uint8)
    seen = whole(disc, FULL, valid) > 100
    high, wide = (np.flatnonzero(seen.any(axis=axis)) for axis in (1, 0))
    assert abs(len(high) - len(wide)) <= 1
