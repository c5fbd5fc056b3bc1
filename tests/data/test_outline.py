"""What an outline's numbers mean, checked on shapes whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from skimage import measure

from busigen.data.geometry import attributes, canonical_field, circularity, grid_positions, largest_component, solidity
from busigen.registry import FIELD_EDGE, FIELD_LIMIT
from tests.conftest import Sources

ROWS, COLUMNS = np.mgrid[0:256, 0:256] + 0.5


def ellipse(down: float, across: float, height: float, width: float) -> NDArray[np.bool_]:
    return ((ROWS - down) / height) ** 2 + ((COLUMNS - across) / width) ** 2 <= 1


def test_the_attributes_of_a_rectangle_are_its_own() -> None:
    mask = np.zeros((256, 256), dtype=bool)
    mask[100:120, 30:70] = True
    np.testing.assert_allclose(attributes(mask), [50 / 256, 110 / 256, 0.5 * np.log(800), np.log(0.5)])


@pytest.mark.parametrize("size", [(14, 9), (30, 30), (25, 60), (70, 20)])
def test_all_ellipses_are_one_circle_in_their_own_frame(size: tuple[float, float]) -> None:
    grid = 48
    field = canonical_field(ellipse(120.3, 130.8, *size), grid)
    at = grid_positions(grid)
    wanted = 1 / np.sqrt(np.pi) - np.hypot(at[:, None], at[None])
    near = np.abs(wanted) < FIELD_LIMIT - 0.05
    # A pixel of the smallest ellipse is 0.05 of the frame's unit, and bounding boxes are whole pixels.
    assert np.abs(field - wanted)[near].max() < 0.06
    assert field.min() == pytest.approx(-FIELD_LIMIT)
    assert np.abs(at).max() < FIELD_EDGE


def test_a_disc_has_circularity_and_solidity_one() -> None:
    disc = ellipse(128.0, 128.0, 40.0, 40.0)
    assert circularity(disc) == pytest.approx(1.0, abs=0.03)
    assert solidity(disc) == pytest.approx(1.0, abs=0.03)


def test_a_cross_is_neither_round_nor_solid() -> None:
    cross = np.zeros((256, 256), dtype=bool)
    cross[100:160, 120:140] = cross[120:140, 100:160] = True
    area, perimeter, hull = 2000.0, 240.0, 60.0**2 - 4 * 0.5 * 20.0**2
    # Lines along the pixels' rows and columns come out 5 % too short with four directions, and corners are cut.
    assert circularity(cross) == pytest.approx(4 * np.pi * area / perimeter**2, rel=0.16)
    assert solidity(cross) == pytest.approx(area / hull, rel=0.01)


def test_the_two_agree_with_scikit_image(any_sources: Sources) -> None:
    for mask in any_sources.prepared.masks[:60]:
        part = largest_component(mask > 0)
        if part.sum() < 100:
            continue
        properties = measure.regionprops(part.astype(np.uint8))[0]
        perimeter = measure.perimeter_crofton(part, directions=4)
        assert circularity(part) == pytest.approx(4 * np.pi * part.sum() / perimeter**2, rel=0.02)
        # Theirs takes the hull of the pixels' middles on each side, ours that of their corners.
        assert solidity(part) == pytest.approx(properties.solidity, abs=0.04)
