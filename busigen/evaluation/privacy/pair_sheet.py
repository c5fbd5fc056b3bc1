"""Contact sheet of images and their nearest neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from busigen.runtime.atomic import atomic_path, output_errors

TILE = 140
"""Side of a tile in pixels. Eight columns of two tiles stay below 400 kB even if nothing could be compressed."""

COLUMNS = 8
_TEXT = 14


def write_pairs(path: Path, pairs: list[tuple[NDArray[np.uint8], NDArray[np.uint8], str]]) -> None:
    """Write at most `COLUMNS` pairs: the first image above, the second below, the text beneath.

    Args:
        path: The PNG file; replaced if it exists.
        pairs: Two grey images, ``uint8 (H, W)`` of any size, and a short text.

    Raises:
        OutputError: The file cannot be written.
    """
    shown = pairs[:COLUMNS]
    sheet = Image.new("L", (TILE * max(len(shown), 1), 2 * TILE + _TEXT), 255)
    draw = ImageDraw.Draw(sheet)
    for column, (above, below, text) in enumerate(shown):
        for row, pixels in enumerate((above, below)):
            tile = Image.fromarray(pixels).resize((TILE - 2, TILE - 2), Image.Resampling.LANCZOS)
            sheet.paste(tile, (column * TILE + 1, row * TILE + 1))
        draw.text((column * TILE + 3, 2 * TILE + 1), text, fill=0)
    with output_errors(path.parent), atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG", optimize=True)
