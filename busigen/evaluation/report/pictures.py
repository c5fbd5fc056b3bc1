"""Pictures and plots as data URIs, small enough for one page that holds them all."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, UnidentifiedImageError

from busigen.foreign import read_file

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
        width: In CSS pixels.
        height: In CSS pixels.
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

    Args:
        folder: The section's folder. Nothing outside is read, whatever ``file`` says.
        file: Name in that folder.

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
