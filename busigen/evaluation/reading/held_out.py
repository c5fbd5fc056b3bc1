"""Which real images a generator has not seen: only these can say how good its images are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.copies import copies_of
from busigen.data.groups import NEAR_DUPLICATE, thumbnail
from busigen.data.prepared import Prepared
from busigen.evaluation.context import ImageSet
from busigen.evaluation.reading.sets import from_prepared

TRAINING = "train"


@dataclass(frozen=True)
class TrainingSplit:
    """Real images by what the generator knows of them.

    Attributes:
        held_out: Images of the real set that it did not train on, and that are no neighbours of such.
        train: All images that it trained on, whether or not the real set holds them.
        same: Images of the real set that are training images, by hash or name.
        near: Images of the real set that are near-duplicates of training images, or of the same patient.
    """

    held_out: ImageSet
    train: ImageSet
    same: int
    near: int


def split_by_training(real: ImageSet, prepared: Prepared) -> TrainingSplit:
    """Part a real set into what trained the generator and what did not.

    An image that the prepared folder knows by its file's sha256 keeps the split it has there, so that for the prepared
    folder itself the result is its splits. Any other image counts as training where its name is a training image's,
    where it looks like one (thumbnail correlation above ``groups.NEAR_DUPLICATE``), is a copy that was mirrored, turned
    or cropped, or where one of its group does.

    Args:
        real: The real set.
        prepared: What the generator was trained on.
    """
    train = from_prepared(prepared, (TRAINING,))
    known = dict(prepared.table.select("sha256", "split").iter_rows())
    splits = np.array([known.get(sha256, "") for sha256 in real.table["sha256"]], dtype=np.str_)
    stranger = splits == ""
    names = set(prepared.table.filter(pl.col("split") == TRAINING)["id"])
    same = (splits == TRAINING) | (stranger & np.array([name in names for name in real.table["id"]], dtype=np.bool_))
    like = same.copy()
    if stranger.any():
        unknown = real.take(stranger)
        small, other = thumbnails(unknown), thumbnails(train)
        like[stranger] |= _alike(small, other) | copies_of(small, _aspects(unknown), other, _aspects(train))
    related = like | (stranger & np.isin(real.groups, np.unique(real.groups[like])))
    # Images that the prepared folder excluded link its splits: they prove nothing on either side.
    held_out = ~related & ~np.isin(splits, [TRAINING, "excluded"])
    return TrainingSplit(
        held_out=real.take(held_out), train=train, same=int(same.sum()), near=int(related.sum() - same.sum())
    )


def thumbnails(images: ImageSet) -> NDArray[np.float32]:
    """``float32 (N, 64, 64)`` of the images without their letterbox bars, for ``data.groups``."""
    small = np.zeros((len(images), 64, 64), np.float32)
    for row, (image, valid) in enumerate(zip(images.images, images.valid, strict=True)):
        rows, columns = np.flatnonzero(valid.any(axis=1)), np.flatnonzero(valid.any(axis=0))
        if rows.size:
            small[row] = thumbnail(np.ascontiguousarray(image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]))
    return small


def correlations(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """Correlation of every thumbnail with every other, ``float32 (N, M)``; a flat one correlates with none."""

    def scores(small: NDArray[np.float32]) -> NDArray[np.float32]:
        flat = small.reshape(len(small), -1) - small.mean(axis=(1, 2))[:, None]
        length = np.linalg.norm(flat, axis=1, keepdims=True)
        return np.asarray(flat / np.where(length > 1e-3, length, np.inf), dtype=np.float32)

    return np.asarray(scores(first) @ scores(second).T)


def _aspects(images: ImageSet) -> NDArray[np.float64]:
    return (images.table["width"] / images.table["height"]).to_numpy()


def _alike(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.bool_]:
    """``bool (N,)``: which of the first have a near-duplicate among the second."""
    if not len(second):
        return np.zeros(len(first), np.bool_)
    return np.asarray(correlations(first, second).max(axis=1) > NEAR_DUPLICATE)
