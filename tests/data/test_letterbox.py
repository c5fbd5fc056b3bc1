"""Nothing is squashed, nothing moves, and no ring or bar is invented."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from busigen.data.letterbox import fit, letterbox, letterbox_coverage, letterbox_mask
from tests.conftest import Sources


@pytest.mark.parametrize(("width", "height"), [(1048, 400), (190, 719), (300, 300), (100, 60)])
def test_a_circle_stays_a_circle(width: int, height: int) -> None:
    y, x = np.mgrid[0:height, 0:width]
    circle = np.hypot(x - width / 2, y - height / 2) < 0.4 * min(width, height)
    _, box = letterbox(np.zeros((height, width), np.uint8))
    rows, columns = np.nonzero(letterbox_mask(circle, box))
    assert abs(np.ptp(rows) - np.ptp(columns)) <= 1


@settings(max_examples=60, deadline=None)
@given(width=st.integers(32, 1200), height=st.integers(32, 1200), x=st.floats(0.1, 0.9), y=st.floats(0.1, 0.9))
def test_scale_and_offset_lead_back_to_the_native_position(width: int, height: int, x: float, y: float) -> None:
    native = np.zeros((height, width), np.bool_)
    radius = max(3, 2 * max(width, height) // 256)
    row, column = int(y * height), int(x * width)
    native[max(row - radius, 0) : row + radius, max(column - radius, 0) : column + radius] = True
    box = fit(width, height)
    found = np.argwhere(letterbox_mask(native, box)).mean(axis=0) + 0.5
    expected = np.argwhere(native).mean(axis=0) + 0.5
    back = (found - (box.top, box.left)) / box.scale
    np.testing.assert_allclose(back, expected, atol=1.0 / box.scale + 0.5)


@settings(max_examples=60, deadline=None)
@given(width=st.integers(1, 3000), height=st.integers(1, 3000))
def test_the_image_is_centred_and_fills_one_side(width: int, height: int) -> None:
    box = fit(width, height)
    assert max(box.width, box.height) == 256
    assert abs(2 * box.left + box.width - 256) <= 1
    assert abs(2 * box.top + box.height - 256) <= 1
    assert box.valid.sum() == box.width * box.height


def test_bars_are_black_and_a_flat_image_stays_flat() -> None:
    frame, box = letterbox(np.full((200, 500), 180, np.uint8))
    assert (frame[box.valid] == 180).all()
    assert (frame[~box.valid] == 0).all()


def test_a_bright_line_gets_no_dark_ring() -> None:
    scene = np.full((600, 600), 100, np.uint8)
    scene[300:304] = 255
    assert letterbox(scene)[0].min() == 100, "a filter with negative weights would undershoot here"


@settings(max_examples=40, deadline=None)
@given(width=st.integers(32, 700), height=st.integers(32, 700), seed=st.integers(0, 99))
def test_coverage_keeps_the_area(width: int, height: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.3
    box = fit(width, height)
    covered = letterbox_coverage(mask, box).sum() / (box.width * box.height)
    assert covered == pytest.approx(mask.mean(), abs=1e-4)


def test_table_and_arrays_agree_about_where_the_image_lies(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    for row in prepared.table.iter_rows(named=True):
        box = fit(row["width"], row["height"])
        assert (row["left"], row["top"], row["inner_width"], row["inner_height"]) == (
            box.left,
            box.top,
            box.width,
            box.height,
        )
        outside = ~box.valid
        assert not prepared.images[row["row"]][outside].any()
        assert not prepared.masks[row["row"]][outside].any()


def test_lesions_keep_their_share_of_the_image(any_sources: Sources) -> None:
    prepared = any_sources.prepared
    for row in prepared.table.iter_rows(named=True):
        inner = row["inner_width"] * row["inner_height"]
        share = np.count_nonzero(prepared.masks[row["row"]]) / inner
        # An outline may gain or lose a small part of a pixel along its length, no more.
        assert share == pytest.approx(row["mask_area"], rel=0.03, abs=12 / inner)
