"""Sample sheets: small grids of pictures drawn during training, for eyes rather than for figures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Tensor

Picture = NDArray[np.uint8]


def to_picture(pixels: Tensor) -> Picture:
    """``(1, H, W)`` or ``(H, W)`` in [-1, 1] as uint8."""
    array = pixels.detach().float().cpu().numpy()
    return np.clip(np.rint((array.reshape(array.shape[-2:]) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def outlined(picture: Picture, mask: NDArray[np.bool_]) -> Picture:
    """A white line one pixel outside the mask, so that what is inside stays visible."""
    rim = ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_dilation(mask)
    return np.where(rim, 255, picture).astype(np.uint8)


def grid(rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """Pictures of one size in rows, two pixels apart; short rows are left open."""
    height, width = rows[0][0].shape
    sheet = Image.new("L", (max(map(len, rows)) * (width + 2), len(rows) * (height + 2)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * (width + 2), y * (height + 2)))
    return sheet
