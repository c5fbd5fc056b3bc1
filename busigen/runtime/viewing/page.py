"""The page's files, and the page as one file that holds pairs, rows and pictures and needs nothing else."""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections.abc import Hashable
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import IO, Any

from busigen.errors import OutputError, UsageError
from busigen.files import atomic_file
from busigen.foreign import open_file
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import output_errors
from busigen.runtime.viewing.pairs import Pairs, Query, picture
from busigen.text import counted

ASSETS = ("view.html", "view.css", "view.js")
PICTURES = {"image": "image.png", "mask": "mask.png", "outline": "outline.svg"}  # Of a pair, and their files' names
MOST_PAIRS = 3_000  # Of a page in one file: some 60 kB each
_MARK = '<meta name="generator" content="busigen view">'
_MARK_WITHIN = 1_000  # Bytes from its start in which a page has the mark


@cache
def asset(name: str) -> str:
    """One of the page's files."""
    return files("busigen.runtime.viewing").joinpath("assets", name).read_text(encoding="utf-8")


def write_page(pairs: Pairs, path: Path, progress: Progress | None = None) -> None:
    """Write a page that shows all of the pairs, whole or not at all.

    Raises:
        UsageError: there are more than `MOST_PAIRS`, or ``path`` lies in the dataset.
        OutputError: it cannot be written, or another file is in the way.
        BusigenError: a pair or healthy image is damaged.
    """
    if len(pairs) > MOST_PAIRS:
        problem = f"{counted(len(pairs), 'pair')} of {pairs.folder} are too many for one file."
        raise UsageError(problem, fix=f"Give --limit {MOST_PAIRS} or less, or a --where; or leave out --html.")
    if Path(os.path.realpath(path)).is_relative_to(os.path.realpath(pairs.folder)):
        raise UsageError(f"--html {path} lies inside the dataset.", fix="Choose a file outside it.")
    if not path.parent.is_dir():
        raise OutputError(f"{path.parent} is no folder.", fix="Make it, or choose another place for --html.")
    if path.is_dir() or (path.exists() and not _is_page(path)):
        raise OutputError(f"{path} exists, and is no page of busigen view.", fix="Choose another name for --html.")
    progress = progress or Progress()
    progress.start("writing", len(pairs), unit="pair")
    try:
        with output_errors(path.parent), atomic_file(path) as file:
            _write(pairs, file, progress)
    finally:
        progress.stop()


def _is_page(path: Path) -> bool:
    try:
        with open_file(path) as file:
            return _MARK.encode() in file.read(_MARK_WITHIN)
    except OSError:
        return False


def _write(pairs: Pairs, file: IO[bytes], progress: Progress) -> None:
    style, script = asset("view.css"), asset("view.js")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    page = asset("view.html")
    for tag, inlined in (
        (_MARK, f'{_MARK}\n<meta http-equiv="Content-Security-Policy" content="{policy}">'),
        ('<link rel="stylesheet" href="view.css">', f"<style>{style}</style>"),
    ):
        page = _replaced(page, tag, inlined)
    before, after = _cut(page, '<script src="view.js"></script>')
    file.write(before.encode())
    order = pairs.order(Query())
    entries, origins = [], dict[Hashable, int]()
    for number, row in enumerate(order.tolist()):
        member = pairs.member(row)
        # One for each pair, so that a browser decodes those that it shows.
        _block(file, f"pixels-{number}", {kind: _base64(picture(member, kind)) for kind in PICTURES})
        origin = pairs.origin(row)
        if origin is not None and origin.key not in origins:
            origins[origin.key] = len(origins)
            _block(file, f"healthy-{origins[origin.key]}", _base64(pairs.beside.png(origin)))
        entries.append(
            {
                "name": pairs.name_of(row),
                "row": list(pairs.row(row).values()),
                "refused": pairs.refused(row),
                "problems": pairs.problems(row, member),
                "beside": origin and origin.caption,
                "healthy": origin and origins[origin.key],
            }
        )
        progress.advance(1)
    _block(file, "embedded", {"about": pairs.about(), "pairs": entries})
    file.write(f"<script>{script}</script>{after}".encode())


def _block(file: IO[bytes], name: str, value: Any) -> None:
    """Write JSON that the script reads; what it says can be no markup, and is never run."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    file.write(f'<script type="application/json" id="{name}">{text}</script>\n'.encode())


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")


def _digest(text: str) -> str:
    """The text as a policy names it, which allows what has this hash and nothing else."""
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def _cut(page: str, tag: str) -> tuple[str, str]:
    before, found, after = page.partition(tag)
    assert found, tag
    return before, after


def _replaced(page: str, tag: str, inlined: str) -> str:
    before, after = _cut(page, tag)
    return f"{before}{inlined}{after}"
