"""The sets of an audit, and which real images a generator has not seen: only these can say how good its images are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.geometry import around
from busigen.data.prepared import Prepared
from busigen.data.splits import NEAR_DUPLICATE, copies_of, thumbnail
from busigen.errors import InputError
from busigen.evaluation.context import ImageSet, fingerprint
from busigen.evaluation.reading.sets import background_mode, from_prepared, read_set
from busigen.evaluation.statistics.grouped import rows_by_group, take
from busigen.runtime.progress import Progress

TRAINING = "train"

READ_FACTOR = 4
"""So many times the limit are read before whole groups are drawn: reading is what takes time in a large set."""


def read_inputs(
    synthetic: Path,
    real: Path,
    train_split: Path | None,
    external: Path | None,
    limit: int | None,
    seed: int,
    progress: Progress,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the sets of an audit, at most ``limit`` images each, and leave training images out of the real ones.

    Returns:
        The sets by their name in `AuditContext`, and what the report says about them.

    Raises:
        InputError: a set cannot be read, the synthetic one is part of the real one, or no real or no external image is
            left that did not train the generator.
    """
    notes: list[str] = []
    read_limit = None if limit is None else READ_FACTOR * limit
    prepared = None if train_split is None else Prepared.open(train_split)
    try:
        made, judge = (read_set(path, progress, limit=read_limit, seed=seed) for path in (synthetic, real))
        other = None if external is None else read_set(external, progress, limit=read_limit, seed=seed)
    finally:
        progress.stop()
    files = set(judge.table["sha256"])
    shared = sum(sha256 in files for sha256 in made.table["sha256"])
    if shared == len(made):
        raise InputError(
            f"every image of {synthetic} is one of {real} as well: a set cannot be judged by itself.",
            fix="Give the synthetic set first and real images with --real.",
        )
    if shared:
        notes.append(f"{shared} of the synthetic images are also files of the real set: the figures flatter them.")
    train = None
    if prepared is not None:
        parted = split_by_training(judge, prepared)
        judge, train = parted.held_out, parted.train
        if not len(judge):
            raise InputError(
                f"every image of {real} trained the generator, or is a near-duplicate of one that did.",
                fix="Give real images that it has not seen, such as the prepared folder with its val and test splits.",
            )
        notes.append(
            f"Of the real images read, {parted.same} trained the generator and {parted.near} more resemble a training "
            f"image or share its patient; {len(judge)} are held out, and only these are compared with."
        )
        if other is not None:
            other = _external(other, external, prepared, notes)
    else:
        notes.append(
            "Nobody said which real images trained the generator: if the real set holds some, the figures flatter it. "
            "--train-split names them."
        )

    def cut(name: str, images: ImageSet) -> ImageSet:
        kept = draw(images, limit, seed)
        if len(kept) < len(images) or len(images) == read_limit:
            notes.append(f"The {name} set is judged by {len(kept)} images, drawn at random in whole groups.")
        return kept

    parts = {
        "synthetic": cut("synthetic", made),
        "real": cut("real", judge),
        "train": train,
        "external": other and cut("external", other),
    }
    notes.extend(f"Of the {name} set: {note}." for name, part in parts.items() if part for note in part.notes)
    sets = {name: None if part is None else _description(part) for name, part in parts.items()}
    counts = {
        name: f"{part['images']} images with {part['lesions']} lesions in {part['groups']} groups"
        + (f"; {len(part['refused'])} files refused" if part["refused"] else "")
        for name, part in sets.items()
        if part is not None
    }
    return {**parts, "backgrounds": background_mode(made)}, {"sets": sets, "counts": counts, "notes": notes}


def _external(images: ImageSet, path: Path | None, prepared: Prepared, notes: list[str]) -> ImageSet:
    """The external images that trained nothing: the utility section's networks learn from the training images."""
    parted = split_by_training(images, prepared)
    kept = len(parted.held_out)
    if not kept:
        raise InputError(
            f"--external {path}: every image trained the generator, or is a near-duplicate of one that did.",
            fix="Give real images that it has not seen, or leave --external out.",
        )
    if gone := len(images) - kept:
        reasons = {
            "trained the generator": parted.same,
            "resemble a training image or share its patient": parted.near,
            "are in no split of the prepared folder": gone - parted.same - parted.near,
        }
        counted = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        notes.append(f"Of the external images read, {gone} were left out ({counted}); {kept} are tested on.")
    return parted.held_out


def draw(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    """At most ``limit`` images: whole groups in random order, the last of them cut to fit."""
    if limit is None or len(images) <= limit:
        return images
    rows = take(rows_by_group(images.groups), limit, np.random.default_rng([seed, len(images)]))
    return images.take(np.sort(rows))


def _description(images: ImageSet) -> dict[str, Any]:
    """What a report says of a set, in JSON types."""
    return {
        "name": images.name,
        "layout": images.layout,
        "images": len(images),
        "lesions": len(np.flatnonzero(images.masks.any(axis=(1, 2)))),
        "groups": int(images.table["group"].n_unique()),
        "classes": dict(images.table["class"].value_counts().sort("class").iter_rows()),
        "refused": [refusal.to_dict() for refusal in images.refused],
        "notes": list(images.notes),
        "fingerprint": fingerprint(images),
    }


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
    where it looks like one (thumbnail correlation above ``splits.NEAR_DUPLICATE``), is a copy that was mirrored, turned
    or cropped, or where one of its group does.
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
        like[stranger] |= copies_of(small, _aspects(unknown), other, _aspects(train))
        if len(train):
            like[stranger] |= correlations(small, other).max(axis=1) > NEAR_DUPLICATE
    related = like | (stranger & np.isin(real.groups, np.unique(real.groups[like])))
    # Images that the prepared folder excluded link its splits: they prove nothing on either side.
    held_out = ~related & ~np.isin(splits, [TRAINING, "excluded"])
    return TrainingSplit(
        held_out=real.take(held_out), train=train, same=int(same.sum()), near=int(related.sum() - same.sum())
    )


def thumbnails(images: ImageSet) -> NDArray[np.float32]:
    """``float32 (N, 64, 64)`` of the images without their letterbox bars, for ``data.splits``."""
    small = np.zeros((len(images), 64, 64), np.float32)
    for row, (image, valid) in enumerate(zip(images.images, images.valid, strict=True)):
        if valid.any():
            small[row] = thumbnail(np.ascontiguousarray(image[around(valid, 0)]))
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
