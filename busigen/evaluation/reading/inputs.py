"""What an audit compares: its sets by name, the real ones without what the generator has seen."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from busigen.data.prepared import Prepared
from busigen.data.splits import NEAR_DUPLICATE, copies_of, unit
from busigen.errors import InputError
from busigen.evaluation.context import ImageSet, fingerprint
from busigen.evaluation.reading.sets import background_mode, from_prepared, read_set, thumbnails
from busigen.evaluation.reading.within import Within
from busigen.evaluation.statistics.grouped import rows_by_group, take
from busigen.runtime.progress import Progress

READ_FACTOR = 4  # So many times the limit are read before whole groups are drawn: reading takes the time


def read_inputs(
    synthetic: Path,
    real: Path,
    train_split: Path | None,
    external: Path | None,
    limit: int | None,
    seed: int,
    frames: int,
    progress: Progress,
    within: Within | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The sets of an audit by their name in `AuditContext`, and what the report says about them.

    At most ``limit`` images each are kept, and no training images among the real ones. ``within`` holds for the real
    set, and for the synthetic one if that has the column. Raises as `audit` does.
    """
    notes: list[str] = []
    if within is not None:
        notes.append(f"Judged within {within.column} = {within.value}: only such real images are compared with.")
    read_limit = None if limit is None else READ_FACTOR * limit
    prepared = None if train_split is None else Prepared.open(train_split)
    try:
        reading: dict[str, Any] = {"limit": read_limit, "seed": seed, "frames": frames}
        # The real set first: its column has to be there, and who misspells it should not wait for the other.
        judge = read_set(real, progress, within=within and replace(within, required=True), **reading)
        made = read_set(synthetic, progress, within=within, **reading)
        other = None if external is None else read_set(external, progress, **reading)
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
        listed = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        notes.append(f"Of the external images read, {gone} were left out ({listed}); {kept} are tested on.")
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

    ``held_out`` neither trained it nor are neighbours of such; ``train`` are all that did, whether or not the real set
    holds them. Counted in the real set: training images by hash or name, and their near-duplicates or patients' others.
    """

    held_out: ImageSet
    train: ImageSet
    same: int
    near: int


def split_by_training(real: ImageSet, prepared: Prepared) -> TrainingSplit:
    """Part a real set into what trained the generator and what did not.

    An image that the prepared folder knows by its file's sha256 keeps the split it has there. Any other counts as
    training where its name is a training image's, it looks like one (thumbnail correlation above
    ``splits.NEAR_DUPLICATE``), is a mirrored, turned or cropped copy of one, or where one of its group does.
    """
    train = from_prepared(prepared, ("train",))
    known = dict(prepared.table.select("sha256", "split").iter_rows())
    splits = np.array([known.get(sha256, "") for sha256 in real.table["sha256"]], dtype=np.str_)
    stranger = splits == ""
    names = set(train.table["id"])
    same = (splits == "train") | (stranger & np.array([name in names for name in real.table["id"]], dtype=np.bool_))
    like = same.copy()
    if stranger.any():
        unknown = real.take(stranger)
        small, other = thumbnails(unknown), thumbnails(train)
        aspects, others = ((part.table["width"] / part.table["height"]).to_numpy() for part in (unknown, train))
        like[stranger] |= copies_of(small, aspects, other, others)
        if len(train):
            like[stranger] |= (unit(small) @ unit(other).T).max(axis=1) > NEAR_DUPLICATE
    related = like | (stranger & np.isin(real.groups, np.unique(real.groups[like])))
    # Images that the prepared folder excluded link its splits: they prove nothing on either side.
    held_out = real.take(~related & ~np.isin(splits, ["train", "excluded"]))
    return TrainingSplit(held_out, train, same=int(same.sum()), near=int(related.sum() - same.sum()))
