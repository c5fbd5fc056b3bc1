"""The figures of the parity proof, against scikit-image and against cases that can be told by hand."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from busigen.export.parity import MAX_PSNR, boundary_distance, dice, pixels_off, psnr, relative_error, ssim


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (64, 48)).astype(np.uint8)
    return image, np.clip(image + rng.normal(0, 20, image.shape), 0, 255).astype(np.uint8)


def test_images_are_compared_as_scikit_image_compares_them(pair: tuple[np.ndarray, np.ndarray]) -> None:
    image, other = pair
    everywhere = np.ones(image.shape, dtype=bool)
    assert psnr(image, other, everywhere) == pytest.approx(peak_signal_noise_ratio(image, other), abs=1e-9)
    theirs = structural_similarity(
        image, other, gaussian_weights=True, use_sample_covariance=False, data_range=255, full=True
    )[1]
    inside = np.zeros_like(everywhere)
    inside[10:-10, 10:-10] = True
    # Their window ends after eleven pixels as ours does; they differ only in how they continue the image at its edge.
    assert ssim(image, other, inside) == pytest.approx(float(theirs[inside].mean()), abs=1e-6)
    assert psnr(image, image, everywhere) == MAX_PSNR
    assert ssim(image, image, everywhere) == pytest.approx(1.0)


def test_a_shifted_mask_is_as_far_as_it_was_shifted() -> None:
    mask = np.zeros((80, 80), dtype=bool)
    mask[20:50, 20:50] = True
    assert boundary_distance(mask, mask) == 0.0 and dice(mask, mask) == 1.0
    assert boundary_distance(mask, np.roll(mask, 3, axis=0)) == pytest.approx(3.0)
    assert dice(mask, np.roll(mask, 3, axis=0)) == pytest.approx(0.9)
    assert boundary_distance(mask, np.zeros_like(mask)) == float("inf")
    assert boundary_distance(np.zeros_like(mask), np.zeros_like(mask)) == 0.0


def test_the_worst_row_counts_and_nan_is_no_agreement() -> None:
    expected = np.ones((3, 4), dtype=np.float32)
    found = expected.copy()
    found[1] *= 1.1
    assert relative_error(found, expected) == pytest.approx(0.1, rel=1e-5)
    found[2, 0] = np.nan
    assert relative_error(found, expected) == pixels_off(found, expected) == float("inf")


def test_distances_count_near_the_outline_alone() -> None:
    expected = np.array([[-40.0, -2.0, 3.0]])
    assert pixels_off(expected + np.array([[9.0, 0.0, 0.0]]), expected) == 0.0
    assert pixels_off(expected + np.array([[0.0, 0.3, 0.4]]), expected) == pytest.approx(np.sqrt(0.125))
