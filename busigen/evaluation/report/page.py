"""The audit's report as one HTML file that needs nothing else: no network, no fonts, no script, no second file."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from busigen.evaluation.report import text as words
from busigen.evaluation.report.charts import CONTACT_SHEET, Inlined, Panel, chosen, inline, panels
from busigen.evaluation.report.text import CANNOT_SAY, NO_TRAIN, PRIVACY, QUICK, SMALL, SMALL_SET, TINY_SET, UNANSWERED
from busigen.evaluation.results import Figure, Finding, SectionResult, section_folder
from busigen.evaluation.sections import SECTIONS
from busigen.evaluation.statistics.grouped import ALPHA, FEWEST_TO_FLAG
from busigen.files import atomic_file
from busigen.runtime.storage.files import output_errors
from busigen.text import printable

REPORT = "report.html"
"""The report's name in its folder."""

_OPEN_TABLE = 6
"""Figures that a table shows without being opened; a printed report shows all."""

_WORST = 3
_CAP = 20.0
"""Excess over the floor above which defects count as equally bad: no figure is so exact that more would mean more."""

# Browsers older than the ::details-content selector need this to print what is folded. Nothing else is scripted.
_SCRIPT = (
    "addEventListener('beforeprint',function(){document.querySelectorAll('details').forEach(function(d){"
    "d.dataset.was=d.open?'1':'';d.open=true})});"
    "addEventListener('afterprint',function(){document.querySelectorAll('details').forEach(function(d){"
    "d.open=d.dataset.was==='1'})});"
)


@dataclass(frozen=True)
class Shown:
    """A picture with its caption, ready for the page."""

    image: Inlined
    caption: str
    file: str

    @property
    def wide(self) -> bool:
        """It needs the page's full width, and a scrolling box on a phone."""
        return self.image.width > 640 and self.image.width > 1.5 * self.image.height


@dataclass(frozen=True)
class SectionView:
    """A section as the template shows it.

    Attributes:
        error: Why it has no result; empty where it has one.
    """

    anchor: str
    title: str
    question: str
    result: SectionResult
    chart: list[Panel]
    pictures: list[Shown]
    error: str

    @property
    def verdict(self) -> str:
        """``flagged``, ``silent``, or ``unmeasured`` where the section has no figure to be silent about."""
        if self.error:
            return "unmeasured"
        return "flagged" if self.result.flagged else "silent" if self.result.figures else "unmeasured"

    @property
    def open_table(self) -> bool:
        """The table is short enough to be shown at once."""
        return len(self.result.figures) <= _OPEN_TABLE

    @property
    def headlines(self) -> list[Figure]:
        """The figures of the summary: the section's own choice, or the flagged ones, or the first."""
        figures = self.result.figures
        flagged = [figure for figure in figures if figure.flagged]
        return [figure for figure in figures if figure.headline] or flagged[:3] or figures[:2]

    def resting_on(self, finding: Finding) -> list[Figure]:
        """The figures a finding names."""
        return [figure for figure in self.result.figures if figure.key in finding.keys]


@dataclass(frozen=True)
class Defect:
    """A flagged finding and the section it comes from."""

    section: SectionView
    finding: Finding


def write_html(report: Mapping[str, Any], out: Path) -> Path:
    """Turn the audit's results into one self-contained page.

    Pictures are read from the sections' folders below ``out`` and written into the page, as is the contact sheet where
    ``out`` holds one. Whatever the report says is escaped: file names and findings come from data that others made.

    ``report``: What ``report.json`` holds: ``sections`` is a list of ``SectionResult.to_dict()`` with ``title`` and
    ``question``, and ``error`` where it could not run. ``busigen``, ``created``, ``inputs``, ``counts``, ``sets``,
    ``notes``, ``versions`` and ``seconds`` may be absent.

    Returns:
        The page's path, ``out / "report.html"``.

    Raises:
        OutputError: it cannot be written.
        KeyError, TypeError: the content is no report.
    """
    views = [_view(number, entry, out) for number, entry in enumerate(report["sections"], start=1)]
    environment = Environment(
        loader=PackageLoader("busigen.evaluation.report", "."),
        # Not chosen by file name: everything that goes into the page is escaped.
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(words=words)
    digest = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode("ascii")
    inputs = dict(report.get("inputs") or {})
    page = environment.get_template("report.html.j2").render(
        alpha=ALPHA,
        script=_SCRIPT,
        script_hash=f"sha256-{digest}",
        version=report.get("busigen", ""),
        created=re.sub(r"(?<=\d)T(?=\d)", " ", str(report.get("created") or "")),
        names={side: _name(inputs.get(side)) for side in ("synthetic", "real")},
        sections=views,
        defects=_worst(views),
        nearest=_nearest(views),
        notes=report.get("notes") or [],
        cannot_say=_cannot_say(views, inputs),
        sheet=_sheet(out),
        records={
            title: content
            for title, content in (
                ("Inputs", inputs),
                ("Counts", report.get("counts")),
                ("Sets", report.get("sets")),
                ("Versions", report.get("versions")),
                ("Wall time", _durations(report.get("seconds"))),
            )
            if content
        },
        privacy=PRIVACY.get(str(inputs.get("backgrounds")), PRIVACY["unknown"]),
    )
    path = out / REPORT
    with output_errors(out), atomic_file(path) as file:
        # HTML's characters are escaped. What else names from elsewhere can hold is not: marks of direction, and NUL and
        # halves of surrogate pairs, which may not stand in a page at all. Numbers are tied to their units by spaces.
        file.write(re.sub(r"[^\n\N{NO-BREAK SPACE}]+", lambda part: printable(part[0]), page).encode())
    return path


def _view(number: int, entry: Mapping[str, Any], out: Path) -> SectionView:
    empty = {"figures": [], "findings": [], "pictures": [], "details": {}, "seconds": 0.0}
    result = SectionResult.from_dict({**empty, **entry})
    known = SECTIONS.get(result.section)
    folder = section_folder(out, result.section)
    return SectionView(
        anchor=f"section-{number}",
        title=entry.get("title") or (known.title if known else result.section),
        question=entry.get("question") or (known.question if known else ""),
        result=result,
        chart=panels(chosen(result.figures)),
        pictures=[Shown(inline(folder, picture.file), picture.caption, picture.file) for picture in result.pictures],
        error=str(entry.get("error") or ""),
    )


def _worst(views: list[SectionView]) -> list[Defect]:
    """The defects to name first: those that rest on a headline figure, then those furthest from their floors."""

    def rank(defect: Defect) -> tuple[bool, float]:
        figures = defect.section.resting_on(defect.finding)
        beyond = max((words.excess(figure) for figure in figures), default=0.0)
        return (not any(figure.headline for figure in figures), -min(beyond, _CAP))

    defects = [Defect(view, finding) for view in views for finding in view.result.findings if finding.level == "flag"]
    return sorted(defects, key=rank)[:_WORST]


def _nearest(views: list[SectionView]) -> tuple[SectionView, Figure] | None:
    """The unflagged figure that lies furthest beyond its floor: what comes nearest to a defect where none is found."""
    beyond = [(words.excess(figure), view, figure) for view in views for figure in view.result.figures]
    excess, view, figure = max(beyond, key=lambda part: part[0], default=(0.0, None, None))
    return None if excess == 0 or view is None or figure is None else (view, figure)


def _cannot_say(views: list[SectionView], inputs: Mapping[str, Any]) -> list[str]:
    ran = {view.result.section for view in views if not view.error}
    missing = [f"{section.question} ({section.title})" for section in SECTIONS.values() if section.name not in ran]
    said = [UNANSWERED.format(sections=" · ".join(missing))] if missing else []
    figures = [figure for view in views for figure in view.headlines]
    # A side of 0 took no part: an arm without synthetic images rests on none of them.
    sides = [count for figure in figures for count in (figure.synthetic, figure.real) if count]
    fewest = min(sides, default=SMALL)
    if fewest < SMALL:
        text = TINY_SET if fewest < FEWEST_TO_FLAG else SMALL_SET
        said.append(text.format(fewest=fewest, least=FEWEST_TO_FLAG))
    if not inputs.get("train"):
        said.append(NO_TRAIN)
    if inputs.get("effort") == "quick":
        said.append(QUICK)
    return [*said, *CANNOT_SAY]


def _sheet(out: Path) -> Shown | None:
    if not (out / CONTACT_SHEET).is_file():
        return None
    caption = (
        "Synthetic images beside real ones, with the contours of their masks. The images are spread evenly over each "
        "set; nobody chose them."
    )
    return Shown(inline(out, CONTACT_SHEET), caption, CONTACT_SHEET)


def _name(given: Any) -> str:
    """A set's short name from what the report says of it: its own name, or the last part of its path."""
    if isinstance(given, Mapping):
        given = given.get("name") or given.get("path") or given.get("folder") or ""
    parts = [part for part in re.split(r"[/\\]", str(given or "")) if part]
    return parts[-1] if parts else ""


def _durations(seconds: Any) -> Any:
    if isinstance(seconds, Mapping):
        return {name: _durations(value) for name, value in seconds.items()}
    return words.duration(seconds) if isinstance(seconds, int | float) else seconds
