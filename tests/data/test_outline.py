"""What an outline's numbers mean, checked on shapes whose numbers are known."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from busigen.data.outline import attributes, canonical_field, grid_positions
from busigen.registry import FIELD_EDGE, FIELD_LIMIT

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
