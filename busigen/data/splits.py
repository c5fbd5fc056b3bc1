"""Images that belong together (copies, near-duplicates, one patient), and splits that keep them together."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from busigen.data.sources.files import natural_key
from busigen.registry import SPLITS

# Correlation of two thumbnails above which the images belong together. With single link, BUSI's groups are exactly
# those of the published list, and no two patients of BUS-BRA are linked (at 0.85, nine pairs chain 15 images).
NEAR_DUPLICATE = 0.90
# Correlation above which two images are one frame, cropped or annotated differently. Between BUSI's classes, pairs of
# the same frame by eye lie at 0.949 or above, those of different lesions at 0.908 and below.
SAME_FRAME = 0.93
# Correlation of two images' aligned fine structure from which they are one frame: copies of 60 images that were
# mirrored, turned by up to 15 degrees or cropped by 3 to 10 % a side lie at 0.80 and above, different lesions of BUSI
# and BUS-BRA at 0.64 and below. Copies cropped at one side alone are not found reliably.
COPY = 0.70

EXCLUDED = "excluded"  # Split of an image that would link two splits; it takes part in nothing.
# Whose images stay when two splits turn out to be linked: what a model is judged on must not change under it.
_PROTECTED = ("test", "val", "train")

# Given the indices of some images, their group numbers when the others do not exist.
Regroup = Callable[[NDArray[np.int64]], NDArray[np.int64]]
_THUMBNAIL_SIDE, _SIDE, _MARGIN = 64, 32, 3
_FINE, _COARSE = 0.6, 2.0
_TURNS, _SCALES = (6.0, 12.0), (0.9, 0.8)
_BLOCK_ROWS = 512

_Structure = NDArray[np.float32]
# Positions of images in two arrays, pair by pair, some at a time, perhaps several times.
_Pairs = Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]


def copies_of(
    first: NDArray[np.float32], aspects: NDArray[np.float64], second: NDArray[np.float32], others: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """``bool (N,)``: which of the first are copies of any of the second, M thumbnails with ``others`` as aspects."""
    found = np.zeros(len(first), np.bool_)
    for rows, _ in _copies(first, aspects, second):
        found[rows] = True
    # What was cut from the second is compared the other way round.
    for _, columns in _copies(second, others, first):
        found[columns] = True
    return found


def _copies(first: NDArray[np.float32], aspects: NDArray[np.float64], second: NDArray[np.float32]) -> _Pairs:
    """Pairs of which the first, moved in any of the ways that are tried, is the second."""
    inner = slice(_MARGIN, _SIDE - _MARGIN)
    targets = unit(_structure(second)[:, inner, inner])
    for start in range(0, len(first), _BLOCK_ROWS):
        structure = _structure(first[start : start + _BLOCK_ROWS])
        for moved in _moved(structure, aspects[start : start + _BLOCK_ROWS]):
            rows, columns = np.nonzero(unit(moved) @ targets.T > COPY)
            yield rows + start, columns


def _structure(thumbnails: NDArray[np.float32]) -> _Structure:
    """Edges and grains one to six pixels wide, ``(N, 32, 32)``, as strong everywhere; layers and depth are wider."""
    count = len(thumbnails)
    small = thumbnails.reshape(count, _SIDE, 2, _SIDE, 2).mean(axis=(2, 4), dtype=np.float32)
    band = ndimage.gaussian_filter(small, (0, _FINE, _FINE)) - ndimage.gaussian_filter(small, (0, _COARSE, _COARSE))
    strength = np.sqrt(ndimage.gaussian_filter(band * band, (0, _COARSE, _COARSE)))
    mean = strength.mean(axis=(1, 2), keepdims=True)
    # A grey level is what rounding leaves of an image without structure.
    return np.where(mean > 1.0, band / (strength + 0.25 * mean + 1e-3), 0.0).astype(np.float32)


def _moved(structure: _Structure, aspects: NDArray[np.float64]) -> Iterator[_Structure]:
    """The middle of every structure, mirrored, turned and cropped in every way that is tried."""
    # A pair is compared both ways round, so that turns to the other side and crops of the first need no trial of their
    # own; a turn of a mirror image is its own inverse, so that there both sides do.
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
    return np.asarray(upper * (1 - down) + lower * down)


def unit(images: NDArray[np.float32]) -> NDArray[np.float32]:
    """Rows of zero mean and unit length, so that their products are correlations; a flat image correlates with none."""
    rows: NDArray[np.float32] = images.reshape(len(images), -1)
    rows = rows - rows.mean(axis=1, keepdims=True)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    rows /= np.where(length > 1e-3, length, np.inf)
    return rows


def thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A native image squashed to ``float32 (64, 64)`` for comparison; other filters change some of BUSI's groups."""
    small = Image.fromarray(pixels).resize((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE), Image.Resampling.BILINEAR)
    return np.asarray(small, dtype=np.float32)


def near_duplicate_groups(
    thumbnails: NDArray[np.float32], patients: Sequence[str | None], aspects: Sequence[float] | None = None
) -> NDArray[np.int64]:
    """Group images that look alike, are mirrored, turned or cropped copies, or show the same patient, by single link.

    ``thumbnails`` are ``float32 (N, 64, 64)`` from `thumbnail`; an unknown patient links nothing; ``aspects`` are width
    over height, None where all images are squares. Numbers begin at 0, in order of first appearance. Arguments that
    differ in length raise ValueError.
    """
    if len(patients) != len(thumbnails):
        raise ValueError(f"{len(thumbnails)} thumbnails but {len(patients)} patients")
    first: dict[str, int] = {}
    labels = np.array(
        [index if patient is None else first.setdefault(patient, index) for index, patient in enumerate(patients)],
        dtype=np.int64,
    )
    for rows, columns in _alike(thumbnails, NEAR_DUPLICATE, aspects):
        # Merging block by block keeps one label per image instead of every pair, of which there may be N * N.
        if rows.size:
            links = np.ones(rows.size, dtype=np.bool_), (labels[rows], labels[columns])
            side = int(labels.max()) + 1
            _, merged = connected_components(coo_array(links, shape=(side, side)), directed=False)
            labels = merged.astype(np.int64)[labels]
    _, firsts, inverse = np.unique(labels, return_index=True, return_inverse=True)
    return np.asarray(np.argsort(np.argsort(firsts))[inverse])


def class_conflicts(
    thumbnails: NDArray[np.float32], classes: Sequence[str], aspects: Sequence[float] | None = None
) -> NDArray[np.bool_]:
    """``bool (N,)``: the images of which the same frame, or a copy of it, also stands under another class.

    Arguments and errors are those of `near_duplicate_groups`, with N class names.
    """
    if len(classes) != len(thumbnails):
        raise ValueError(f"{len(thumbnails)} thumbnails but {len(classes)} classes")
    names = np.asarray(classes, dtype=np.str_)
    conflict = np.zeros(len(thumbnails), dtype=np.bool_)
    for rows, columns in _alike(thumbnails, SAME_FRAME, aspects):
        differ = names[rows] != names[columns]
        conflict[rows[differ]] = True
        conflict[columns[differ]] = True
    return conflict


def _alike(thumbnails: NDArray[np.float32], threshold: float, aspects: Sequence[float] | None) -> _Pairs:
    """Pairs of images whose thumbnails correlate above a threshold, and of copies."""
    ratios = np.ones(len(thumbnails)) if aspects is None else np.asarray(aspects, dtype=np.float64)
    if len(ratios) != len(thumbnails):
        raise ValueError(f"{len(thumbnails)} thumbnails but {len(ratios)} aspects")
    scores = unit(thumbnails)
    for start in range(0, len(scores), _BLOCK_ROWS):
        rows, columns = np.nonzero(scores[start : start + _BLOCK_ROWS] @ scores[start:].T > threshold)
        later = columns > rows
        yield rows[later] + start, columns[later] + start
    for rows, columns in _copies(thumbnails, ratios, thumbnails):
        other = rows != columns
        yield rows[other], columns[other]


def draw_split(seed: int, key: str) -> str:
    """The split of a new group, whose name ``key`` must not change when images are added, by ``registry.SPLITS``."""
    digest = hashlib.sha256(f"{seed}\0{key}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64 * sum(SPLITS.values())
    for name, share in SPLITS.items():
        position -= share
        if position < 0:
            return name
    return next(reversed(SPLITS))


def assign_splits(
    ids: Sequence[str], patients: Sequence[str | None], earlier: Sequence[str | None], regroup: Regroup, *, seed: int
) -> tuple[list[str], NDArray[np.int64]]:
    """Give every image a split such that no group spans two.

    Images keep the split they had; a new one joins that of its group, or draws one if the group is new. A new image
    that links two splits is excluded. Where images that already have splits turn out to be linked (a patient's name
    was added, say), those of the test split stay and the others are excluded.

    ``earlier`` are splits of an earlier run, None for new images. Gives N split names and N group numbers; an excluded
    image is a group of its own.
    """
    splits: list[str | None] = list(earlier)
    groups = regroup(np.arange(len(ids)))
    # Of linked splits, first the new images leave that link them, then those that had another split than the kept one.
    for known_too in (False, True):
        for members in _members(groups):
            present = {split for index in members if (split := splits[index]) is not None and split != EXCLUDED}
            if len(present) > 1:
                kept = min(present, key=_PROTECTED.index) if known_too else None
                for index in members:
                    if splits[index] is None or (known_too and splits[index] != kept):
                        splits[index] = EXCLUDED
        groups = _regroup_rest(splits, regroup, groups)
    for members in _members(groups):
        # A group has one split by now; an excluded image is a group of its own.
        split = next((split for index in members if (split := splits[index]) is not None), None)
        if split is None:
            named = [patient for index in members if (patient := patients[index]) is not None]
            split = draw_split(seed, min(named or [ids[index] for index in members], key=natural_key))
        for index in members:
            splits[index] = split
    return [split for split in splits if split is not None], groups


def _regroup_rest(splits: Sequence[str | None], regroup: Regroup, groups: NDArray[np.int64]) -> NDArray[np.int64]:
    """Groups without the links that run through excluded images."""
    excluded = np.array([split == EXCLUDED for split in splits], dtype=np.bool_)
    if not excluded.any():
        return groups
    numbers = np.empty(len(splits), dtype=np.int64)
    rest = regroup(np.flatnonzero(~excluded))
    numbers[~excluded] = rest
    numbers[excluded] = np.arange(excluded.sum()) + (int(rest.max()) + 1 if rest.size else 0)
    return numbers


def _members(groups: NDArray[np.int64]) -> list[list[int]]:
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, group in enumerate(groups.tolist()):
        members[group].append(index)
    return list(members.values())
