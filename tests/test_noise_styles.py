"""Styles: what a whole image's detail varies by, put into the prior's noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.fft import dctn

from busigen.noise_styles import EDGES, LARGEST_FACTOR, LIMIT, are_styles, fitted, powers, styled

CHANNELS, CELLS = 2, 32
ROWS = CHANNELS * len(EDGES)


def noise(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, CHANNELS, CELLS, CELLS), np.float32)


def coefficients(latents: NDArray[np.float32]) -> NDArray[np.float32]:
    return dctn(latents, axes=(2, 3), norm="ortho")


def test_a_style_scales_its_channel_and_band_and_nothing_else() -> None:
    factor = np.zeros((ROWS, 1))
    factor[len(EDGES) + 1] = 0.5
    plain = noise(3)
    found = styled(plain, factor, np.array([[1.0], [-2.0], [10.0]]))
    change = powers(coefficients(found)) - powers(coefficients(plain))
    expected = np.zeros_like(change)
    # The third is clipped.
    expected[:, 1, 1] = 0.5 * np.array([1.0, -2.0, LIMIT])
    # Rounding to fp32 of a thousand numbers of about 1.
    np.testing.assert_allclose(change, expected, atol=1e-5)
    np.testing.assert_allclose(found.mean(axis=(2, 3)), plain.mean(axis=(2, 3)), atol=1e-6)


def test_an_image_is_styled_alike_in_any_batch() -> None:
    factor = np.random.default_rng(1).normal(0, 0.2, (ROWS, 3))
    generated = np.random.default_rng(2).standard_normal((5, 3))
    together = styled(noise(5), factor, generated)
    for k in range(5):
        assert np.array_equal(styled(noise(5)[k : k + 1], factor, generated[k : k + 1])[0], together[k])


def test_what_real_images_vary_by_and_drawn_ones_do_not_is_found_again() -> None:
    factor = np.random.default_rng(1).normal(0, 0.3, (ROWS, 2))
    generated = np.random.default_rng(2).standard_normal((1500, 2))
    real = powers(coefficients(styled(noise(1500), factor, generated)))
    found = fitted(real, powers(coefficients(noise(1500, seed=3))))
    missing, wanted = found[:, :2] @ found[:, :2].T, factor @ factor.T
    # Clipping takes 3 % of the variance, and a covariance of 1,500 is known to about 4 % of its largest entry.
    assert np.abs(missing - wanted).max() < 0.12 * wanted.max()


@pytest.mark.parametrize(
    "found",
    [
        None,
        [],
        [[0.1]] * (ROWS - 1),
        [[0.1]] * (ROWS - 1) + [[0.1, 0.2]],
        [[0.1] * (ROWS + 1)] * ROWS,
        [[2 * LARGEST_FACTOR]] * ROWS,
        [[float("nan")]] * ROWS,
        [["0.1"]] * ROWS,
        [0.1] * ROWS,
    ],
)
def test_a_record_with_anything_else_is_no_style(found: Any) -> None:
    assert are_styles([[0.1, -0.2]] * ROWS, CHANNELS)
    assert not are_styles(found, CHANNELS)
