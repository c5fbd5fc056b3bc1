"""The audit's own contact sheet: some synthetic pairs beside some real ones, picked by position and not by looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from busigen.errors import InputError
from busigen.evaluation.context import ImageSet
from busigen.registry import LESION_CLASSES
from busigen.runtime.atomic import atomic_file
from busigen.runtime.preview import COLOURS, outline, pick_evenly

CONTACT_SHEET = "contact.jpg"
"""The sheet's name in the report's folder, where the report looks for it."""

PAIRS = 16
"""Images shown of each set."""

_COLUMNS = 4
_TILE = 176
_LABEL = 18
_HEADER = 30
_GAP = 28
_PAPER = (24, 27, 31)
_INK = (235, 238, 241)
_QUALITY = 85


def contact_sheet(synthetic: ImageSet, real: ImageSet, path: Path, pairs: int = PAIRS) -> Path:
    """Draw images with the contours of their masks: synthetic ones on the left, real ones on the right.

    The images are spread evenly over each set, half of them benign and half malignant where the set has both; nobody
    chose them. The same sets give the same sheet.

    Args:
        synthetic: The set under judgement.
        real: What it is judged against.
        path: Where the JPEG goes.
        pairs: Images of each set, at most.

    Returns:
        The path.

    Raises:
        InputError: a set is empty.
    """
    for images in (synthetic, real):
        if not len(images):
            raise InputError(f"The set {images.name} holds no image to show.", fix="Name a folder with images.")
    boards = [_board(kind, images, pairs) for kind, images in (("Synthetic", synthetic), ("Real", real))]
    width = sum(board.width for board in boards) + _GAP
    sheet = Image.new("RGB", (width, max(board.height for board in boards)), _PAPER)
    sheet.paste(boards[0], (0, 0))
    sheet.paste(boards[1], (boards[0].width + _GAP, 0))
    with atomic_file(path) as file:
        # Full chroma: halved, it smears the one-pixel contours.
        sheet.save(file, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return path


def _board(kind: str, images: ImageSet, pairs: int) -> Image.Image:
    rows = _pick(images, pairs)
    height = _HEADER + -(-len(rows) // _COLUMNS) * (_TILE + _LABEL)
    board = Image.new("RGB", (_COLUMNS * _TILE, height), _PAPER)
    draw = ImageDraw.Draw(board)
    title = f"{kind}: {len(rows)} of {len(images):,}"
    draw.text((6, 5), title, fill=_INK, font=ImageFont.load_default(18))
    font = ImageFont.load_default(13)
    for place, row in enumerate(rows):
        left, top = place % _COLUMNS * _TILE, _HEADER + place // _COLUMNS * (_TILE + _LABEL)
        label = str(images.table["class"][row])
        colour = COLOURS.get(label, (255, 255, 255))
        board.paste(_tile(images.images[row], images.masks[row], colour), (left, top))
        draw.text((left + 4, top + _TILE + 1), label, fill=colour, font=font)
    return board


def _tile(image: NDArray[np.uint8], mask: NDArray[np.bool_], colour: tuple[int, int, int]) -> Image.Image:
    size = (_TILE - 2, _TILE - 2)
    small = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS))
    cover = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size, Image.Resampling.BOX)) >= 128
    return Image.fromarray(outline(small, cover, colour))


def _pick(images: ImageSet, pairs: int) -> list[int]:
    manifest = images.table.select("class").with_row_index("index")
    picked = pick_evenly(manifest, -(-pairs // len(LESION_CLASSES)))[:pairs]
    # A set without one of the classes, or with others, fills the sheet with what it has.
    rest = np.setdiff1d(np.arange(len(images)), picked)
    missing = min(pairs - len(picked), len(rest))
    if missing > 0:
        picked += [int(row) for row in rest[np.linspace(0, len(rest) - 1, missing).round().astype(int)]]
    return sorted(picked, key=lambda row: (str(images.table["class"][row]), row))
