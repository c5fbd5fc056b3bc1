"""Nearest images by correlation that does not mind a mirror, a shift, gain or contrast.

Images, or lesions with their surroundings, are reduced to views of 48 x 48 pixels, freed of everything but fine detail,
and correlated at every shift of up to five view pixels, upright and mirrored. Without the filter two unrelated breasts
of one layout correlate at 0.9; with it, nearest unrelated images lie near 0.3 and shifted copies near 0.9. Views of 64
pixels separate the two no better and take three times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from sklearn.metrics import pairwise

from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.fidelity.metrics import Standardiser
from busigen.evaluation.physics import features as radiomics
from busigen.evaluation.physics.features import bounds
from busigen.evaluation.privacy.memorisation import Values, joined
from busigen.evaluation.statistics.grouped import Rows

Views = NDArray[np.float32]
"""``float32 (N, SIDE, SIDE)``."""

SIDE = 48
"""Side of a view in pixels."""

SHIFT = 5
"""Largest shift that is undone, in view pixels and along each axis: 10 % of the view's side."""

DETAIL = 3.0
"""Standard deviation in view pixels of the Gaussian whose result is taken away."""

CROP_MARGIN = 1.4
"""Side of a lesion's square crop over the longer side of its bounding box."""

_FLAT = 1e-3
_BLOCK = 2048

Track = Callable[[str, Iterable[int], int], Iterator[int]]


@dataclass(frozen=True)
class Alignment:
    """How one view lies on another.

    Attributes:
        correlation: -1 to 1, at the best position.
        mirrored: The first view was mirrored left to right.
        down: View pixels by which the second view's content lies below the (mirrored) first's.
    """

    correlation: float
    mirrored: bool
    down: int
    right: int


def whole_views(images: ImageSet) -> Views:
    """Each image without its letterbox bars, squashed to a view."""
    boxes = [bounds(valid) if valid.any() else (0, 0, *valid.shape) for valid in images.valid]
    return _views(images, [(left, top, right, bottom) for top, left, bottom, right in boxes])


def lesion_views(images: ImageSet) -> Views:
    """A square around each lesion, or around all lesions of an image, as a view.

    Raises:
        ValueError: A mask is empty.
    """
    return _views(images, [crop_box(*pair) for pair in zip(images.masks, images.valid, strict=True)])


def crop_box(mask: NDArray[np.bool_], valid: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """The square crop around a lesion, moved and cut so that it shows no letterbox bar: bars look alike everywhere.

    Args:
        mask: ``bool (H, W)``, True on lesions.
        valid: ``bool (H, W)``, True on the image.

    Returns:
        Left, top, right and bottom in pixels.

    Raises:
        ValueError: The mask is empty.
    """
    if not mask.any():
        raise ValueError("an empty mask has no lesion to crop to")
    top, left, bottom, right = bounds(mask)
    upper, leftmost, lower, rightmost = bounds(valid) if valid.any() else (0, 0, *valid.shape)
    side = min(CROP_MARGIN * max(bottom - top, right - left), lower - upper, rightmost - leftmost)
    y = float(np.clip((top + bottom - side) / 2, upper, lower - side))
    x = float(np.clip((left + right - side) / 2, leftmost, rightmost - side))
    return x, y, x + side, y + side


def correlations(
    queries: Views, targets: Views, *, shift: int = SHIFT, track: Track | None = None, what: str = "images"
) -> Views:
    """Best normalised correlation of every query with every target, over mirrors and shifts.

    The query's middle is laid on the target at every position within ``shift``; both are standardised over the very
    pixels that overlap. One matrix product per position does all pairs.

    ``shift``: Largest shift in view pixels, 0 to a quarter of the side.

    Returns:
        ``float32 (Q, T)``, -1 to 1. A view without any detail correlates at 0 with all.
    """
    inner = slice(shift, SIDE - shift)
    middles = [_standard(view[:, inner, inner]) for view in (queries, queries[:, :, ::-1])]
    best = np.full((len(queries), len(targets)), -1.0, dtype=np.float32)
    offsets: Iterable[int] = range((2 * shift + 1) ** 2)
    if track is not None:
        offsets = track(f"comparing {what}", offsets, (2 * shift + 1) ** 2)
    for offset in offsets:
        y, x = divmod(offset, 2 * shift + 1)
        for start in range(0, len(targets), _BLOCK):
            block = slice(start, start + _BLOCK)
            windows = _standard(targets[block, y : y + SIDE - 2 * shift, x : x + SIDE - 2 * shift]).T
            for middle in middles:
                np.maximum(best[:, block], middle @ windows, out=best[:, block])
    return best


def align(query: NDArray[np.float32], target: NDArray[np.float32], *, shift: int = SHIFT) -> Alignment:
    """The position behind one entry of `correlations`.

    ``query``: One view, ``(SIDE, SIDE)``.
    """
    inner = slice(shift, SIDE - shift)
    windows = np.lib.stride_tricks.sliding_window_view(target, (SIDE - 2 * shift,) * 2)
    flat = _standard(windows.reshape(-1, *windows.shape[2:]))
    found = []
    for mirrored, view in ((False, query), (True, query[:, ::-1])):
        scores = flat @ _standard(view[None, inner, inner])[0]
        down, right = divmod(int(scores.argmax()), 2 * shift + 1)
        found.append(Alignment(float(scores.max()), mirrored, down - shift, right - shift))
    return max(found, key=lambda alignment: alignment.correlation)


def _views(images: ImageSet, boxes: list[tuple[float, float, float, float]]) -> Views:
    views = np.empty((len(images), SIDE, SIDE), dtype=np.float32)
    for k, box in enumerate(boxes):
        # Averaging over the pixels that a view pixel covers keeps speckle from aliasing.
        views[k] = np.asarray(
            Image.fromarray(images.images[k].astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX, box=box)
        )
    views -= ndimage.gaussian_filter(views, (0.0, DETAIL, DETAIL))
    return views


def _standard(windows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of zero mean and unit length; all zeros where there is no detail."""
    rows = np.array(windows, dtype=np.float32).reshape(len(windows), -1)
    rows -= rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > _FLAT, length, np.inf)
    return rows


REPEATED = 0.9
"""Correlation within the synthetic set above which two images are one piece of evidence."""

_REPEAT_SHIFT = 2


@dataclass(frozen=True)
class Space:
    """Similarities (greater is nearer) of S synthetic, T training and H held-out images.

    Attributes:
        name: ``crop``, ``whole`` or ``radiomic``.
        train: Likewise; None where nobody named a training set.
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
    groups: Rows
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
