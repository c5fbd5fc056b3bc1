"""What the report draws: each section's chart, its pictures as data URIs, and the contact sheet of both sets."""

from __future__ import annotations

import base64
import io
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from busigen.errors import InputError
from busigen.evaluation.context import ImageSet
from busigen.evaluation.report.text import excess, known, number
from busigen.evaluation.results import Figure, Interval
from busigen.files import atomic_file
from busigen.foreign import read_file
from busigen.registry import LESION_CLASSES
from busigen.runtime.dataset.finalize import COLOURS, outline, pick_evenly

ROWS = 14
"""Figures that a section's chart shows at most; the table below it has them all."""

_MARGIN = 4.0
"""Percent of the axis left free at either end, so that no mark is cut."""

_SAME_SCALE = 8.0
"""Figures share an axis while the greatest is at most this many times the smallest: below, intervals turn to dots."""


_Place = Callable[[float | None], float | None]


@dataclass(frozen=True)
class Tick:
    """A labelled place on an axis. ``at`` in percent of its length."""

    at: float
    label: str


@dataclass(frozen=True)
class Row:
    """One figure's marks, in percent of the axis; None where the figure has no such number."""

    figure: Figure
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    floor_low: float | None
    floor_width: float | None


@dataclass(frozen=True)
class Panel:
    """Figures of one unit and scale, on one axis."""

    unit: str
    ticks: tuple[Tick, ...]
    rows: tuple[Row, ...]


def chosen(figures: Sequence[Figure], rows: int = ROWS) -> list[Figure]:
    """The figures a chart shows, in their own order.

    Headlines are taken before flagged ones, those before the rest, and of equals those furthest beyond their floors.
    """
    drawable = [figure for figure in figures if known(figure.value.value)]
    ranked = sorted(drawable, key=lambda figure: (not figure.headline, not figure.flagged, -excess(figure)))
    kept = {figure.key for figure in ranked[:rows]}
    return [figure for figure in drawable if figure.key in kept]


def panels(figures: Sequence[Figure]) -> list[Panel]:
    """Axes for some figures: figures of one unit share an axis while they are of about the same size."""
    groups: list[list[Figure]] = []
    for figure in figures:
        fitting = (group for group in groups if group[0].unit == figure.unit and _alike([*group, figure]))
        group = next(fitting, None)
        if group is None:
            groups.append([figure])
        else:
            group.append(figure)
    return [_panel(group) for group in groups]


def _panel(group: Sequence[Figure]) -> Panel:
    from matplotlib.ticker import MaxNLocator

    values = [value for figure in group for value in _numbers(figure)]
    low, high = min(values), max(values)
    if low > 0 and low < 0.4 * high:
        low = 0.0
    if low == high:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    places = [float(tick) for tick in MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)]
    step = places[1] - places[0]
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    digits += not math.isclose(step * 10**digits, round(step * 10**digits), abs_tol=1e-6)

    def at(value: float | None) -> float | None:
        if value is None or not math.isfinite(value):
            return None
        return round(_MARGIN + (100 - 2 * _MARGIN) * (value - low) / (high - low), 2)

    ticks = [(at(place), number(place, digits) if place else "0") for place in places]
    return Panel(
        unit=group[0].unit,
        ticks=tuple(Tick(place, label) for place, label in ticks if place is not None and 0 < place < 100),
        rows=tuple(_row(figure, at) for figure in group),
    )


def _row(figure: Figure, at: _Place) -> Row:
    floor = figure.floor or Interval(math.nan)
    left, right = at(floor.low), at(floor.high)
    return Row(
        figure=figure,
        value=at(figure.value.value),
        low=at(figure.value.low),
        high=at(figure.value.high),
        floor=at(floor.value),
        floor_low=left,
        floor_width=None if left is None or right is None else round(right - left, 2),
    )


def _numbers(figure: Figure) -> list[float]:
    parts = [figure.value, *([] if figure.floor is None else [figure.floor])]
    return [
        value
        for part in parts
        for value in (part.value, part.low, part.high)
        if value is not None and math.isfinite(value)
    ]


def _alike(group: Sequence[Figure]) -> bool:
    sizes = [size for size in (max(map(abs, _numbers(figure))) for figure in group) if size > 0]
    return not sizes or max(sizes) <= _SAME_SCALE * min(sizes)


LARGEST = 400_000
"""Bytes above which a raster picture is scaled and compressed for the page; the file in the folder stays as it is."""

LARGEST_PLOT = 1_500_000
"""Bytes above which an SVG plot stays out of the page."""

_MAX_BYTES = 256 << 20
"""Largest picture that is read."""

_WIDEST = 1600
_QUALITY = 85


@dataclass(frozen=True)
class Inlined:
    """A picture for the page.

    Attributes:
        uri: A ``data:`` URI; empty where there is no picture to show.
        problem: Why there is none, or why it is not quite the file.
    """

    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


def inline(folder: Path, file: str) -> Inlined:
    """A picture of a section as a data URI.

    SVG goes into an ``<img>`` like any other picture, not into the page's own tree: there it can run no script, load
    nothing from elsewhere, and its ids and styles cannot meet those of another plot.

    ``folder``: The section's folder. Nothing outside is read, whatever ``file`` says.

    Returns:
        The picture, or why there is none.
    """
    path = folder / file
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return Inlined(problem=f"The picture {file} lies outside the section's folder and is not shown.")
        content = read_file(path, _MAX_BYTES)
    except (OSError, ValueError):
        return Inlined(problem=f"The picture {file} is not there.")
    try:
        return _plot(content, file) if path.suffix.lower() == ".svg" else _raster(content, file)
    except (ElementTree.ParseError, UnidentifiedImageError, OSError, SyntaxError):
        return Inlined(problem=f"The picture {file} cannot be read.")


def _raster(content: bytes, file: str) -> Inlined:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        kind = Image.MIME.get(image.format or "", "")
        if len(content) <= LARGEST and kind in {"image/png", "image/jpeg", "image/webp", "image/gif"}:
            return Inlined(_uri(kind, content), *image.size)
        small = image.convert("RGB")
    small.thumbnail((_WIDEST, 8 * _WIDEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    note = f"Compressed for this page; in full: {file}."
    return Inlined(_uri("image/jpeg", stream.getvalue()), *small.size, problem=note)


def _plot(content: bytes, file: str) -> Inlined:
    root = ElementTree.fromstring(content)
    if len(content) > LARGEST_PLOT:
        return Inlined(problem=f"The plot {file} is too large for this page: open it in the report's folder.")
    box = [float(part) for part in re.findall(r"[-+\d.eE]+", root.get("viewBox", ""))]
    width, height = (box[2], box[3]) if len(box) == 4 and min(box[2:]) > 0 else (640.0, 400.0)
    # A plot's points become CSS pixels: 4 for 3.
    scale = 4 / 3 if root.get("width", "").endswith("pt") else 1
    return Inlined(_uri("image/svg+xml", content), round(scale * width), round(scale * height))


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


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


def contact_sheet(synthetic: ImageSet, real: ImageSet, path: Path, pairs: int = PAIRS) -> Path:
    """Draw images with the contours of their masks: synthetic ones on the left, real ones on the right.

    The images are spread evenly over each set, half of them benign and half malignant where the set has both; nobody
    chose them. The same sets give the same sheet.

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
