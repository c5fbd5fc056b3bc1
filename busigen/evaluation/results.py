"""What a section of the audit hands back, figures, findings and pictures, and how it is kept for a later run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BeforeValidator

from busigen.errors import IntegrityError
from busigen.files import write_json
from busigen.records import Record, Text, checked, read_checked

Better = Literal["lower", "higher", "near"]
"""Where a figure should lie against its floor: below, above, or inside the floor's interval."""

# JSON has null for a number that is none.
_Value = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval. The bounds are None where no interval can be given."""

    value: _Value
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Figure:
    """One measured number, of so many ``synthetic`` and ``real`` images.

    Attributes:
        key: Dotted name, unique in the report: ``section.region.class.measure.statistic``.
        label: The same for people, short enough for a table's row.
        value: The synthetic set against the real one, with its bootstrap interval.
        floor: The same between two group-disjoint halves of the real set; where it is None, ``note`` says why.
        unit: ``px``, ``dB``, ``%``, ... or empty.
        p: P-value of the test against "no difference", adjusted for the section's number of tests.
        flagged: It is a defect.
    """

    key: str
    label: str
    value: Interval
    floor: Interval | None
    synthetic: int
    real: int
    better: Better = "lower"
    unit: str = ""
    p: float | None = None
    flagged: bool = False
    headline: bool = False
    note: str = ""


@dataclass(frozen=True)
class Finding:
    """A sentence about the set: a ``flag`` is a defect, a ``note`` something to know. It rests on figures ``keys``."""

    level: Literal["flag", "note"]
    text: str
    keys: tuple[str, ...] = ()


@dataclass(frozen=True)
class Picture:
    """A picture or plot of the report, in the section's folder: PNG for images, SVG for plots."""

    file: str
    caption: str


@dataclass
class SectionResult:
    """Everything one section found. ``details`` is JSON-able and goes into ``report.json`` alone."""

    section: str
    figures: list[Figure] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def flagged(self) -> bool:
        """The section found a defect."""
        return any(finding.level == "flag" for finding in self.findings)

    def flag(self, text: str, *keys: str) -> None:
        """Add a defect."""
        self.findings.append(Finding("flag", text, keys))

    def note(self, text: str, *keys: str) -> None:
        """Add something to know."""
        self.findings.append(Finding("note", text, keys))

    def figure(self, key: str) -> Figure:
        """The figure of that key; a ``KeyError`` where there is none."""
        return {figure.key: figure for figure in self.figures}[key]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> SectionResult:
        """The inverse of ``to_dict``.

        Raises:
            IntegrityError: the content is no section's result.
        """
        return checked(cls, content, "the section's result", fix="Run the audit again.")


def section_folder(out: Path, section: str) -> Path:
    """Where a section keeps its pictures, and its result for a later run."""
    return out / "sections" / section


class _Kept(Record):
    """A kept result, of the audit that its key is of."""

    key: Text
    result: dict[Text, Any]


def store(out: Path, key: str, result: SectionResult) -> None:
    """Keep a result; it appears complete or not at all.

    Raises:
        OSError: the disk refused.
    """
    folder = section_folder(out, result.section)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "result.json", {"key": key, "result": jsonable(result.to_dict())})


def load(out: Path, section: str, key: str) -> SectionResult | None:
    """The kept result of that key; None where there is none, it is damaged, or one of its pictures is gone."""
    folder = section_folder(out, section)
    try:
        content = read_checked(_Kept, folder / "result.json", fix="")
        if content["key"] != key:
            return None
        result = SectionResult.from_dict(content["result"])
    except (OSError, IntegrityError):
        return None
    whole = all((folder / picture.file).is_file() for picture in result.pictures)
    return result if whole and result.section == section else None


def jsonable(value: Any) -> Any:
    """The same in plain JSON types; NaN and infinities, which JSON does not know, become null."""
    if isinstance(value, dict):
        return {str(name): jsonable(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(part) for part in value]
    if isinstance(value, np.ndarray | np.generic):
        return jsonable(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, str | int | bool) else str(value)
