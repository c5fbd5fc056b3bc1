"""Drawn image sets in the working frame, letterboxed, two images to a patient."""

from __future__ import annotations

import numpy as np
import polars as pl

from busigen.evaluation.context import ImageSet
from tests.harness.synthetic_datasets import draw_frame

BAR = 20
"""Rows of letterbox above and below every image."""


def synthetic_set(count: int, seed: int, classes: tuple[str, ...] = ("benign", "malignant")) -> ImageSet:
    rng = np.random.default_rng(seed)
    names = [classes[k // 2 % len(classes)] for k in range(count)]
    images = np.zeros((count, 256, 256), np.uint8)
    masks, valid = np.zeros(images.shape, np.bool_), np.zeros(images.shape, np.bool_)
    inside = slice(BAR, 256 - BAR)
    valid[:, inside] = True
    for k, name in enumerate(names):
        frame = draw_frame(rng, (256, 256 - 2 * BAR), name)
        images[k, inside] = frame.pixels
        for lesion in frame.lesions:
            masks[k, inside] |= lesion
    table = pl.DataFrame(
        {
            "id": [f"{seed}-{k}" for k in range(count)],
            "class": names,
            "group": [1000 * seed + k // 2 for k in range(count)],
            "background": pl.Series([None] * count, dtype=pl.String),
        }
    )
    return ImageSet(f"drawn {seed}", images, masks, valid, np.zeros_like(masks), table)
