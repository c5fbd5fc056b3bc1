"""Groups of near-duplicate images, which must stay on one side of every split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from busigen.data.copies import copy_pairs

THUMBNAIL_SIDE = 64
"""Side of the squashed thumbnails that are compared, in pixels."""

NEAR_DUPLICATE = 0.90
"""Correlation of two thumbnails above which the images belong together.

One threshold serves every source. Measured with single link: on BUSI's 623 images the groups are exactly those of the
published list (`copies.COPY` then joins four pairs of them); on BUS-BRA's 1,127 no two patients are linked (at 0.85,
nine pairs already chain 15 images together); across the two sources the highest correlation is 0.8999, so none is
linked.
"""

SAME_FRAME = 0.93
"""Correlation above which two images are one frame, cropped or annotated differently.

Between BUSI's classes seven pairs lie at 0.949 or above and show the same frame by eye; the next, at 0.908 and below,
are different lesions that look alike.
"""

_BLOCK_ROWS = 512


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Squash a native image to ``float32 (64, 64)``, 0 to 255, for comparison.

    Pillow's antialiased bilinear filter is part of the definition: with box or Lanczos up to 30 of BUSI's images
    change group.
    """
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(Image.fromarray(pixels).resize(side, Image.Resampling.BILINEAR), dtype=np.float32)


def near_duplicate_groups(
    thumbnails: NDArray[np.float32], patients: Sequence[str | None], aspects: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Group images that look alike, are mirrored, turned or cropped copies, or show the same patient, by single link.

    Args:
        thumbnails: ``float32 (N, 64, 64)`` from `thumbnail`.
        patients: N patient names; None where unknown, which links nothing.
        aspects: N times width over height; None where all images are squares.

    Returns:
        ``int64 (N,)``: group numbers from 0, in order of first appearance.

    Raises:
        ValueError: The two arguments differ in length.
    """
    count = len(thumbnails)
    if len(patients) != count:
        raise ValueError(f"{count} thumbnails but {len(patients)} patients")
    labels = _patient_labels(patients)
    copies = copy_pairs(thumbnails, _ratios(aspects, count))
    for rows, columns in chain(_similar_pairs(thumbnails, NEAR_DUPLICATE), copies):
        # Merging block by block keeps one label per image instead of every pair, of which there may be N * N.
        labels = _merge(labels, labels[rows], labels[columns])
    return _by_first_appearance(labels)


def class_conflicts(
    thumbnails: NDArray[np.float32], classes: Sequence[str], aspects: Sequence[float] | None = None
) -> NDArray[np.bool_]:
    """Find images of which the same frame, or a copy of it, also stands under another class.

    Args:
        thumbnails: ``float32 (N, 64, 64)`` from `thumbnail`.
        classes: N class names.
        aspects: N times width over height; None where all images are squares.

    Returns:
        ``bool (N,)``, True for every image of a contradicting pair.

    Raises:
        ValueError: The two arguments differ in length.
    """
    if len(classes) != len(thumbnails):
        raise ValueError(f"{len(thumbnails)} thumbnails but {len(classes)} classes")
    names = np.asarray(classes, dtype=np.str_)
    conflict = np.zeros(len(thumbnails), dtype=np.bool_)
    copies = copy_pairs(thumbnails, _ratios(aspects, len(names)))
    for rows, columns in chain(_similar_pairs(thumbnails, SAME_FRAME), copies):
        differ = names[rows] != names[columns]
        conflict[rows[differ]] = True
        conflict[columns[differ]] = True
    return conflict


def _similar_pairs(
    thumbnails: NDArray[np.float32], threshold: float
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield (rows, columns) of the pairs above a threshold, one block of rows at a time."""
    scores = _standardised(thumbnails)
    for start in range(0, len(scores), _BLOCK_ROWS):
        correlation = scores[start : start + _BLOCK_ROWS] @ scores[start:].T
        rows, columns = np.nonzero(correlation > threshold)
        later = columns > rows
        rows, columns = rows[later], columns[later]
        yield rows + start, columns + start


def _standardised(thumbnails: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of zero mean and unit length, so that their products are correlations; a flat image correlates with none."""
    scores = np.array(thumbnails, dtype=np.float32).reshape(len(thumbnails), -1)
    scores -= scores.mean(axis=1, keepdims=True)
    length = np.linalg.norm(scores, axis=1, keepdims=True)
    scores /= np.where(length > 1e-3, length, np.inf)
    return scores


def _ratios(aspects: Sequence[float] | None, count: int) -> NDArray[np.float64]:
    ratios = np.ones(count) if aspects is None else np.asarray(aspects, dtype=np.float64)
    if len(ratios) != count:
        raise ValueError(f"{count} thumbnails but {len(ratios)} aspects")
    return ratios


def _patient_labels(patients: Sequence[str | None]) -> NDArray[np.int64]:
    first: dict[str, int] = {}
    return np.array(
        [index if patient is None else first.setdefault(patient, index) for index, patient in enumerate(patients)],
        dtype=np.int64,
    )


def _merge(labels: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.int64]:
    if left.size == 0:
        return labels
    count = int(labels.max()) + 1
    links = coo_array((np.ones(left.size, dtype=np.bool_), (left, right)), shape=(count, count))
    _, component = connected_components(links, directed=False)
    merged: NDArray[np.int64] = component.astype(np.int64)[labels]
    return merged


def _by_first_appearance(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(labels, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    numbers: NDArray[np.int64] = rank[inverse]
    return numbers
