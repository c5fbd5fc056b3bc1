"""Filters that make synthetic images as sharp, or as blurred, as one scanner or another would."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from busigen.mtf import (
    FEWEST_TILES,
    KNOTS,
    LARGEST_GAIN,
    RADIUS,
    TILE,
    Transfer,
    apply_to_pair,
    detail,
    kernels,
    passed,
)
from busigen.noise_styles import LIMIT

LENGTH = 2 * len(KNOTS)
EVERYWHERE = np.ones((256, 256), dtype=bool)


def grains(seed: int = 0) -> NDArray[np.uint8]:
    """White noise about grey: every frequency is there."""
    return np.random.default_rng(seed).normal(128, 20, (256, 256)).clip(0, 255).astype(np.uint8)


def measured(image: NDArray[np.uint8]) -> NDArray[Any]:
    found = detail(image, EVERYWHERE)
    assert found is not None
    return found


def test_gains_of_one_change_nothing() -> None:
    assert np.array_equal(passed(grains(), kernels(np.zeros(LENGTH))), grains())


@pytest.mark.parametrize("axis", [0, 1])
def test_an_axis_gets_the_gains_that_are_asked_for_and_the_other_keeps_its_own(axis: int) -> None:
    gains = np.zeros((2, len(KNOTS)))
    gains[axis] = np.linspace(-0.1, -0.7, len(KNOTS))
    change = (measured(passed(grains(), kernels(gains.ravel()))) - measured(grains())).reshape(2, -1)
    # A filter of 21 pixels blurs its gains over a twentieth of a cycle per pixel, and rounding adds some detail.
    np.testing.assert_allclose(change[axis], gains[axis], atol=0.08)
    np.testing.assert_allclose(change[1 - axis], 0.0, atol=0.03)


@pytest.mark.parametrize("gain", [-1.0, 1.0])
def test_brightness_passes_as_it_is(gain: float) -> None:
    filters = kernels(np.full(LENGTH, gain))
    assert all(taps.sum() == pytest.approx(1.0) for taps in filters)
    flat = np.full((256, 256), 77, dtype=np.uint8)
    assert np.array_equal(passed(flat, filters), flat)


def test_outside_the_edit_region_a_pair_shows_its_background_and_bars_stay_black() -> None:
    valid = np.zeros_like(EVERYWHERE)
    valid[:, 30:226] = True
    edit = np.zeros_like(EVERYWHERE)
    edit[5:90, 34:120] = True
    background = np.where(valid, grains(0), 0).astype(np.uint8)
    image = np.where(edit, grains(1), background).astype(np.uint8)
    filters = kernels(np.linspace(-0.6, 0.3, LENGTH))
    result = apply_to_pair(image, background, edit, valid, filters)
    assert not result[~valid].any()
    outside = valid & ~edit
    assert np.array_equal(result[outside], apply_to_pair(background, background, edit, valid, filters)[outside])
    # Near the frame's border a filter sees the frame's mirror image and no bar.
    assert np.array_equal(result[edit], passed(image[:, 30:226], filters)[edit[:, 30:226]])


def test_too_little_tissue_says_nothing() -> None:
    usable = np.zeros_like(EVERYWHERE)
    usable[:TILE, : TILE + (FEWEST_TILES - 2) * TILE // 2] = True
    assert detail(grains(), usable) is None
    assert detail(np.zeros((256, 256), np.uint8), EVERYWHERE) is None


def test_a_record_is_read_as_it_was_written() -> None:
    written = Transfer(np.linspace(-1, 1, LENGTH), np.random.default_rng(0).normal(0, 0.3, (LENGTH, 3)))
    read = Transfer.from_json(written.to_json())
    # Numbers are written with four decimals.
    np.testing.assert_allclose(read.mean, written.mean, atol=1e-4)
    np.testing.assert_allclose(read.factor, written.factor, atol=1e-4)


def test_rare_normals_are_clipped() -> None:
    transfer = Transfer(np.zeros(LENGTH), np.full((LENGTH, 1), 0.2))
    far, at_limit = transfer.kernels(np.array([40.0])), transfer.kernels(np.array([LIMIT]))
    assert all(np.array_equal(*pair) for pair in zip(far, at_limit, strict=True))
    assert len(far[0]) == 2 * RADIUS + 1


@pytest.mark.parametrize(
    "found",
    [
        [],
        {"mean": [0.0] * LENGTH},
        {"mean": [0.0] * LENGTH, "factor": [[0.1]] * LENGTH, "more": 1},
        {"mean": [0.0] * LENGTH, "factor": 0.1},
        {"mean": 0.0, "factor": [[0.1]] * LENGTH},
        {"mean": [0.0] * LENGTH, "factor": [0.1] * LENGTH},
        {"mean": [0.0] * (LENGTH - 1), "factor": [[0.1]] * LENGTH},
        {"mean": [0.0] * LENGTH, "factor": [[0.1]] * (LENGTH - 1)},
        {"mean": [0.0] * LENGTH, "factor": [[]] * LENGTH},
        {"mean": [0.0] * LENGTH, "factor": [[0.1]] * (LENGTH - 1) + [[0.1, 0.2]]},
        {"mean": [0.0] * LENGTH, "factor": [[0.1] * (LENGTH + 1)] * LENGTH},
        {"mean": [2 * LARGEST_GAIN] * LENGTH, "factor": [[0.1]] * LENGTH},
        {"mean": [float("nan")] * LENGTH, "factor": [[0.1]] * LENGTH},
        {"mean": ["0"] * LENGTH, "factor": [[0.1]] * LENGTH},
        {"mean": [True] * LENGTH, "factor": [[0.1]] * LENGTH},
    ],
)
def test_a_record_with_anything_else_is_refused(found: Any) -> None:
    with pytest.raises(ValueError, match=r"mean|number"):
        Transfer.from_json(found)
