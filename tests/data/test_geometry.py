"""What may be repainted: checked against whole-image brute force, and pixel by pixel where a promise hangs on it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import (
    FEATHER_WIDTH,
    MARGIN_RANGE,
    MARGIN_SHARE,
    RING_WIDTH,
    SHADOW_RANGE,
    SHADOW_SHARE,
    Window,
    edit_region,
    feather,
    largest_component,
    paste,
    patches_outside,
    ring_region,
    window_for,
)
from busigen.data.letterbox import fit
from busigen.registry import BUCKET_CONTEXT, BUCKETS, GRAIN_FADE, RESOLUTION

ROWS, COLUMNS = np.mgrid[0:RESOLUTION, 0:RESOLUTION]
EVERYWHERE = np.ones((RESOLUTION, RESOLUTION), dtype=bool)
NOWHERE = ~EVERYWHERE

Mask = NDArray[np.bool_]


def ellipse(row: float, column: float, height: float, width: float) -> Mask:
    """Half axes ``height`` and ``width``."""
    return ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 <= 1


@st.composite
def ellipses(draw: st.DrawFn) -> Mask:
    """Lesions anywhere, also cut by the image's border."""
    row, column = draw(st.integers(0, 255)), draw(st.integers(0, 255))
    return ellipse(row, column, draw(st.floats(1, 90)), draw(st.floats(1, 90)))


@st.composite
def frames(draw: st.DrawFn) -> Mask:
    """Valid pixels of letterboxed images."""
    return fit(draw(st.integers(40, 400)), draw(st.integers(40, 400))).valid


def distance_to(mask: Mask) -> NDArray[np.float64]:
    """Distance of every pixel to the nearest pixel of ``mask``, over the whole image."""
    return ndimage.distance_transform_edt(~mask)


def brute_force_edit_region(mask: Mask, valid: Mask) -> Mask:
    """The documented region, column by column and without a bounding box."""
    margin = np.clip(MARGIN_SHARE * 2 * np.sqrt(mask.sum() / np.pi), *MARGIN_RANGE)
    rows = np.flatnonzero(mask.any(axis=1))
    shadow = round(float(np.clip(SHADOW_SHARE * (rows[-1] - rows[0] + 1), *SHADOW_RANGE)))
    seed = mask.copy()
    for column in np.flatnonzero(mask.any(axis=0)):
        bottom = np.flatnonzero(mask[:, column])[-1]
        seed[bottom : bottom + shadow + 1, column] = True
    return (distance_to(seed) <= margin) & valid


@settings(max_examples=40, deadline=None)
@given(mask=ellipses(), valid=frames())
def test_edit_region_equals_the_whole_image_computation(mask: Mask, valid: Mask) -> None:
    mask = mask & valid
    edit = edit_region(mask, valid)
    if not mask.any():
        assert not edit.any()
        return
    assert np.array_equal(edit, brute_force_edit_region(mask, valid))
    assert not (mask & ~edit).any()
    assert not (edit & ~valid).any()


def test_edit_region_of_nothing_is_nothing() -> None:
    assert not edit_region(NOWHERE, EVERYWHERE).any()


def margins(mask: Mask) -> tuple[int, int, int, int]:
    """Pixels of the edit region above, below, left and right of the lesion."""
    edit = edit_region(mask, EVERYWHERE)
    found = []
    for axis in (1, 0):
        inner, outer = np.flatnonzero(mask.any(axis=axis)), np.flatnonzero(edit.any(axis=axis))
        found += [int(inner[0] - outer[0]), int(outer[-1] - inner[-1])]
    return found[0], found[1], found[2], found[3]


def test_margin_grows_with_the_lesion_within_its_bounds() -> None:
    above = [margins(ellipse(100, 128, radius, radius))[0] for radius in (4, 12, 24, 36, 48, 56, 70)]
    assert above == sorted(above)
    assert (above[0], above[-1]) == MARGIN_RANGE
    assert len(set(above)) > 3


def test_room_below_the_lesion_follows_its_height() -> None:
    tall, flat = margins(ellipse(90, 128, 40, 15)), margins(ellipse(90, 128, 15, 40))
    for above, below, left, right in (tall, flat):
        assert left == right == above
        assert below > above + SHADOW_RANGE[0]
    assert tall[1] - tall[0] == round(SHADOW_SHARE * 81)
    assert flat[1] - flat[0] == round(SHADOW_SHARE * 31)


def test_training_may_vary_margin_and_room() -> None:
    mask = ellipse(100, 128, 20, 20)
    regions = [
        edit_region(mask, EVERYWHERE, margin_scale=m, shadow_scale=s) for m, s in ((0.5, 1), (1, 0.5), (1, 1), (2, 2))
    ]
    plain = regions[2]
    assert (regions[0] & plain).sum() == regions[0].sum() < plain.sum()
    assert (regions[1] & plain).sum() == regions[1].sum() < plain.sum()
    assert (regions[3] & plain).sum() == plain.sum() < regions[3].sum()


@settings(max_examples=40, deadline=None)
@given(mask=ellipses(), valid=frames())
def test_ring_is_the_rim_of_the_edit_region(mask: Mask, valid: Mask) -> None:
    edit = edit_region(mask & valid, valid)
    expected = edit & (distance_to(~edit) <= RING_WIDTH)
    assert np.array_equal(ring_region(edit), expected)


def test_ring_leaves_the_middle_of_a_large_lesion_alone() -> None:
    ring = ring_region(edit_region(ellipse(100, 128, 40, 40), EVERYWHERE))
    assert ring.any()
    assert not ring[100, 128]


@settings(max_examples=40, deadline=None)
@given(mask=ellipses(), valid=frames(), grain_fade=st.sampled_from((0.0, GRAIN_FADE)))
def test_feather_is_zero_outside_and_rises_inwards(mask: Mask, valid: Mask, grain_fade: float) -> None:
    edit = edit_region(mask & valid, valid)
    brightness, grains = feather(edit, grain_fade=grain_fade)
    for opacity in (brightness, grains):
        assert opacity.dtype == np.float32
        assert (opacity[~edit] == 0).all(), "exactly: a rounding error here would touch the patient's own pixels"
    assert (brightness[edit] > 0).all()
    np.testing.assert_array_equal(
        brightness, np.where(edit, np.clip(distance_to(~edit) / FEATHER_WIDTH, 0, 1), 0).astype("f4")
    )
    assert (np.abs(grains - brightness) <= 0.5).all(), "the two fade in around the same line"


def test_a_region_without_an_outside_has_no_rim() -> None:
    assert not ring_region(EVERYWHERE).any()
    assert all((opacity == 1).all() for opacity in feather(EVERYWHERE))
    assert not ring_region(NOWHERE).any()
    assert all((opacity == 0).all() for opacity in feather(NOWHERE))


@settings(max_examples=60, deadline=None)
@given(mask=ellipses(), valid=frames())
def test_window_is_the_smallest_bucket_that_holds_the_edit_region(mask: Mask, valid: Mask) -> None:
    edit = edit_region(mask & valid, valid)
    if not edit.any():
        with pytest.raises(ValueError, match="empty"):
            window_for(edit)
        return
    window = window_for(edit)
    assert window.side in BUCKETS
    assert 0 <= window.top <= RESOLUTION - window.side
    assert 0 <= window.left <= RESOLUTION - window.side
    assert edit[window.slices].sum() == edit.sum()
    rows, columns = np.flatnonzero(edit.any(axis=1)), np.flatnonzero(edit.any(axis=0))
    extent = int(max(np.ptp(rows), np.ptp(columns))) + 1 + 2 * BUCKET_CONTEXT
    smaller = [side for side in BUCKETS if side < window.side]
    assert all(extent > side for side in smaller)
    for lines, start in ((rows, window.top), (columns, window.left)):
        before, after = lines[0] - start, start + window.side - 1 - lines[-1]
        # The promised surroundings, unless the image ends there.
        assert before >= BUCKET_CONTEXT or start == 0
        assert after >= BUCKET_CONTEXT or start + window.side == RESOLUTION


def test_largest_component_keeps_one_part_and_fills_it() -> None:
    ring = ellipse(100, 100, 30, 30) & ~ellipse(100, 100, 10, 10)
    crumbs = ring | ellipse(200, 200, 8, 8)
    assert np.array_equal(largest_component(crumbs), ellipse(100, 100, 30, 30))
    assert not largest_component(NOWHERE).any()


@settings(max_examples=40, deadline=None)
@given(one=ellipses(), other=ellipses(), hole=ellipses(), valid=frames())
def test_largest_component_equals_the_whole_image_computation(one: Mask, other: Mask, hole: Mask, valid: Mask) -> None:
    mask = ((one & ~hole) | other) & valid
    labels, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    sizes = np.bincount(labels.ravel())[1:]
    expected = ndimage.binary_fill_holes(labels == sizes.argmax() + 1) if sizes.size else NOWHERE
    assert np.array_equal(largest_component(mask), expected)


def test_patches_outside_see_nothing_of_the_edit_region() -> None:
    edit = edit_region(ellipse(90, 70, 14, 22), EVERYWHERE)
    keep = patches_outside(edit, 16).reshape(16, 16)
    seen = np.kron(keep, np.ones((16, 16), dtype=bool))
    assert not (edit & seen).any()
    for row, column in np.argwhere(~keep):
        assert edit[16 * row : 16 * row + 16, 16 * column : 16 * column + 16].any(), "dropped without a reason"


@settings(max_examples=40, deadline=None)
@given(mask=ellipses(), valid=frames(), seed=st.integers(0, 99), grain_fade=st.sampled_from((0.0, GRAIN_FADE)))
def test_paste_touches_nothing_outside_the_edit_region(mask: Mask, valid: Mask, seed: int, grain_fade: float) -> None:
    edit = edit_region(mask & valid, valid)
    if not edit.any():
        return
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, edit.shape, dtype=np.uint8)
    before = image.copy()
    window = window_for(edit)
    # Beyond [-1, 1] as well: a network's output is not bounded by anything.
    painted = rng.normal(0, 2, (window.side, window.side)).astype(np.float32)
    result = paste(image, painted, edit, window, grain_fade)
    assert result.dtype == np.uint8
    assert np.array_equal(image, before), "the healthy image itself must not change"
    assert np.array_equal(result[~edit], image[~edit])


def test_paste_puts_the_painted_pixels_where_they_belong() -> None:
    edit = edit_region(ellipse(60, 180, 25, 25), EVERYWHERE)
    window = window_for(edit)
    image = np.full(edit.shape, 40, np.uint8)
    grey = (50 + ROWS / 2 + COLUMNS / 4).astype(np.uint8)
    result = paste(image, grey[window.slices].astype(np.float32) / np.float32(127.5) - 1, edit, window)
    inner = feather(edit)[0] == 1
    assert inner.any()
    assert np.array_equal(result[inner], grey[inner])
    rim = edit & ~inner
    assert (result[rim] >= 40).all()
    assert (result[rim] <= grey[rim]).all()


def test_paste_leaves_no_smooth_line_where_two_speckle_patterns_meet() -> None:
    rng = np.random.default_rng(5)
    edit = edit_region(ellipse(128, 128, 40, 40), EVERYWHERE)
    window = window_for(edit)
    image = np.clip(rng.normal(128, 20, edit.shape), 0, 255).astype(np.uint8)
    painted = rng.normal(0, 20 / 127.5, (window.side, window.side)).astype(np.float32)
    result = paste(image, painted, edit, window).astype(float)
    depth = distance_to(~edit)
    spread = [result[edit & (depth > k) & (depth <= k + 1)].std() for k in range(8)]
    # Half and half, two patterns have 0.71 of either's deviation, as most of a plain fade's six lines nearly would.
    # Some 250 pixels per line know theirs to 5 %.
    assert min(spread) > 0.75 * 20
    assert sorted(spread)[1] > 0.9 * 20, "one line at most lies within the fade of the speckle"


def test_a_fade_of_the_speckle_keeps_its_contrast_in_every_line_of_the_rim() -> None:
    rng = np.random.default_rng(5)
    edit = edit_region(ellipse(128, 128, 40, 40), EVERYWHERE)
    window, depth = window_for(edit), distance_to(~edit)
    image = np.clip(rng.normal(128, 20, edit.shape), 0, 255).astype(np.uint8)
    painted = rng.normal(0, 20 / 127.5, (window.side, window.side)).astype(np.float32)
    result = paste(image, painted, edit, window, GRAIN_FADE).astype(float)
    lines = [edit & (depth > k) & (depth <= k + 1) for k in range(int(GRAIN_FADE) + 2)]
    # Some 250 pixels per line know their deviation to 5 %.
    assert all(0.9 * 20 < result[line].std() < 1.1 * 20 for line in lines)
    # What was there shows less and less from the rim inwards, and nothing of it behind the fade.
    shares = [np.corrcoef(result[line], image[line])[0, 1] for line in lines]
    assert shares[0] > 0.9 and shares[3] > 0.5 and abs(shares[-1]) < 0.2
    assert np.array_equal(result[depth >= GRAIN_FADE], paste(image, painted, edit, window)[depth >= GRAIN_FADE])


def test_windows_cut_squares() -> None:
    assert EVERYWHERE[Window(top=3, left=100, side=128).slices].shape == (128, 128)
