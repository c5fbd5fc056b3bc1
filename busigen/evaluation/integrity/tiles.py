"""A sheet of single images with captions, for a section's pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from busigen.runtime.atomic import atomic_file
from busigen.runtime.preview import outline

_SIDE = 192
_LABEL = 18
_CONTOUR = (0, 200, 255)


@dataclass(frozen=True)
class Tile:
    """One image of ``uint8 (256, 256)``, the mask whose contour is drawn, and a short caption."""

    image: NDArray[np.uint8]
    mask: NDArray[np.bool_]
    caption: str


def write_tiles(tiles: Sequence[Tile], path: Path, columns: int = 4) -> None:
    """Draw images row by row into a PNG.

    Raises:
        OSError: it cannot be written.
        ValueError: there is no tile.
    """
    if not tiles:
        raise ValueError("a sheet needs at least one tile, got none")
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (_SIDE * columns, (_SIDE + _LABEL) * rows))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, tile in enumerate(tiles):
        left, top = place % columns * _SIDE, place // columns * (_SIDE + _LABEL)
        painted = Image.fromarray(outline(tile.image, tile.mask, _CONTOUR))
        sheet.paste(painted.resize((_SIDE - 2, _SIDE - 2), Image.Resampling.BILINEAR), (left, top))
        draw.text((left + 3, top + _SIDE), tile.caption[:28], fill=(255, 255, 255), font=font)
    with atomic_file(path) as file:
        sheet.save(file, "PNG")
