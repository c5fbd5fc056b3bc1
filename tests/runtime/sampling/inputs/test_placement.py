"""A user's mask in the working frame: letterboxed and no more, or moved within bounds and always in the image."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from busigen.data.letterbox import fit, letterbox_mask
from busigen.runtime.sampling.inputs.placement import Placement, moved_inside, place

SHAPES = ((256, 256), (310, 190), (719, 1048), (40, 33), (90, 400))


def blob(shape: tuple[int, int], across: float = 0.5, down: float = 0.5) -> NDArray[np.bool_]:
    """An ellipse, with a notch on its right side that tells it from its mirror image."""
    height, width = shape
    y, x = np.mgrid[0:height, 0:width]
    inside = np.hypot((x + 0.5) / width - across, ((y + 0.5) / height - down) * 1.3) < 0.15
    return inside & ~((x > across * width) & (abs(y - down * height) < height / 40))


def extent(mask: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1


@pytest.mark.parametrize("shape", SHAPES)
def test_without_jitter_a_mask_is_letterboxed_as_its_image_is(shape: tuple[int, int]) -> None:
    native, box = blob(shape), fit(width=shape[1], height=shape[0])
    found = place(native)
    assert found == Placement.letterboxed(shape) == moved_inside(found, native, box.valid)
    assert np.array_equal(found.apply(native), letterbox_mask(native, box))


@pytest.mark.parametrize("shape", SHAPES)
def test_jitter_moves_scales_and_mirrors_within_its_bounds(shape: tuple[int, int]) -> None:
    native, box = blob(shape), fit(width=shape[1], height=shape[0])
    plain = letterbox_mask(native, box)
    mirrored = letterbox_mask(np.ascontiguousarray(native[:, ::-1]), box)
    assert np.array_equal(place(native, 0.2, (0.5, 0.5, 0.5, 0.0)).apply(native), mirrored)
    for draws in ((0.0, 0.0, 0.0, 0.9), (0.99, 0.99, 0.99, 0.9), (0.2, 0.7, 0.9, 0.1)):
        found = place(native, 0.2, draws)
        mask, scale = found.apply(native), 1 + 0.2 * (2 * draws[2] - 1)
        assert found.scale == pytest.approx(box.scale * scale)
        # Rows and columns of whole pixels: a few of an outline's come and go with its place on the grid.
        assert mask.sum() == pytest.approx(plain.sum() * scale**2, rel=0.08, abs=20)
        before, after = extent(mirrored if found.mirrored else plain), extent(mask)
        middles = [(after[k] + after[k + 1] - before[k] - before[k + 1]) / 2 for k in (0, 2)]
        wanted = 0.2 * (2 * draws[1] - 1) * box.height, 0.2 * (2 * draws[0] - 1) * box.width
        assert middles == pytest.approx(wanted, abs=1.5)


def test_a_mask_beyond_the_image_is_moved_into_it_by_as_little_as_it_takes() -> None:
    native = blob((300, 300), across=0.25)
    box = fit(width=160, height=256)
    found = moved_inside(place(native), native, box.valid)
    before, after = extent(Placement.letterboxed(native.shape).apply(native)), extent(found.apply(native))
    assert before[2] < box.left == after[2]
    assert after[3] - after[2] == before[3] - before[2]
    assert after[:2] == before[:2], "nothing had to be moved down"
    assert not (found.apply(native) & ~box.valid).any()
    assert found.apply(native).sum() == found.shape(native).sum()


def test_a_mask_that_the_image_cannot_hold_stays_cut() -> None:
    native = np.ones((100, 100), dtype=bool)
    valid = fit(width=100, height=256).valid
    found = moved_inside(place(native), native, valid)
    assert found.apply(native).sum() > (found.apply(native) & valid).sum()


def test_what_a_manifest_says_gives_the_same_mask_and_nonsense_gives_none() -> None:
    native = blob((310, 190))
    found = place(native, 0.3, (0.1, 0.8, 0.7, 0.2))
    row = {
        "given_mask_scale": found.scale,
        "given_mask_left": found.left,
        "given_mask_top": found.top,
        "given_mask_mirrored": found.mirrored,
    }
    assert Placement.recorded(row) == found
    for name, value in (
        ("scale", 1e9),
        ("scale", 0.0),
        ("scale", None),
        ("left", 10**12),
        ("top", "3"),
        ("left", True),
    ):
        assert Placement.recorded({**row, f"given_mask_{name}": value}) is None
