"""The arms of the utility experiment, and their trainings, each kept as a file so that a killed audit goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from sklearn.model_selection import StratifiedGroupKFold

from busigen.errors import IntegrityError
from busigen.evaluation.context import AuditContext, Effort, ImageSet
from busigen.evaluation.utility.segmentation import (
    RECIPES,
    Counts,
    Examples,
    Recipe,
    centroid_offsets,
    examples,
    overlap,
    predict,
    train,
)
from busigen.records import Many, Number, Record, Text, Whole, read_checked
from busigen.runtime.atomic import write_json

VERSION = 1
"""Part of every kept training's key: raise it whenever training changes."""


_Overlaps = Many[tuple[Whole, Whole, Whole]]
_Offsets = Many[tuple[Number, Number] | None]


class _Kept(Record):
    """A kept training's scores, by the set that they were measured on."""

    key: Text
    test: _Overlaps
    test_offsets: _Offsets
    synthetic: _Overlaps = Field(default_factory=list)
    synthetic_offsets: _Offsets = Field(default_factory=list)
    external: _Overlaps = Field(default_factory=list)
    external_offsets: _Offsets = Field(default_factory=list)


@dataclass(frozen=True)
class Arm:
    """What one arm trains on.

    Attributes:
        name: Part of a figure's key.
        label: For people.
        real: The real training images are in it.
        classic: Geometric and intensity augmentation.
        paste: Lesions of real training images pasted into others.
        synthetic: Synthetic images, as a multiple of the number of real training images.
        first: The synthetic images train alone for the first half of the steps, the real ones for the second.
        quick: The quick mode trains it as well.
    """

    name: str
    label: str
    real: bool = True
    classic: bool = False
    paste: bool = False
    synthetic: float = 0.0
    first: bool = False
    quick: bool = False


REAL, CLASSIC, ADDED, ALONE = "real", "classic", "synthetic_1", "synthetic_only"

ARMS = {
    arm.name: arm
    for arm in (
        Arm(REAL, "real", quick=True),
        Arm(CLASSIC, "real + classic augmentation", classic=True, quick=True),
        Arm("paste", "real + lesion copy-paste", paste=True),
        Arm("synthetic_half", "real + 0.5 x synthetic", synthetic=0.5),
        Arm(ADDED, "real + 1 x synthetic", synthetic=1.0, quick=True),
        Arm("synthetic_2", "real + 2 x synthetic", synthetic=2.0),
        Arm("synthetic_4", "real + 4 x synthetic", synthetic=4.0),
        Arm("classic_synthetic_1", "real + 1 x synthetic + classic augmentation", classic=True, synthetic=1.0),
        Arm("classic_synthetic_2", "real + 2 x synthetic + classic augmentation", classic=True, synthetic=2.0),
        Arm("classic_after_2", "2 x synthetic, then real, + classic", classic=True, synthetic=2.0, first=True),
        Arm(ALONE, "synthetic only", real=False, synthetic=1.0, quick=True),
    )
}


@dataclass(frozen=True)
class Extent:
    """How much one effort does.

    Attributes:
        seeds: Seeds per arm.
        real_seeds: Seeds of the arm ``real``: two at least, for the floor.
        folds: Group folds of the real images where nobody named those that trained the generator.
        folds_run: How many of these folds are tested.
        limit: Most real training images; None for all.
    """

    seeds: int
    real_seeds: int
    folds: int
    folds_run: int
    limit: int | None


EXTENTS: dict[Effort, Extent] = {"quick": Extent(1, 2, 3, 1, 400), "full": Extent(3, 3, 5, 5, None)}


@dataclass(frozen=True)
class Split:
    """One division of the real images: what trains, and which rows of ``context.real`` test."""

    name: str
    train: ImageSet
    test: NDArray[np.int64]


@dataclass(frozen=True)
class Outcome:
    """One training's scores: ``test`` on the split's test rows, ``synthetic`` and ``external`` on those whole sets.

    ``offsets`` and ``synthetic_offsets`` are ``(N, 2)`` of `centroid_offsets`.
    """

    arm: str
    seed: int
    split: str
    test: Counts
    offsets: NDArray[np.float64]
    synthetic: Counts
    synthetic_offsets: NDArray[np.float64]
    external: Counts


def splits(context: AuditContext, synthetic: int) -> tuple[list[Split], list[str]]:
    """How real images are divided, and what a reader should know about it.

    The generator's own training images train and ``context.real`` tests, where those are known: then the synthetic
    images add nothing that the arm ``real`` could not have seen. Else group folds of ``context.real``.
    """
    extent = EXTENTS[context.effort]
    everything = np.arange(len(context.real))
    notes = []
    if context.train is not None and len(context.train):
        parts = [("held_out", context.train, everything)]
    else:
        notes.append(
            "Nobody said which images trained the generator, so real images were divided into group folds. If the "
            "generator saw test images, figures with synthetic images are too good."
        )
        groups = len(np.unique(context.real.groups))
        count = min(extent.folds, groups)
        if count < 2:
            return [], ["Too few groups of real images to train and test a network."]
        folder = StratifiedGroupKFold(count, shuffle=True, random_state=context.seed)
        pairs = list(folder.split(everything, context.real.classes, context.real.groups))[: extent.folds_run]
        parts = [(f"fold_{k}", context.real.take(rows), test) for k, (rows, test) in enumerate(pairs)]
    result = []
    for name, pool, test in parts:
        limit = len(pool) if extent.limit is None else min(extent.limit, max(synthetic, 1), len(pool))
        rows = np.sort(context.rng("utility", "real", name).permutation(len(pool))[:limit])
        result.append(Split(name, pool.take(rows), test))
    return result, notes


def arms_for(context: AuditContext, real: int, synthetic: int) -> tuple[list[Arm], list[str]]:
    """The arms of this effort that the set is large enough for, and a note for each that is left out."""
    chosen, notes = [], []
    for arm in ARMS.values():
        if context.effort == "quick" and not arm.quick:
            continue
        wanted = round(arm.synthetic * real)
        if arm.synthetic > 1 and synthetic < wanted:
            notes.append(f"'{arm.label}' is left out: it takes {wanted} synthetic images, and there are {synthetic}.")
            continue
        if arm.synthetic and synthetic < wanted:
            notes.append(f"'{arm.label}' has {synthetic} synthetic images, of {wanted} that its name promises.")
        chosen.append(arm)
    return chosen, notes


def outcomes(context: AuditContext, parts: list[Split], arms: list[Arm]) -> list[Outcome]:
    """Train every arm, seed and split that is not kept already in the section's folder."""
    recipe, extent = RECIPES[context.effort], EXTENTS[context.effort]
    synthetic = examples(context.synthetic.with_lesions(), recipe.side)
    external = examples(context.external, recipe.side) if context.external is not None else None
    order = context.rng("utility", "synthetic").permutation(len(synthetic))
    jobs = [
        (part, arm, seed)
        for part in parts
        for arm in arms
        for seed in range(extent.real_seeds if arm.name == REAL else extent.seeds)
    ]
    folder = context.folder("utility") / "trainings"
    folder.mkdir(exist_ok=True)
    result = []
    context.progress.start(f"{len(jobs)} trainings", len(jobs) * recipe.steps, unit="step")
    for part, arm, seed in jobs:
        sources = _sources(examples(part.train, recipe.side), synthetic, order, arm)
        test = examples(context.real.take(part.test), recipe.side)
        key = _key(recipe, arm, seed, context, (*sources, test, *([external] if external else []), synthetic))
        path = folder / f"{arm.name}-{part.name}-{seed}-{key[:12]}.json"
        kept = _kept(path, key)
        if kept is None:
            run_seed = 1000 * context.seed + seed
            advance = context.progress.advance
            kept = _trained(sources, recipe, arm, run_seed, context.device, test, synthetic, external, advance)
            write_json(path, {"key": key, **kept})
        else:
            context.progress.advance(recipe.steps)
        result.append(_outcome(arm.name, seed, part.name, kept))
    return result


def _sources(real: Examples, synthetic: Examples, order: NDArray[np.int64], arm: Arm) -> list[Examples]:
    # Larger arms hold the synthetic images of smaller ones, so that arms differ in number and not in luck.
    added = synthetic.take(order[: round(arm.synthetic * len(real))])
    return [part for part, used in ((real, arm.real), (added, arm.synthetic > 0)) if used]


def _trained(
    sources: list[Examples],
    recipe: Recipe,
    arm: Arm,
    seed: int,
    device: str,
    test: Examples,
    synthetic: Examples,
    external: Examples | None,
    done: Callable[[int], None],
) -> dict[str, Any]:
    if arm.first:
        real, added = sources
        phases = [added, real]
    else:
        phases = [sources[0] if len(sources) == 1 else sources[0].plus(sources[1])]
    network = train(phases, recipe, seed=seed, device=device, classic=arm.classic, paste=arm.paste, done=done)
    content: dict[str, Any] = {}
    for name, part in (("test", test), ("synthetic", synthetic if arm.name == REAL else None), ("external", external)):
        if part is None:
            continue
        predicted = predict(network, part.images, device)
        content[name] = overlap(predicted, part.masks).tolist()
        offsets = centroid_offsets(predicted, part.masks)
        content[f"{name}_offsets"] = [None if np.isnan(row).any() else row.tolist() for row in offsets]
    return content


def _outcome(arm: str, seed: int, split: str, content: dict[str, Any]) -> Outcome:
    def counts(name: str) -> Counts:
        return np.array(content.get(name, []), np.int64).reshape(-1, 3)

    def offsets(name: str) -> NDArray[np.float64]:
        rows = [[np.nan] * 2 if row is None else row for row in content.get(name, [])]
        return np.array(rows, np.float64).reshape(-1, 2)

    return Outcome(
        arm,
        seed,
        split,
        counts("test"),
        offsets("test_offsets"),
        counts("synthetic"),
        offsets("synthetic_offsets"),
        counts("external"),
    )


def _key(recipe: Recipe, arm: Arm, seed: int, context: AuditContext, parts: tuple[Examples, ...]) -> str:
    """Names everything that a training's scores depend on, pixels included."""
    about = {"version": VERSION, "recipe": asdict(recipe), "arm": asdict(arm), "seed": [context.seed, seed]}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for part in parts:
        digest.update(f"|{len(part)}|".encode())
        digest.update(np.ascontiguousarray(part.images).tobytes())
        digest.update(np.packbits(part.masks).tobytes())
    return digest.hexdigest()


def _kept(path: Path, key: str) -> dict[str, Any] | None:
    try:
        content: dict[str, Any] = read_checked(_Kept, path, fix="")
    except (OSError, IntegrityError):
        return None
    return content if content["key"] == key else None
