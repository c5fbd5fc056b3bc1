"""The sets that an audit looks at: read, parted into held out and training, and cut to size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from busigen.data.prepared import Prepared
from busigen.errors import InputError
from busigen.evaluation.cache import fingerprint
from busigen.evaluation.comparing.matched import take
from busigen.evaluation.comparing.statistics import rows_by_group
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.reading.held_out import split_by_training
from busigen.evaluation.reading.sets import background_mode, read_set
from busigen.runtime.progress import Progress

READ_FACTOR = 4
"""So many times the limit are read before whole groups are drawn: reading is what takes time in a large set."""


def draw(images: ImageSet, limit: int | None, seed: int) -> ImageSet:
    """At most ``limit`` images: whole groups in random order, the last of them cut to fit."""
    if limit is None or len(images) <= limit:
        return images
    rows = take(rows_by_group(images.groups), limit, np.random.default_rng([seed, len(images)]))
    return images.take(np.sort(rows))


def read_inputs(
    synthetic: Path,
    real: Path,
    train_split: Path | None,
    external: Path | None,
    limit: int | None,
    seed: int,
    progress: Progress,
) -> tuple[AuditContext, dict[str, Any]]:
    """Read the sets of an audit and part the real one.

    Args:
        synthetic: The set under judgement.
        real: Real images.
        train_split: Prepared folder that trained the generator.
        external: A further real set; its training images are left out as well.
        limit: Greatest number of images per set but the training one; None for all.
        seed: Seeds the draws.
        progress: Told of every image.

    Returns:
        A context with the sets and nothing else, and what the report says about them.

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
    if shared := _shared(made, judge, synthetic, real):
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
    named = {"synthetic": made, "real": judge, "train": train, "external": other}
    drawn = {name: part if part is None or name == "train" else draw(part, limit, seed) for name, part in named.items()}
    for name in ("synthetic", "real", "external"):
        before, after = named[name], drawn[name]
        if before is not None and after is not None and (len(after) < len(before) or len(before) == read_limit):
            notes.append(f"The {name} set is judged by {len(after)} images, drawn at random in whole groups.")
    chosen, judges = drawn["synthetic"], drawn["real"]
    assert chosen is not None and judges is not None
    notes.extend(f"Of the {name} set: {note}." for name, part in drawn.items() if part for note in part.notes)
    context = AuditContext(
        synthetic=chosen,
        real=judges,
        train=drawn["train"],
        external=drawn["external"],
        out=Path(),
        backgrounds=background_mode(made),
    )
    sets = {name: None if part is None else describe(part) for name, part in drawn.items()}
    counts = {
        name: f"{part['images']} images with {part['lesions']} lesions in {part['groups']} groups"
        + (f"; {len(part['refused'])} files refused" if part["refused"] else "")
        for name, part in sets.items()
        if part is not None
    }
    return context, {"sets": sets, "counts": counts, "notes": notes}


def _shared(made: ImageSet, judge: ImageSet, synthetic: Path, real: Path) -> int:
    """How many synthetic images are files of the real set, byte by byte.

    Raises:
        InputError: all are.
    """
    files = set(judge.table["sha256"])
    shared = sum(sha256 in files for sha256 in made.table["sha256"])
    if shared == len(made):
        raise InputError(
            f"every image of {synthetic} is one of {real} as well: a set cannot be judged by itself.",
            fix="Give the synthetic set first and real images with --real.",
        )
    return shared


def _external(images: ImageSet, path: Path | None, prepared: Prepared, notes: list[str]) -> ImageSet:
    """The external images that trained nothing: every network of the utility section learns from the training images.

    Raises:
        InputError: none is left.
    """
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


def describe(images: ImageSet) -> dict[str, Any]:
    """What a report says of a set, in JSON types."""
    counts = images.table["class"].value_counts().sort("class")
    return {
        "name": images.name,
        "layout": images.layout,
        "images": len(images),
        "lesions": len(np.flatnonzero(images.masks.any(axis=(1, 2)))),
        "groups": int(images.table["group"].n_unique()),
        "classes": dict(counts.iter_rows()),
        "refused": [refusal.to_dict() for refusal in images.refused],
        "notes": list(images.notes),
        "fingerprint": fingerprint(images),
    }
