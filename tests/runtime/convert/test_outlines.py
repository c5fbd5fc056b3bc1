"""Polygons and run lengths hold exactly the pixels of their mask."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import ndimage

from busigen.runtime.convert.formats.coco import run_lengths
from busigen.runtime.convert.outlines import polygon, polygons

Mask = NDArray[np.bool_]


def filled(points: list[tuple[float, float]]) -> Mask:
    """The pixels whose centre lies in a polygon, by the even-odd rule: edges crossed to the left of it are counted."""
    grid = np.arange(256) + 0.5
    crossings = np.zeros((256, 256), dtype=np.int64)
    for (x0, y0), (x1, y1) in zip(points, [*points[1:], points[0]], strict=True):
        if y0 != y1:
            rows = (grid > min(y0, y1)) & (grid < max(y0, y1))
            at = x0 + (grid[rows] - y0) / (y1 - y0) * (x1 - x0)
            crossings[rows] += grid[None, :] > at[:, None]
    return crossings % 2 == 1


def _masks() -> dict[str, Mask]:
    rows, columns = np.mgrid[0:256, 0:256]
    disc = np.hypot(rows - 120, columns - 90) < 40
    corner, pixel, diagonal = np.zeros((3, 256, 256), dtype=np.bool_)
    corner[:30, 200:] = True
    pixel[100, 7] = True
    diagonal[10:12, 10:12] = np.eye(2)
    noise = ndimage.gaussian_filter(np.random.default_rng(5).normal(size=(256, 256)), 3) > 0.02
    return {
        "disc": disc,
        "ring": disc & (np.hypot(rows - 120, columns - 90) > 12),
        "two parts": disc | corner,
        "at the corner": corner,
        "one pixel": pixel,
        "touching at a corner": diagonal,
        "everything": np.ones((256, 256), dtype=np.bool_),
        "many parts and holes": noise,
    }


@pytest.mark.parametrize("name", _masks())
def test_a_polygon_holds_the_masks_pixels_and_no_others(name: str) -> None:
    mask = _masks()[name]
    np.testing.assert_array_equal(filled(polygon(mask)), mask)
    parts = [filled(part) for part in polygons(mask)]
    np.testing.assert_array_equal(np.sum(parts, axis=0), mask)  # No pixel is in two of them.


def test_straight_edges_have_no_corners_in_between() -> None:
    square = np.zeros((256, 256), dtype=np.bool_)
    square[3:9, 2:12] = True
    assert sorted(polygon(square)) == [(2, 3), (2, 9), (12, 3), (12, 9)]
    assert polygon(np.zeros((256, 256), dtype=np.bool_)) == []


@pytest.mark.parametrize("name", _masks())
def test_pycocotools_reads_both_as_the_mask(name: str) -> None:
    coder = pytest.importorskip("pycocotools.mask")
    mask = _masks()[name]
    runs = coder.frPyObjects({"size": [256, 256], "counts": run_lengths(mask)}, 256, 256)
    np.testing.assert_array_equal(coder.decode(runs), mask)
    parts = coder.frPyObjects([[n for point in part for n in point] for part in polygons(mask)], 256, 256)
    np.testing.assert_array_equal(coder.decode(coder.merge(parts)), mask)
