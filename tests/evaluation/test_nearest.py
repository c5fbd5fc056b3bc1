"""Copies are found whatever mirror, shift, gain or letterbox lies between them and the original."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from busigen.evaluation.context import ImageSet
from busigen.evaluation.privacy.nearest import SHIFT, SIDE, align, correlations, crop_box, views
from tests.harness.synthetic_sets import synthetic_set


@pytest.fixture(scope="module")
def originals() -> ImageSet:
    return synthetic_set(24, seed=0)


def test_a_mirrored_shifted_view_is_found_exactly() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal(size=(30, SIDE, SIDE)).astype(np.float32)
    moves = [(int(y), int(x)) for y, x in rng.integers(-SHIFT, SHIFT + 1, (30, 2))]
    order = rng.permutation(30)
    queries = np.stack([np.roll(targets[k][:, ::-1], moves[k], (0, 1)) for k in order])
    found = correlations(queries, targets)
    assert found.argmax(axis=1).tolist() == order.tolist()
    # The middle of the query is the very same pixels: 1 but for rounding in single precision.
    assert found.max(axis=1) == pytest.approx(np.ones(30), abs=1e-4)
    for query, k in zip(queries, order, strict=True):
        correlation, mirrored = align(query, targets[k])
        assert mirrored
        assert correlation == pytest.approx(1, abs=1e-4)


def test_a_shift_beyond_the_window_is_not_undone() -> None:
    rng = np.random.default_rng(1)
    target = rng.normal(size=(1, SIDE, SIDE)).astype(np.float32)
    assert correlations(np.roll(target, SHIFT + 2, axis=1), target)[0, 0] < 0.5


def test_correlation_is_that_of_the_overlapping_pixels() -> None:
    rng = np.random.default_rng(2)
    query, target = rng.normal(size=(2, 1, SIDE, SIDE)).astype(np.float32)
    upright = np.corrcoef(query.ravel(), target.ravel())[0, 1]
    mirrored = np.corrcoef(query[:, :, ::-1].ravel(), target.ravel())[0, 1]
    # Single precision over 2,304 pixels.
    assert correlations(query, target, shift=0)[0, 0] == pytest.approx(max(upright, mirrored), abs=1e-5)


def test_flat_views_resemble_nothing() -> None:
    rng = np.random.default_rng(3)
    flat = np.full((1, SIDE, SIDE), 7.0, dtype=np.float32)
    assert correlations(flat, rng.normal(size=(3, SIDE, SIDE)).astype(np.float32)).tolist() == [[0.0, 0.0, 0.0]]


@pytest.mark.parametrize("lesions", [False, True])
def test_copies_with_another_gain_are_found_among_all_images(originals: ImageSet, lesions: bool) -> None:
    images = np.roll(originals.images[:, :, ::-1], (6, -9), (1, 2))
    copies = ImageSet(
        name="copies",
        images=(0.6 * images + 40).astype(np.uint8),
        masks=np.roll(originals.masks[:, :, ::-1], (6, -9), (1, 2)),
        valid=originals.valid,
        overlays=originals.overlays,
        table=originals.table,
    )
    found = correlations(views(copies, lesions=lesions), views(originals, lesions=lesions))
    assert found.argmax(axis=1).tolist() == list(range(len(originals)))
    others = np.where(np.eye(len(originals), dtype=np.bool_), -1, found)
    # Whatever falls between view pixels is lost, but a copy stays far above all other images.
    assert np.diag(found).min() > 0.7
    assert (np.diag(found) - others.max(axis=1)).min() > 0.1


def test_crops_are_squares_without_letterbox_bars() -> None:
    valid = np.zeros((256, 256), dtype=np.bool_)
    valid[60:200] = True
    for top, left, height, width in ((62, 2, 20, 30), (100, 100, 40, 40), (150, 200, 50, 56), (60, 0, 140, 200)):
        mask = np.zeros((256, 256), dtype=np.bool_)
        mask[top : top + height, left : left + width] = True
        x0, y0, x1, y1 = crop_box(mask, valid)
        assert x1 - x0 == pytest.approx(y1 - y0)
        assert 0 <= x0 < x1 <= 256
        assert 60 <= y0 < y1 <= 200
    with pytest.raises(ValueError, match="empty mask"):
        crop_box(np.zeros((256, 256), dtype=np.bool_), valid)


def test_an_empty_set_is_compared_with_nothing(originals: ImageSet) -> None:
    nobody = originals.take(np.arange(0))
    assert isinstance(nobody.table, pl.DataFrame)
    assert correlations(views(originals, lesions=False), views(nobody, lesions=False)).shape == (24, 0)
