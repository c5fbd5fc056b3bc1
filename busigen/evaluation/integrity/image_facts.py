"""What the integrity section measures of every image and mask on its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.overlays import find_overlays
from busigen.evaluation.context import ImageSet
from busigen.evaluation.integrity.mask_edges import edge_fit

TINY = 0.002
"""Share of the image below which a mask is tiny; BUSI's smallest lesion takes 0.003."""

HUGE = 0.60
"""Share of the image above which a mask is huge; BUSI's largest lesion takes 0.56."""

SPECK = 9
"""Pixels below which a part of a mask is a speck that resampling may have left."""

_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.bool_)


def image_facts(images: ImageSet, done: Callable[[], None]) -> dict[str, NDArray[np.float64]]:
    """Measure every image.

    Args:
        images: The set.
        done: Called after every image.

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
    sizes = np.bincount(ndimage.label(mask, structure=_EIGHT_NEIGHBOURS)[0].ravel())[1:]
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
