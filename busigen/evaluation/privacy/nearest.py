"""Nearest images, by correlation or by radiomic distance, and what their similarities tell of memory.

Images, or lesions with their surroundings, are reduced to views of 48 x 48 pixels, freed of everything but fine detail,
and correlated at every shift of up to five view pixels, upright and mirrored, whatever their gain and contrast. Nearest
unrelated images then correlate near 0.3 and shifted copies near 0.9.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage, stats
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from sklearn.metrics import pairwise

from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.fidelity.section import radiomic_vectors
from busigen.evaluation.physics.features import bounds, square
from busigen.evaluation.statistics.grouped import Rows

Values = NDArray[np.float64]
Views = NDArray[np.float32]  # ``float32 (N, SIDE, SIDE)``.

SIDE = 48  # Side of a view in pixels
SHIFT = 5  # Largest shift that is undone, in view pixels and along each axis: 10 % of the view's side
DETAIL = 3.0  # Standard deviation in view pixels of the Gaussian whose result is taken away
CROP_MARGIN = 1.4  # Side of a lesion's square crop over the longer side of its bounding box
REPEATED = 0.9  # Correlation within the synthetic set above which two images are one piece of evidence
COPY_SIGMAS = 6.0  # Robust standard deviations, on Fisher's z scale, that a copy lies above the usual nearest neighbour
LOW_FALSE_POSITIVES = 0.01  # Where an attack's true positives are read (Carlini et al. 2022, section IV)

_REPEAT_SHIFT = 2
_FLAT = 1e-3
_BLOCK = 2048


@dataclass(frozen=True)
class Space:
    """Similarities (greater is nearer) of S synthetic, T training and H held-out images.

    Attributes:
        name: ``crop``, ``whole`` or ``radiomic``.
        train: None where nobody named a training set; then ``(S, T)`` and ``(H, T)`` are None, too.
        groups: Groups of the synthetic images, in which repeated images are one.
        shared: Whether training and held-out images have a class in common, to which they were then restricted.
        usual: ``(H,)``, what is usual between a real image and its nearest neighbour: of held-out images among the
            training images or, where there are none, among held-out images of other groups.
        to_held: ``(S, H)``; the others by their names, ``within`` being ``(T, T)`` in the radiomic space.
        views: Synthetic, training (or held-out) views, where the space has them.
    """

    name: str
    label: str
    synthetic: ImageSet
    train: ImageSet | None
    held: ImageSet
    groups: Rows
    shared: bool
    usual: Values
    to_held: Values
    to_train: Values | None = None
    held_to_train: Values | None = None
    within: Values | None = None
    views: tuple[Views, Views] | None = None


def image_space(context: AuditContext, name: str) -> Space | None:
    """Correlations of ``crop`` (lesions with their surroundings) or ``whole`` images; None where a side is empty."""
    lesions = name == "crop"
    label = "lesion crops" if lesions else "whole images"
    synthetic, train, held = context.synthetic, context.train, context.real
    if lesions:
        synthetic, held = synthetic.with_lesions(), held.with_lesions()
        train = None if train is None else train.with_lesions()
    shared = True
    if train is not None and len(train):
        # A class that one side lacks would tell members from others without any memory. None in common mostly means
        # that one side names no classes, which is no reason to compare nothing.
        common = np.intersect1d(train.classes, held.classes)
        shared = bool(len(common))
        if shared:
            train, held = _only(train, common), _only(held, common)
    if not (len(synthetic) and len(held) and (train is None or len(train))):
        return None
    mine, held_views = views(synthetic, lesions=lesions), views(held, lesions=lesions)

    def compare(first: Views, second: Views, sides: str) -> Values:
        def track(offsets: range) -> Iterable[int]:
            return context.track(f"comparing {label}, {sides}", offsets, len(offsets))

        return correlations(first, second, track=track).astype(np.float64)

    alike = correlations(mine, mine, shift=_REPEAT_SHIFT) > REPEATED
    # An image that a set repeats is one piece of evidence, not many.
    edges = coo_array(alike | (synthetic.groups[:, None] == synthetic.groups[None, :]))
    groups = connected_components(edges, directed=False)[1].astype(np.int64)
    about = (name, label, synthetic, train, held, groups, shared)
    to_held = compare(mine, held_views, "synthetic with real")
    if train is None:
        same = held.groups[:, None] == held.groups[None, :]
        usual = np.where(same, -1.0, compare(held_views, held_views, "real with real")).max(axis=1)
        return Space(*about, usual, to_held, views=(mine, held_views))
    train_views = views(train, lesions=lesions)
    to_train = compare(mine, train_views, "synthetic with training")
    held_to_train = compare(held_views, train_views, "real with training")
    return Space(*about, held_to_train.max(axis=1), to_held, to_train, held_to_train, views=(mine, train_views))


def radiomic_space(context: AuditContext, crop: Space) -> Space | None:
    """Negative distances between radiomic vectors of the images of ``crop``; None without a training set."""
    if crop.train is None:
        return None
    train, synthetic, held = radiomic_vectors(context, crop.train, crop.synthetic, crop.held)
    to_held, to_train = (-pairwise.euclidean_distances(synthetic, others) for others in (held, train))
    held_to_train, within = -pairwise.euclidean_distances(held, train), -pairwise.euclidean_distances(train)
    between = {"to_held": to_held, "to_train": to_train, "held_to_train": held_to_train, "within": within}
    usual = held_to_train.max(axis=1)
    return replace(crop, name="radiomic", label="radiomic features", usual=usual, views=None, **between)


def _only(images: ImageSet, classes: NDArray[np.str_]) -> ImageSet:
    rows = np.isin(images.classes, classes)
    # Taking rows copies gigabytes of large sets.
    return images if rows.all() else images.take(rows)


def views(images: ImageSet, *, lesions: bool) -> Views:
    """Squares around the lesions of each image, or each image without its letterbox bars, squashed."""
    found = np.empty((len(images), SIDE, SIDE), dtype=np.float32)
    for k, (pixels, mask, valid) in enumerate(zip(images.images, images.masks, images.valid, strict=True)):
        if lesions:
            box = crop_box(mask, valid)
        else:
            top, left, bottom, right = _image_bounds(valid)
            box = (left, top, right, bottom)
        # Averaging over the pixels that a view pixel covers keeps speckle from aliasing.
        image = Image.fromarray(pixels.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BOX, box=box)
        found[k] = np.asarray(image)
    found -= ndimage.gaussian_filter(found, (0.0, DETAIL, DETAIL))
    return found


def crop_box(mask: NDArray[np.bool_], valid: NDArray[np.bool_]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the square crop around a lesion; a `ValueError` where the mask is empty.

    It is moved and cut so that it shows no letterbox bar: bars look alike everywhere.
    """
    if not mask.any():
        raise ValueError("an empty mask has no lesion to crop to")
    top, left, bottom, right = bounds(mask)
    longer = CROP_MARGIN * max(bottom - top, right - left)
    y, x, side = square((top, left, bottom, right), longer, _image_bounds(valid))
    return x, y, x + side, y + side


def _image_bounds(valid: NDArray[np.bool_]) -> tuple[int, int, int, int]:
    return bounds(valid) if valid.any() else (0, 0, *valid.shape)


def correlations(
    queries: Views, targets: Views, *, shift: int = SHIFT, track: Callable[[range], Iterable[int]] = iter
) -> Views:
    """Best normalised correlation of every query with every target, over mirrors and shifts: ``float32 (Q, T)``.

    The query's middle is laid on the target at every position within ``shift`` view pixels (at most a quarter of the
    side); both are standardised over the very pixels that overlap. A view without any detail correlates at 0 with all.
    ``track``: Shows progress over the positions.
    """
    inner = slice(shift, SIDE - shift)
    middles = [_standard(view[:, inner, inner]) for view in (queries, queries[:, :, ::-1])]
    best = np.full((len(queries), len(targets)), -1.0, dtype=np.float32)
    for offset in track(range((2 * shift + 1) ** 2)):
        y, x = divmod(offset, 2 * shift + 1)
        for start in range(0, len(targets), _BLOCK):
            block = slice(start, start + _BLOCK)
            windows = _standard(targets[block, y : y + SIDE - 2 * shift, x : x + SIDE - 2 * shift]).T
            for middle in middles:
                np.maximum(best[:, block], middle @ windows, out=best[:, block])
    return best


def align(query: NDArray[np.float32], target: NDArray[np.float32]) -> tuple[float, bool]:
    """One entry of `correlations`, of two views ``(SIDE, SIDE)``, and whether the query was mirrored for it."""
    inner = slice(SHIFT, SIDE - SHIFT)
    windows = np.lib.stride_tricks.sliding_window_view(target, (SIDE - 2 * SHIFT,) * 2)
    flat = _standard(windows.reshape(-1, *windows.shape[2:]))
    both = (_standard(view[None, inner, inner])[0] for view in (query, query[:, ::-1]))
    upright, mirrored = (float((flat @ middle).max()) for middle in both)
    return max(upright, mirrored), mirrored > upright


def _standard(windows: NDArray[Any]) -> NDArray[np.float32]:
    """Rows of zero mean and unit length; all zeros where there is no detail."""
    rows = np.array(windows, dtype=np.float32).reshape(len(windows), -1)
    rows -= rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > _FLAT, length, np.inf)
    return rows


def copy_threshold(reference: Values) -> float:
    """The correlation above which an image counts as a copy of its nearest neighbour.

    ``reference``: Such correlations of real images that certainly are no copies. Median and median absolute deviation
    of their Fisher z leave a stray near-duplicate among them without influence, which their maximum would not.
    """
    z = np.arctanh(reference.clip(-0.999999, 0.999999))
    middle = float(np.median(z))
    return float(np.tanh(middle + COPY_SIGMAS * 1.4826 * float(np.median(np.abs(z - middle)))))


def copied_share(nearest: Values, reference: Values) -> float:
    """Share of ``nearest`` above the threshold that ``reference`` sets."""
    return float((nearest > copy_threshold(reference)).mean())


def auc(greater: Values, smaller: Values) -> float:
    """Chance that a value of the first exceeds one of the second: Mann and Whitney's U, scaled. 0.5 where alike."""
    ranks = stats.rankdata(np.concatenate([greater, smaller]))
    n, m = len(greater), len(smaller)
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def detected(members: Values, others: Values) -> float:
    """Share of members that lie above 99 % of the others: true positives at 1 % false positives."""
    return float((members > np.quantile(others, 1 - LOW_FALSE_POSITIVES)).mean())


def authentic(to_train: Values, within_train: Values, train_groups: Rows) -> NDArray[np.bool_]:
    """Which images are not nearer to their nearest training image than that is to any other group's training image.

    Alaa et al. 2022, section 3.3. ``to_train``: ``(N, T)`` similarities. ``within_train``: ``(T, T)`` similarities.
    """
    others = np.where(train_groups[:, None] == train_groups[None, :], -np.inf, within_train).max(axis=1)
    nearest = to_train.argmax(axis=1)
    return np.asarray(to_train.max(axis=1) <= others[nearest])
