"""A contact sheet that shows at a glance what a dataset holds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy import ndimage

from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime.sample import Sample

COLOURS = {"benign": (0, 200, 255), "malignant": (255, 96, 64)}
"""Contour and label colour per class, RGB; told apart by colour-blind eyes too."""

_LABEL_HEIGHT = 22
_FONT_SIZE = 14


def contact_sheet(samples: Sequence[Sample], columns: int = 8) -> Image.Image:
    """Draw every sample twice, side by side: as it is, and with its mask's contour; its class stands below.

    The contour runs one pixel outside the mask, so the lesion itself stays visible.

    Args:
        samples: what to draw, row by row.
        columns: images per row, an even number; a sample takes two.

    Returns:
        RGB image, ``256 * columns`` wide at most; equal samples give equal pixels.

    Raises:
        ValueError: no samples, or ``columns`` is odd or below 2.
    """
    if not samples:
        raise ValueError("a contact sheet needs at least one sample, got none")
    if columns < 2 or columns % 2:
        raise ValueError(f"columns must be an even number from 2, got {columns}")
    per_row = min(columns // 2, len(samples))
    rows = -(-len(samples) // per_row)
    sheet = Image.new("RGB", (2 * RESOLUTION * per_row, (RESOLUTION + _LABEL_HEIGHT) * rows))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(_FONT_SIZE)
    for position, sample in enumerate(samples):
        left = position % per_row * 2 * RESOLUTION
        top = position // per_row * (RESOLUTION + _LABEL_HEIGHT)
        colour = COLOURS.get(sample.label, (255, 255, 255))
        sheet.paste(Image.fromarray(sample.image), (left, top))
        sheet.paste(Image.fromarray(outline(sample.image, sample.mask, colour)), (left + RESOLUTION, top))
        draw.text((left + 4, top + RESOLUTION + 2), f"{sample.label} {sample.index}", fill=colour, font=font)
    return sheet


def outline(image: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> NDArray[np.uint8]:
    """Draw a one-pixel contour around a mask, outside it.

    Args:
        image: (H, W) uint8.
        mask: (H, W) bool.
        colour: RGB, 0 to 255.

    Returns:
        (H, W, 3) uint8.
    """
    painted = np.repeat(image[..., None], 3, axis=2)
    painted[ndimage.binary_dilation(mask) & ~mask] = colour
    return painted


def pick_evenly(manifest: pl.DataFrame, per_class: int = 8) -> list[int]:
    """Indices of up to ``per_class`` samples of every class, spread evenly over the dataset, in index order."""
    picked: list[int] = []
    for label in LESION_CLASSES:
        indices = manifest.filter(pl.col("class") == label)["index"].to_numpy()
        if indices.size:
            positions = np.linspace(0, indices.size - 1, min(per_class, indices.size)).round().astype(int)
            picked += [int(index) for index in indices[positions]]
    return sorted(picked)
