"""The audit's report as one HTML file that needs nothing else: no network, no fonts, no script, no second file."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont, UnidentifiedImageError

from busigen.errors import InputError
from busigen.evaluation.context import Figure, Finding, ImageSet, Interval, SectionResult, section_folder
from busigen.evaluation.report import text as words
from busigen.evaluation.report.text import PRIVACY, known
from busigen.evaluation.sections import SECTIONS
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG
from busigen.files import atomic_file
from busigen.foreign import read_file
from busigen.registry import LESION_CLASSES
from busigen.runtime.dataset.finalize import COLOURS, outline, pick_evenly
from busigen.runtime.storage.files import output_errors
from busigen.text import printable

REPORT, CONTACT_SHEET = "report.html", "contact.jpg"  # Names in the report's folder
ROWS = 14  # Figures that a section's chart shows at most; the table below it has them all
LARGEST = 400_000  # Bytes above which a raster picture is compressed for the page; the file stays as it is
LARGEST_PLOT = 1_500_000  # Bytes above which an SVG plot stays out of the page
SMALL = 100  # Images of a set below which the report warns that only large differences can show
PAIRS = 16  # Images of each set on the contact sheet
_WORST = 3
_CAP = 20.0  # Excess over the floor above which defects count as equally bad: no figure is so exact
_MARGIN = 4.0  # Percent of an axis left free at either end, so that no mark is cut
_SAME_SCALE = 8.0  # Figures share an axis while the greatest is at most this many times the smallest
_MAX_BYTES = 256 << 20  # Largest picture that is read
_WIDEST = 1600
_QUALITY = 85

_COLUMNS, _TILE, _LABEL, _HEADER, _GAP = 4, 176, 18, 30, 28
_PAPER, _INK = (24, 27, 31), (235, 238, 241)

# Browsers older than the ::details-content selector need this to print what is folded. Nothing else is scripted.
_SCRIPT = (
    "addEventListener('beforeprint',function(){document.querySelectorAll('details').forEach(function(d){"
    "d.dataset.was=d.open?'1':'';d.open=true})});"
    "addEventListener('afterprint',function(){document.querySelectorAll('details').forEach(function(d){"
    "d.open=d.dataset.was==='1'})});"
)


class Shown(NamedTuple):
    """A picture for the page as a ``data:`` URI. ``problem``: Why there is none, or why it is not quite the file."""

    uri: str = ""
    width: int = 0
    height: int = 0
    problem: str = ""


class Row(NamedTuple):
    """One figure's marks, in percent of the axis; None where the figure has no such number."""

    figure: Figure
    value: float | None
    low: float | None
    high: float | None
    floor: float | None
    floor_low: float | None
    floor_width: float | None


class Panel(NamedTuple):
    """Figures of one unit and scale, on one axis. ``ticks``: Places in percent of its length, and their labels."""

    unit: str
    ticks: list[tuple[float, str]]
    rows: list[Row]


@dataclass(frozen=True)
class SectionView:
    """A section as the template shows it, its pictures with captions and file names, and why it could not run."""

    anchor: str
    title: str
    question: str
    result: SectionResult
    chart: list[Panel]
    pictures: list[tuple[Shown, str, str]]
    error: str

    @property
    def verdict(self) -> str:
        """``flagged``, ``silent``, or ``unmeasured`` where the section has no figure to be silent about."""
        if self.error or not (self.result.flagged or self.result.figures):
            return "unmeasured"
        return "flagged" if self.result.flagged else "silent"

    @property
    def headlines(self) -> list[Figure]:
        """The figures of the summary: the section's own choice, or the flagged ones, or the first."""
        figures = self.result.figures
        flagged = [figure for figure in figures if figure.flagged]
        return [figure for figure in figures if figure.headline] or flagged[:3] or figures[:2]

    def resting_on(self, finding: Finding) -> list[Figure]:
        """The figures a finding names."""
        return [figure for figure in self.result.figures if figure.key in finding.keys]


def write_html(report: Mapping[str, Any], out: Path) -> Path:
    """Turn the audit's results into one self-contained page, ``out / "report.html"``.

    Pictures are read from the sections' folders below ``out``, as is the contact sheet. Whatever the report says is
    escaped: file names and findings come from data that others made.

    ``report``: What ``report.json`` holds, of which all but ``sections`` may be absent.

    Raises:
        OutputError: it cannot be written.
        KeyError, TypeError: the content is no report.
    """
    views = [_view(number, entry, out) for number, entry in enumerate(report["sections"], start=1)]
    loader = PackageLoader("busigen.evaluation.report", ".")
    # Escaping is not chosen by file name: everything that goes into the page is escaped.
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(words=words)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode("ascii")
    inputs = dict(report.get("inputs") or {})
    records = {
        "Inputs": inputs,
        "Counts": report.get("counts"),
        "Sets": report.get("sets"),
        "Versions": report.get("versions"),
        "Wall time": {name: words.duration(value) for name, value in (report.get("seconds") or {}).items()},
    }
    # The last part of either path.
    parts = {side: re.split(r"[/\\]", str(inputs.get(side) or "").rstrip("/\\")) for side in ("synthetic", "real")}
    page = environment.get_template("report.html.j2").render(
        alpha=ALPHA,
        script=_SCRIPT,
        script_hash=f"sha256-{digest}",
        version=report.get("busigen", ""),
        created=re.sub(r"(?<=\d)T(?=\d)", " ", str(report.get("created") or "")),
        names={side: part[-1] for side, part in parts.items()},
        sections=views,
        defects=_worst(views),
        nearest=_nearest(views),
        notes=report.get("notes") or [],
        unsaid=_unsaid(views),
        trained=bool(inputs.get("train")),
        quick=inputs.get("effort") == "quick",
        sheet=inline(out, CONTACT_SHEET) if (out / CONTACT_SHEET).is_file() else None,
        records={title: content for title, content in records.items() if content},
        privacy=PRIVACY.get(str(inputs.get("backgrounds")), PRIVACY["unknown"]),
    )
    path = out / REPORT
    with output_errors(out), atomic_file(path) as file:
        # HTML's characters are escaped. What else names from elsewhere can hold is not: marks of direction, and NUL and
        # halves of surrogate pairs, which may not stand in a page at all. Numbers are tied to their units by spaces.
        file.write(re.sub(r"[^\n\N{NO-BREAK SPACE}]+", lambda part: printable(part[0]), page).encode())
    return path


def _view(number: int, entry: Mapping[str, Any], out: Path) -> SectionView:
    result = SectionResult.from_dict(dict(entry))
    section, folder = SECTIONS[result.section], section_folder(out, result.section)
    return SectionView(
        anchor=f"section-{number}",
        title=entry.get("title") or section.title,
        question=entry.get("question") or section.question,
        result=result,
        chart=panels(chosen(result.figures)),
        pictures=[(inline(folder, picture.file), picture.caption, picture.file) for picture in result.pictures],
        error=str(entry.get("error") or ""),
    )


def _worst(views: list[SectionView]) -> list[tuple[SectionView, Finding]]:
    """The defects to name first: those that rest on a headline figure, then those furthest from their floors."""

    def rank(defect: tuple[SectionView, Finding]) -> tuple[bool, float]:
        figures = defect[0].resting_on(defect[1])
        beyond = max((words.excess(figure) for figure in figures), default=0.0)
        return (not any(figure.headline for figure in figures), -min(beyond, _CAP))

    defects = [(view, finding) for view in views for finding in view.result.findings if finding.level == "flag"]
    return sorted(defects, key=rank)[:_WORST]


def _nearest(views: list[SectionView]) -> tuple[SectionView, Figure] | None:
    """The unflagged figure that lies furthest beyond its floor: what comes nearest to a defect where none is found."""
    beyond = [(view, figure) for view in views for figure in view.result.figures if words.excess(figure) > 0]
    return max(beyond, key=lambda part: words.excess(part[1]), default=None)


def _unsaid(views: list[SectionView]) -> list[str]:
    """Which questions are unanswered, and whether a headline figure rests on few images."""
    said, ran = [], {view.result.section for view in views if not view.error}
    if missing := [f"{section.question} ({section.title})" for section in SECTIONS.values() if section.name not in ran]:
        said.append(f"Not every section ran. Unanswered: {' · '.join(missing)}")
    figures = [figure for view in views for figure in view.headlines]
    # A side of 0 took no part: an arm without synthetic images rests on none of them.
    fewest = min((count for figure in figures for count in (figure.synthetic, figure.real) if count), default=SMALL)
    rests = f"A headline figure rests on {fewest} images of one side"
    if fewest < FEWEST_TO_FLAG:
        said.append(f"{rests}. Below {FEWEST_TO_FLAG}, comparisons are never flagged, and silence says nothing.")
    elif fewest < SMALL:
        said.append(f"{rests}: with so few, only large differences can show.")
    return said


def chosen(figures: Sequence[Figure], rows: int = ROWS) -> list[Figure]:
    """The figures a chart shows, in their own order: headlines first, then flagged ones, then those furthest beyond."""
    drawable = [figure for figure in figures if known(figure.value.value)]
    ranked = sorted(drawable, key=lambda figure: (not figure.headline, not figure.flagged, -words.excess(figure)))
    kept = {figure.key for figure in ranked[:rows]}
    return [figure for figure in drawable if figure.key in kept]


def panels(figures: Sequence[Figure]) -> list[Panel]:
    """Axes for some figures: figures of one unit share an axis while they are of about the same size."""
    groups: list[list[Figure]] = []
    for figure in figures:
        fitting = (group for group in groups if group[0].unit == figure.unit and _alike([*group, figure]))
        if (group := next(fitting, None)) is not None:
            group.append(figure)
        else:
            groups.append([figure])
    return [_panel(group) for group in groups]


def _numbers(figure: Figure) -> list[float]:
    parts = [part for part in (figure.value, figure.floor) if part is not None]
    return [value for part in parts for value in (part.value, part.low, part.high) if known(value)]


def _alike(group: list[Figure]) -> bool:
    sizes = [size for size in (max(map(abs, _numbers(figure))) for figure in group) if size > 0]
    return not sizes or max(sizes) <= _SAME_SCALE * min(sizes)


def _panel(group: list[Figure]) -> Panel:
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
        return round(_MARGIN + (100 - 2 * _MARGIN) * (value - low) / (high - low), 2) if known(value) else None

    rows = []
    for figure in group:
        value, floor = figure.value, figure.floor or Interval(math.nan)
        left, right = at(floor.low), at(floor.high)
        width = None if left is None or right is None else round(right - left, 2)
        rows.append(Row(figure, at(value.value), at(value.low), at(value.high), at(floor.value), left, width))
    ticks = [(at(place), words.number(place, digits) if place else "0") for place in places]
    return Panel(group[0].unit, [(at, label) for at, label in ticks if at is not None and 0 < at < 100], rows)


def inline(folder: Path, file: str) -> Shown:
    """A picture of a section as a data URI, or why there is none. Nothing outside ``folder`` is read.

    SVG goes into an ``<img>`` like any other picture: there it can run no script and load nothing from elsewhere.
    """
    path = folder / file
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return Shown(problem=f"The picture {file} lies outside the section's folder and is not shown.")
        content = read_file(path, _MAX_BYTES)
    except (OSError, ValueError):
        return Shown(problem=f"The picture {file} is not there.")
    try:
        return _plot(content, file) if path.suffix.lower() == ".svg" else _raster(content, file)
    except (ElementTree.ParseError, UnidentifiedImageError, OSError, SyntaxError):
        return Shown(problem=f"The picture {file} cannot be read.")


def _raster(content: bytes, file: str) -> Shown:
    with Image.open(io.BytesIO(content)) as image:
        image.load()
        kind = Image.MIME.get(image.format or "", "")
        if len(content) <= LARGEST and kind in {"image/png", "image/jpeg", "image/webp", "image/gif"}:
            return Shown(_uri(kind, content), *image.size)
        small = image.convert("RGB")
    small.thumbnail((_WIDEST, 8 * _WIDEST), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    note = f"Compressed for this page; in full: {file}."
    return Shown(_uri("image/jpeg", stream.getvalue()), *small.size, problem=note)


def _plot(content: bytes, file: str) -> Shown:
    root = ElementTree.fromstring(content)
    if len(content) > LARGEST_PLOT:
        return Shown(problem=f"The plot {file} is too large for this page: open it in the report's folder.")
    box = [float(part) for part in re.findall(r"[-+\d.eE]+", root.get("viewBox", ""))]
    width, height = (box[2], box[3]) if len(box) == 4 and min(box[2:]) > 0 else (640.0, 400.0)
    # A plot's points become CSS pixels: 4 for 3.
    scale = 4 / 3 if root.get("width", "").endswith("pt") else 1
    return Shown(_uri("image/svg+xml", content), round(scale * width), round(scale * height))


def _uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def contact_sheet(synthetic: ImageSet, real: ImageSet, path: Path, pairs: int = PAIRS) -> Path:
    """Draw images with the contours of their masks: synthetic ones on the left, real ones on the right.

    They are spread evenly over each set, half of them benign and half malignant where the set has both. The same sets
    give the same sheet. Raises `InputError` where a set is empty.
    """
    for images in (synthetic, real):
        if not len(images):
            raise InputError(f"The set {images.name} holds no image to show.", fix="Name a folder with images.")
    left, right = _board("Synthetic", synthetic, pairs), _board("Real", real, pairs)
    sheet = Image.new("RGB", (left.width + _GAP + right.width, max(left.height, right.height)), _PAPER)
    sheet.paste(left, (0, 0))
    sheet.paste(right, (left.width + _GAP, 0))
    with atomic_file(path) as file:
        # Full chroma: halved, it smears the one-pixel contours.
        sheet.save(file, "JPEG", quality=_QUALITY, subsampling=0, optimize=True)
    return path


def _board(kind: str, images: ImageSet, pairs: int) -> Image.Image:
    classes = images.table["class"]
    rows = pick_evenly(images.table.select("class").with_row_index("index"), -(-pairs // len(LESION_CLASSES)))[:pairs]
    # A set without one of the classes, or with others, fills the sheet with what it has.
    rest = np.setdiff1d(np.arange(len(images)), rows)
    if missing := min(pairs - len(rows), len(rest)):
        rows += [int(row) for row in rest[np.linspace(0, len(rest) - 1, missing).round().astype(int)]]
    board = Image.new("RGB", (_COLUMNS * _TILE, _HEADER + -(-len(rows) // _COLUMNS) * (_TILE + _LABEL)), _PAPER)
    draw = ImageDraw.Draw(board)
    draw.text((6, 5), f"{kind}: {len(rows)} of {len(images):,}", fill=_INK, font=ImageFont.load_default(18))
    font = ImageFont.load_default(13)
    size = (_TILE - 2, _TILE - 2)
    for place, row in enumerate(sorted(rows, key=lambda row: (str(classes[row]), row))):
        left, top = place % _COLUMNS * _TILE, _HEADER + place // _COLUMNS * (_TILE + _LABEL)
        label = str(classes[row])
        colour = COLOURS.get(label, (255, 255, 255))
        small = np.asarray(Image.fromarray(images.images[row]).resize(size, Image.Resampling.LANCZOS))
        mask = Image.fromarray(images.masks[row].astype(np.uint8) * 255)
        cover = np.asarray(mask.resize(size, Image.Resampling.BOX)) >= 128
        board.paste(Image.fromarray(outline(small, cover, colour)), (left, top))
        draw.text((left + 4, top + _TILE + 1), label, fill=colour, font=font)
    return board
