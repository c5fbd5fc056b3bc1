"""Similarities between synthetic, training and held-out images, in each space that privacy looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import pairwise

from busigen.evaluation.comparing.matched import Groups
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.fidelity.metrics import Standardiser
from busigen.evaluation.physics import radiomics
from busigen.evaluation.privacy.memorisation import Values, joined
from busigen.evaluation.privacy.nearest import Views, correlations, lesion_views, whole_views

REPEATED = 0.9
"""Correlation within the synthetic set above which two images are one piece of evidence."""

_REPEAT_SHIFT = 2


@dataclass(frozen=True)
class Space:
    """Similarities (greater is nearer) of S synthetic, T training and H held-out images.

    Attributes:
        name: ``crop``, ``whole`` or ``radiomic``.
        label: For people.
        synthetic: The images that were compared.
        train: Likewise; None where nobody named a training set.
        held: Likewise.
        groups: S groups, repeats within the set merged.
        to_held: ``(S, H)``.
        to_train: ``(S, T)``, or None.
        held_to_train: ``(H, T)``, or None.
        within: ``(T, T)`` in the radiomic space; ``(H, H)`` where there is no training set; else None.
        views: Synthetic, training (or held-out) views, where the space has them.
        shared: Whether training and held-out images have a class in common, to which they were then restricted.
    """

    name: str
    label: str
    synthetic: ImageSet
    train: ImageSet | None
    held: ImageSet
    groups: Groups
    to_held: Values
    to_train: Values | None = None
    held_to_train: Values | None = None
    within: Values | None = None
    views: tuple[Views, Views] | None = None
    shared: bool = True


def image_space(context: AuditContext, name: str) -> Space | None:
    """Correlations of ``crop`` (lesions with their surroundings) or ``whole`` images; None where a side is empty."""
    make, label, lesions = {
        "crop": (lesion_views, "lesion crops", True),
        "whole": (whole_views, "whole images", False),
    }[name]
    sets = _sets(context, lesions_only=lesions)
    if sets is None:
        return None
    synthetic, train, held = sets
    shared = train is None or bool(np.isin(train.classes, held.classes).any())
    mine, held_views = make(synthetic), make(held)

    def compare(first: Views, second: Views, sides: str) -> Values:
        return correlations(first, second, track=context.track, what=f"{label}, {sides}").astype(np.float64)

    alike = correlations(mine, mine, shift=_REPEAT_SHIFT) > REPEATED
    groups = joined(synthetic.groups, alike)
    to_held = compare(mine, held_views, "synthetic with real")
    if train is None:
        within = compare(held_views, held_views, "real with real")
        return Space(name, label, synthetic, None, held, groups, to_held, within=within, views=(mine, held_views))
    train_views = make(train)
    return Space(
        name,
        label,
        synthetic,
        train,
        held,
        groups,
        to_held,
        to_train=compare(mine, train_views, "synthetic with training"),
        held_to_train=compare(held_views, train_views, "real with training"),
        views=(mine, train_views),
        shared=shared,
    )


def radiomic_space(context: AuditContext, crop: Space) -> Space | None:
    """Negative distances between radiomic vectors of the images of ``crop``; None without a training set."""
    if crop.train is None:
        return None
    tables = [radiomics.for_set(context, images) for images in (crop.synthetic, crop.train, crop.held)]
    synthetic, train, held = (radiomics.matrix(table, tables[1]) for table in tables)
    standardise = Standardiser.fit(train)
    mine, trained, others = standardise(synthetic), standardise(train), standardise(held)
    return Space(
        "radiomic",
        "radiomic features",
        crop.synthetic,
        crop.train,
        crop.held,
        crop.groups,
        to_held=-pairwise.euclidean_distances(mine, others),
        to_train=-pairwise.euclidean_distances(mine, trained),
        held_to_train=-pairwise.euclidean_distances(others, trained),
        within=-pairwise.euclidean_distances(trained),
        shared=crop.shared,
    )


def _sets(context: AuditContext, *, lesions_only: bool) -> tuple[ImageSet, ImageSet | None, ImageSet] | None:
    synthetic, train, held = context.synthetic, context.train, context.real
    if lesions_only:
        synthetic, held = synthetic.with_lesions(), held.with_lesions()
        train = None if train is None else train.with_lesions()
    if train is not None and len(train):
        # A class that one side lacks would tell members from others without any memory.
        common = np.intersect1d(train.classes, held.classes)
        # None in common mostly means that one side names no classes, which is no reason to compare nothing.
        if len(common):
            train, held = (_only(part, common) for part in (train, held))
    sides = [len(synthetic), len(held)] + ([] if train is None else [len(train)])
    return (synthetic, train, held) if min(sides) else None


def _only(images: ImageSet, classes: NDArray[np.str_]) -> ImageSet:
    rows = np.isin(images.classes, classes)
    # Taking rows copies gigabytes of large sets.
    return images if rows.all() else images.take(rows)
