"""What the integrity section measures on every image, how its masks fit the edges, and which images repeat another."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.overlays import find_overlays
from busigen.data.splits import NEAR_DUPLICATE
from busigen.evaluation.context import ImageSet
from busigen.evaluation.physics.regions import EIGHT_NEIGHBOURS
from busigen.evaluation.reading.inputs import correlations, thumbnails
from busigen.evaluation.statistics.grouped import Side
from busigen.records import read_json
from busigen.registry import SYNTHETIC

Facts = dict[str, NDArray[np.float64]]
"""One number per image, by name; NaN where it has none."""


@dataclass(frozen=True)
class Measure:
    """One figure of the section.

    Attributes:
        fact: Name in ``image_facts``, or ``exact``, ``near``, ``mask`` of ``find_duplicates``.
        key: The figure's key after ``integrity.``.
        defect: Sentence of the finding, with ``{value}`` and ``{floor}``.
        side: Where the synthetic mean must lie to be a defect; None compares distributions.
        unit: ``%`` for shares.
        absolute: Flagged without a test wherever it exceeds the floor.
        repeats: Tested by image, not by group: repeats make up a group, and it is their number that counts.
    """

    fact: str
    key: str
    label: str
    defect: str
    side: Side | None = "greater"
    unit: str = "%"
    absolute: bool = False
    repeats: bool = False
    headline: bool = False


MEASURES = tuple(Measure(**row) for row in read_json(Path(__file__).with_name("measures.json")))
"""In the order of the report."""

REACH = 16
"""Farthest displacement in pixels, down and across, at which the outline is tried."""

STEP = 2
"""Pixels between tried displacements; finer ones move the best place by less than annotators disagree."""

BLUR = 2.0
"""Width in pixels of the Gaussian before the gradient, above a speckle grain: speckle has edges everywhere."""

MIN_OUTLINE = 24
"""Outline pixels on the image, away from its rim, that a judgement needs."""

RIM = 3
"""Pixels along the image's rim that do not count: the step to a letterbox bar is no lesion's edge."""

_DOWN, _ACROSS = (
    part.ravel()[:, None] for part in np.mgrid[-REACH : REACH + 1 : STEP, -REACH : REACH + 1 : STEP].astype(np.int64)
)
_DISTANCE = np.hypot(_DOWN, _ACROSS).ravel()


@dataclass(frozen=True)
class EdgeFit:
    """How well an outline fits.

    Attributes:
        displacement: Pixels from the outline's place to the place nearby where it fits best, 0 to 22.6.
        contrast: Grey levels per pixel by which the image brightens across the outline in its place, less the mean over
            all places tried, in standard deviations over them.
    """

    displacement: float
    contrast: float


def edge_fit(image: NDArray[np.uint8], mask: NDArray[np.bool_], valid: NDArray[np.bool_]) -> EdgeFit | None:
    """Compare the outline's place with every place up to ``REACH`` pixels away.

    In each place the smoothed image's gradient is averaged along the outline's outward normals. Nearly all lesions are
    darker than what is around them, so the sum is largest where outline and edge agree.

    Args:
        image: ``uint8 (H, W)``.
        mask: ``bool (H, W)``.
        valid: ``bool (H, W)``, pixels that are image.

    Returns:
        The fit, or None where less than ``MIN_OUTLINE`` pixels of outline lie on the image.
    """
    inside = ndimage.binary_erosion(valid, iterations=RIM)
    rows, columns = np.nonzero((mask ^ ndimage.binary_erosion(mask)) & inside)
    if len(rows) < MIN_OUTLINE:
        return None
    slope = np.gradient(ndimage.gaussian_filter(image.astype(np.float32), BLUR))
    normal = -np.stack(np.gradient(ndimage.gaussian_filter(mask.astype(np.float32), BLUR)))[:, rows, columns]
    normal /= np.linalg.norm(normal, axis=0) + 1e-6
    down, across = rows + _DOWN, columns + _ACROSS
    height, width = image.shape
    within = (down >= 0) & (down < height) & (across >= 0) & (across < width)
    down, across = down.clip(0, height - 1), across.clip(0, width - 1)
    within &= inside[down, across]
    rise = (slope[0][down, across] * normal[0] + slope[1][down, across] * normal[1]) * within
    fit = rise.sum(axis=1) / np.maximum(within.sum(axis=1), 1)
    # A place where most of the outline hangs over the rim is judged by too little of it.
    tried = within.mean(axis=1) >= 0.5
    here = int(np.argmin(_DISTANCE))
    if not tried[here]:
        return None
    best = int(np.argmax(np.where(tried, fit, -np.inf)))
    contrast = (fit[here] - fit[tried].mean()) / (fit[tried].std() + 1e-6)
    return EdgeFit(displacement=float(_DISTANCE[best]), contrast=float(contrast))


TINY = 0.002
"""Share of the image below which a mask is tiny; BUSI's smallest lesion takes 0.003."""

HUGE = 0.60
"""Share of the image above which a mask is huge; BUSI's largest lesion takes 0.56."""

SPECK = 9
"""Pixels below which a part of a mask is a speck that resampling may have left."""


def image_facts(images: ImageSet, done: Callable[[], None]) -> Facts:
    """Measure every image.

    Returns:
        Per measure one number per image, NaN where it has none. Shares are 0 and 1: ``colour``, ``depth`` (more or less
        than 8 bits), ``text`` and ``calipers`` (as seen in the working frame, so that sets of any resolution compare),
        ``empty`` (no lesion marked, in an image not labelled normal that has a mask file), ``contradiction`` (a lesion
        marked in a normal image); and, NaN for empty masks, ``tiny``, ``huge``, ``parts`` (more than one), ``holes``,
        ``border``. Numbers:
        ``aspect`` (width / height of the image), ``levels`` (distinct grey levels), ``range`` (99th less 1st percentile
        of grey), ``clipped`` (share of pixels at 255), ``displacement`` and ``contrast`` (``mask_edges.EdgeFit``).
    """
    rows = []
    # Where there is no mask file, nobody marked nothing: that is another defect, and said apart.
    to_mark = (images.classes != "normal") & (images.table["mask_files"] > 0).to_numpy()
    for image, mask, valid, label, lesion in zip(
        images.images, images.masks, images.valid, images.classes, to_mark, strict=True
    ):
        rows.append({**_pixels(image, valid), **_mask(image, mask, valid, str(label))})
        if not lesion:
            rows[-1]["empty"] = float("nan")
        done()
    facts = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in rows[0]} if rows else {}
    facts["colour"] = images.table["colour"].to_numpy().astype(np.float64)
    modes = images.table["mode"].to_list()
    facts["depth"] = np.array([np.nan if mode is None else float(mode[0] in "IF") for mode in modes])
    return facts


def _pixels(image: NDArray[np.uint8], valid: NDArray[np.bool_]) -> dict[str, float]:
    grey = image[valid]
    if not grey.size:
        return dict.fromkeys(("aspect", "levels", "range", "clipped", "text", "calipers"), float("nan"))
    low, high = np.percentile(grey, [1, 99])
    overlays = find_overlays(image)
    return {
        "aspect": float(valid.any(axis=0).sum() / valid.any(axis=1).sum()),
        "levels": float(len(np.unique(grey))),
        "range": float(high - low),
        "clipped": float((grey == 255).mean()),
        "text": float(overlays.text),
        "calipers": float(overlays.calipers),
    }


def _mask(image: NDArray[np.uint8], mask: NDArray[np.bool_], valid: NDArray[np.bool_], label: str) -> dict[str, float]:
    marked = bool(mask.any())
    facts = {
        "empty": float(not marked),
        "contradiction": float(marked) if label == "normal" else float("nan"),
        **dict.fromkeys(("tiny", "huge", "parts", "holes", "border", "displacement", "contrast"), float("nan")),
    }
    if not marked:
        return facts
    area = mask.sum() / max(int(valid.sum()), 1)
    sizes = np.bincount(ndimage.label(mask, structure=EIGHT_NEIGHBOURS)[0].ravel())[1:]
    rim = valid & ~ndimage.binary_erosion(valid)
    facts |= {
        "tiny": float(area < TINY),
        "huge": float(area > HUGE),
        "parts": float((sizes >= SPECK).sum() > 1),
        "holes": float((ndimage.binary_fill_holes(mask) & ~mask).sum() >= SPECK),
        "border": float((mask & rim).any()),
    }
    fit = edge_fit(image, mask, valid)
    return facts if fit is None else {**facts, "displacement": fit.displacement, "contrast": fit.contrast}


_BLOCK = 512


def find_duplicates(images: ImageSet) -> tuple[Facts, NDArray[np.int64]]:
    """Which images repeat an earlier one, as facts of 0 and 1, and the most alike of the earlier ones, or -1.

    ``exact``: the same pixels. ``near``: thumbnails correlate above ``splits.NEAR_DUPLICATE``; pairs painted into one
    healthy image do not count. ``mask``: the same lesion mask, pixel by pixel.
    """
    near, twin = _near(images)
    marked = np.asarray(images.masks.any(axis=(1, 2)))
    found = {"exact": _repeats(images.images), "near": near, "mask": _repeats(images.masks) & marked}
    return {name: rows.astype(np.float64) for name, rows in found.items()}, twin


def _repeats(arrays: NDArray[np.uint8] | NDArray[np.bool_]) -> NDArray[np.bool_]:
    seen: set[bytes] = set()
    repeats = np.zeros(len(arrays), np.bool_)
    for row, array in enumerate(arrays):
        digest = hashlib.sha256(np.ascontiguousarray(array).data).digest()
        repeats[row] = digest in seen
        seen.add(digest)
    return repeats


def _near(images: ImageSet) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    small = thumbnails(images)
    # Images of one background are alike by construction: each image without a real one gets a name of its own.
    names = [
        name if name not in (None, SYNTHETIC) else f"#{row}" for row, name in enumerate(images.table["background"])
    ]
    _, background = np.unique(np.array(names, dtype=np.str_), return_inverse=True)
    near = np.zeros(len(images), np.bool_)
    twin = np.full(len(images), -1, np.int64)
    rows = np.arange(len(images))
    for start in range(0, len(images), _BLOCK):
        block = rows[start : start + _BLOCK]
        alike = correlations(small[block], small[: block[-1] + 1])
        earlier = (rows[None, : block[-1] + 1] < block[:, None]) & (
            background[None, : block[-1] + 1] != background[block][:, None]
        )
        alike = np.where(earlier, alike, -1.0)
        best = alike.argmax(axis=1)
        found = alike[np.arange(len(block)), best] > NEAR_DUPLICATE
        near[block], twin[block] = found, np.where(found, best, -1)
    return near, twin
