"""The fit of how sharp real images are and drawn ones are not."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from busigen.mtf import KNOTS, LARGEST_GAIN, Transfer, detail, kernels, passed
from busigen.training.tasks.autoencoder import FEWEST, Picture, fit_transfer

LENGTH = 2 * len(KNOTS)
COUNT, SIDE = 300, 96
USABLE = np.ones((SIDE, SIDE), dtype=bool)
BLUR = np.linspace(-0.05, -0.5, LENGTH)


def grains(count: int, seed: int) -> list[Picture]:
    rng = np.random.default_rng(seed)
    return [(rng.normal(128, 20, (SIDE, SIDE)).clip(0, 255).astype(np.uint8), USABLE) for _ in range(count)]


def filtered(pictures: list[Picture], transfer: Transfer, seed: int) -> list[Picture]:
    rng = np.random.default_rng(seed)
    normals = rng.standard_normal((len(pictures), transfer.factor.shape[1]))
    return [(passed(image, transfer.kernels(row)), USABLE) for (image, _), row in zip(pictures, normals, strict=True)]


def measured(pictures: list[Picture]) -> NDArray[np.float64]:
    return np.array([detail(*picture) for picture in pictures])


def test_drawn_images_come_out_as_sharp_as_real_ones_and_as_different() -> None:
    wanted = Transfer(BLUR, np.outer(np.repeat([1.0, -1.0], len(KNOTS)), [0.15]))
    real, generated = filtered(grains(COUNT, 0), wanted, 1), grains(COUNT, 2)
    fitted = fit_transfer(real, generated, seed=3)
    assert fitted is not None
    found, aim, before = (measured(part) for part in (filtered(generated, fitted, 4), real, generated))
    # The mean of 300 images that differ by 0.15 is known to 0.009; these were 0.05 to 0.5 apart.
    np.testing.assert_allclose(found.mean(axis=0), aim.mean(axis=0), atol=0.04)
    # Deviations of 0.06 to 0.11: a filter of 21 pixels follows the lowest frequencies only in part. Before, up to 0.05.
    np.testing.assert_allclose(found.std(axis=0), aim.std(axis=0), atol=0.02)
    assert (before.std(axis=0) < aim.std(axis=0) - 0.02).all()


def test_images_that_lack_nothing_or_are_few_get_no_filter() -> None:
    varied = filtered(grains(FEWEST, 0), Transfer(BLUR, np.full((LENGTH, 1), 0.2)), 1)
    assert fit_transfer(varied[:-1], grains(FEWEST, 2), seed=0) is None
    assert fit_transfer(varied, grains(FEWEST - 1, 2), seed=0) is None


def speckle(seed: int, axial: float, lateral: float) -> Picture:
    """Speckle of some width in pixels along each axis."""
    rng = np.random.default_rng(seed)
    parts = (ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), (axial, lateral)) for _ in range(2))
    found = np.hypot(*parts)
    return np.clip(90 * (0.4 + 0.6 * found / found.mean()), 0, 255).astype(np.uint8), USABLE


def test_what_real_images_lack_altogether_is_filtered_as_far_as_a_bundle_may_say(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Real images with speckle four pixels wide, as of a smooth set, and a decoder that has hardly been trained."""
    real = [speckle(k, 0.8 * (1 + 0.2 * (k % 3)), 4.0 * (1 + 0.1 * (k % 4))) for k in range(FEWEST)]
    generated = [speckle(1000 + k, 0.7, 0.9 + 0.02 * (k % 3)) for k in range(FEWEST)]
    fitted = fit_transfer(real, generated, seed=0)
    assert fitted is not None
    # The axial gains are moderate, and stay as they are beside lateral ones that are not.
    assert np.abs(fitted.mean[: len(KNOTS)]).max() < 1
    assert fitted.mean.min() == -LARGEST_GAIN
    read = Transfer.from_json(fitted.to_json())
    np.testing.assert_allclose(read.mean, fitted.mean, atol=1e-4)
    assert f"fitted numbers are clipped to {LARGEST_GAIN:g}" in caplog.text


def test_bars_around_a_drawn_image_do_not_count() -> None:
    blurred = [(passed(image, kernels(BLUR)), usable) for image, usable in grains(FEWEST, 5)]
    real = filtered(blurred, Transfer(np.zeros(LENGTH), np.full((LENGTH, 1), 0.1)), 6)
    barred = [(np.pad(image, 20), np.pad(usable, 20)) for image, usable in grains(FEWEST, 7)]
    with_bars, without = (fit_transfer(real, generated, seed=8) for generated in (barred, grains(FEWEST, 7)))
    assert with_bars is not None
    assert without is not None
    # Tiles begin elsewhere; the step to a bar would be a gain of more than 1.
    np.testing.assert_allclose(with_bars.mean, without.mean, atol=0.1)
