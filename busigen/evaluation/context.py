"""What every section of the audit is given, what it hands back, and how that is kept for a later run."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import polars as pl
from numpy.typing import NDArray
from pydantic import BeforeValidator

from busigen.data.sources.records import Refusal
from busigen.errors import IntegrityError
from busigen.files import write_json
from busigen.records import Record, Text, checked, read_checked
from busigen.runtime.progress import Progress

Item = TypeVar("Item")
Effort = Literal["quick", "full"]
Backgrounds = Literal["real", "synthetic", "unknown"]
Better = Literal["lower", "higher", "near"]
"""Where a figure should lie against its floor: below, above, or inside the floor's interval."""

CLEAN = "Text, calipers and other marks of the scanner are painted over in all sets, or they would be what is learnt."
"""Note of the sections that learn from :meth:`ImageSet.without_overlays`."""


@dataclass(frozen=True)
class ImageSet:
    """A labelled set in the working frame. Rows of the arrays and of the table correspond.

    Attributes:
        images: ``uint8 (N, 256, 256)``, grey, letterboxed.
        masks: ``bool (N, 256, 256)``, True on lesions; empty for normals.
        valid: ``bool (N, 256, 256)``, True on the image, False on letterbox bars.
        table: One row per image: ``id``, ``class`` (of ``registry.CLASSES``, or ``unknown``), ``group`` i64 (patient or
            near-duplicate group), ``file``, ``sha256`` of it, native ``width`` and ``height``, ``mode`` (pixel format,
            null where unknown), ``colour``, ``lesions`` (parts of the mask), ``text`` and ``calipers`` (overlays
            suspected in the native image), ``background`` (what a busigen sample was painted into: the sha256 of a
            healthy image's file, or ``synthetic``; else null), ``mask_files`` (0 where the image has none),
            ``grid_group`` and ``grid_level`` (of a busigen grid: which background it is, and the sample's own levels;
            else null); and what was asked for besides (`read_set`).
        overlays: ``bool (N, 256, 256)``, pixels suspected to be overlay.
        clean: ``images`` with everything painted over that may be overlay, or None where that was not looked for.
        layout: How the folder is laid out, for people: ``busigen dataset``, ``prepared``, ``BUSI``, ...
        refused: Files that could not be read and are in no row.
        notes: What was passed over, joined, guessed or read otherwise than it is stored, one line a kind.
    """

    name: str
    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]
    valid: NDArray[np.bool_]
    overlays: NDArray[np.bool_]
    table: pl.DataFrame
    clean: NDArray[np.uint8] | None = None
    layout: str = "unknown"
    refused: tuple[Refusal, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.table.height

    @property
    def classes(self) -> NDArray[np.str_]:
        """N class names."""
        return self.table["class"].to_numpy().astype(np.str_)

    @property
    def groups(self) -> NDArray[np.int64]:
        """N group numbers."""
        return self.table["group"].to_numpy()

    def take(self, rows: NDArray[Any]) -> ImageSet:
        """The rows of these positions, or where a mask is True, in order."""
        rows = np.flatnonzero(rows) if rows.dtype == np.bool_ else rows
        names = ("images", "masks", "valid", "overlays", *(() if self.clean is None else ("clean",)))
        return replace(self, **{name: getattr(self, name)[rows] for name in names}, table=self.table[rows.tolist()])

    def without_overlays(self) -> ImageSet:
        """The set with its clean images, for what learns: calipers give real images away, and where lesions are."""
        return self if self.clean is None else replace(self, images=self.clean)

    def with_lesions(self) -> ImageSet:
        """The images whose mask is not empty."""
        return self.take(np.asarray(self.masks.any(axis=(1, 2))))


def fingerprint(images: ImageSet) -> str:
    """Hex sha256 over everything that a section can see of a set; where it lies does not count."""
    digest = hashlib.sha256()
    marks = (np.packbits(images.masks), np.packbits(images.valid), np.packbits(images.overlays))
    for array in (images.images, images.without_overlays().images, *marks):
        digest.update(np.ascontiguousarray(array).data)
    digest.update(images.table.write_json().encode())
    digest.update(json.dumps([refusal.to_dict() for refusal in images.refused]).encode())
    return digest.hexdigest()


@dataclass
class AuditContext:
    """What every section of the audit is given.

    Attributes:
        real: Real images that did **not** train the generator, as far as is known: what it is judged against.
        train: Real images that trained it; None where nobody said which those are.
        device: ``cpu`` or ``cuda``, resolved.
        backgrounds: What the synthetic images were painted into.
        inception: Inception weights for FID, KID and IS; None to look in the library's own cache.
        external: A further real set that utility tests on.
        healthy: Folder of the healthy images that the synthetic set was painted into, where somebody named it.
    """

    synthetic: ImageSet
    real: ImageSet
    train: ImageSet | None
    out: Path
    effort: Effort = "quick"
    seed: int = 0
    device: str = "cpu"
    backgrounds: Backgrounds = "unknown"
    inception: Path | None = None
    external: ImageSet | None = None
    healthy: Path | None = None
    progress: Progress = field(default_factory=Progress)

    def without_overlays(self) -> AuditContext:
        """The same audit on clean images."""
        names = ("synthetic", "real", "train", "external")
        sets = {name: part.without_overlays() for name in names if (part := getattr(self, name)) is not None}
        return replace(self, **sets)

    def folder(self, section: str) -> Path:
        """The section's folder for pictures, made on demand."""
        folder = section_folder(self.out, section)
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def rng(self, *names: str) -> np.random.Generator:
        """A generator of its own for every purpose: adding a draw in one section changes nothing in another."""
        return np.random.default_rng([self.seed, *"\0".join(names).encode()])

    def track(self, what: str, items: Iterable[Item], total: int) -> Iterator[Item]:
        """Iterate with a progress bar."""
        self.progress.start(what, total, unit="step")
        for item in items:
            yield item
            self.progress.advance(1)


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
        """The inverse of ``to_dict``. Raises ``IntegrityError`` where the content is no section's result."""
        return checked(cls, content, "the section's result", fix="Run the audit again.")


def section_folder(out: Path, section: str) -> Path:
    """Where a section keeps its pictures, and its result for a later run."""
    return out / "sections" / section


class _Kept(Record):
    key: Text
    result: dict[Text, Any]


def store(out: Path, key: str, result: SectionResult) -> None:
    """Keep a result; it appears complete or not at all. Raises ``OSError``."""
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
