"""Finding copies of an image that were mirrored, turned a little or cropped, as augmented downloads hold them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

COPY = 0.70
"""Correlation of two images' fine structure, aligned, from which they are one frame.

Of the pairs of BUSI's and BUS-BRA's 1,750 images that are no near-duplicates, five lie above it: by eye, each is one
frame cropped twice. Different lesions lie at 0.64 and below. Of 60 images, every copy that was mirrored, turned by up
to 15 degrees, cropped by 3 to 10 % a side, or mirrored and one of these, lies at 0.80 and above. Copies that were
cropped at one side alone, or whose frame grew as they were turned, are not found reliably.
"""

_SIDE = 32
_MARGIN = 3
_FINE, _COARSE = 0.6, 2.0
_TURNS = (6.0, 12.0)
_SCALES = (0.9, 0.8)
_BLOCK_ROWS = 512

_Structure = NDArray[np.float32]


def copy_pairs(
    thumbnails: NDArray[np.float32], aspects: NDArray[np.float64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (rows, columns) of images that are copies of one another, some at a time, perhaps several times.

    Args:
        thumbnails: ``float32 (N, 64, 64)`` from `groups.thumbnail`.
        aspects: ``(N,)``, width over height of the images.
    """
    for rows, columns in _pairs(thumbnails, aspects, thumbnails):
        other = rows != columns
        yield rows[other], columns[other]


def copies_of(
    first: NDArray[np.float32], aspects: NDArray[np.float64], second: NDArray[np.float32], others: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """``bool (N,)``: which of the first are copies of any of the second, M thumbnails with ``others`` as aspects."""
    found = np.zeros(len(first), np.bool_)
    for rows, _ in _pairs(first, aspects, second):
        found[rows] = True
    # What was cut from the second is compared the other way round.
    for _, columns in _pairs(second, others, first):
        found[columns] = True
    return found


def _pairs(
    first: NDArray[np.float32], aspects: NDArray[np.float64], second: NDArray[np.float32]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Pairs of which the first, moved in any of the ways that are tried, is the second."""
    inner = slice(_MARGIN, _SIDE - _MARGIN)
    targets = _unit(_structure(second)[:, inner, inner])
    for start in range(0, len(first), _BLOCK_ROWS):
        structure = _structure(first[start : start + _BLOCK_ROWS])
        for moved in _moved(structure, aspects[start : start + _BLOCK_ROWS]):
            rows, columns = np.nonzero(_unit(moved) @ targets.T > COPY)
            yield rows + start, columns


def _structure(thumbnails: NDArray[np.float32]) -> _Structure:
    """Edges and grains between one and six pixels wide, ``(N, 32, 32)``, as strong everywhere.

    What different breasts have in common, dark depth and bright layers, is wider or stronger, and gone.
    """
    count = len(thumbnails)
    small = thumbnails.reshape(count, _SIDE, 2, _SIDE, 2).mean(axis=(2, 4), dtype=np.float32)
    band = ndimage.gaussian_filter(small, (0, _FINE, _FINE)) - ndimage.gaussian_filter(small, (0, _COARSE, _COARSE))
    strength = np.sqrt(ndimage.gaussian_filter(band * band, (0, _COARSE, _COARSE)))
    mean = strength.mean(axis=(1, 2), keepdims=True)
    # A grey level is what rounding leaves of an image without structure.
    return np.where(mean > 1.0, band / (strength + 0.25 * mean + 1e-3), 0.0).astype(np.float32)


def _moved(structure: _Structure, aspects: NDArray[np.float64]) -> Iterator[_Structure]:
    """The middle of every structure, mirrored, turned and cropped in every way that is tried.

    A pair is compared both ways round, so that turns to the other side and crops of the first need no trial of their
    own; a turn of a mirror image is its own inverse, so that there both sides do.
    """
    for turn, scale in [(0.0, 1.0), *((0.0, scale) for scale in _SCALES), *((turn, 1.0) for turn in _TURNS)]:
        moved = _sampled(structure, aspects, turn, scale)
        yield from (moved, moved[:, ::-1, ::-1], moved[:, :, ::-1], moved[:, ::-1])
        if turn:
            moved = _sampled(structure, aspects, -turn, scale)
            yield from (moved[:, :, ::-1], moved[:, ::-1])


def _sampled(structure: _Structure, aspects: NDArray[np.float64], turn: float, scale: float) -> _Structure:
    """The structures' middle, turned by degrees about it in the images' own proportions, bilinear, edges repeated."""
    centre = (_SIDE - 1) / 2
    places = np.arange(_MARGIN, _SIDE - _MARGIN) - centre
    y, x = np.meshgrid(places, places, indexing="ij")
    cosine, sine = scale * np.cos(np.deg2rad(turn)), scale * np.sin(np.deg2rad(turn))
    wide = aspects[:, None, None]
    rows = np.clip(cosine * y - sine * x * wide + centre, 0, _SIDE - 1.001)
    columns = np.clip(sine * y / wide + cosine * x + centre, 0, _SIDE - 1.001)
    top, left = rows.astype(np.int64), columns.astype(np.int64)
    down, right = (rows - top).astype(np.float32), (columns - left).astype(np.float32)
    count = np.arange(len(structure))[:, None, None]
    upper = structure[count, top, left] * (1 - right) + structure[count, top, left + 1] * right
    lower = structure[count, top + 1, left] * (1 - right) + structure[count, top + 1, left + 1] * right
    sampled: _Structure = upper * (1 - down) + lower * down
    return sampled


def _unit(structure: _Structure) -> NDArray[np.float32]:
    """Rows of zero mean and unit length, so that their products are correlations; one without structure has none."""
    rows = structure.reshape(len(structure), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.where(length > 1e-3, length, np.inf), dtype=np.float32)
