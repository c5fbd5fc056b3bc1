"""What a source folder says about its images, before any of them is opened; and the tables that say it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from busigen.data.sources.frames import name_of
from busigen.data.sources.renamed import real_file
from busigen.errors import InputError
from busigen.foreign import open_file
from busigen.text import printable

if TYPE_CHECKING:
    from busigen.data.sources.files import Place, Tree

UNKNOWN_CLASS = "unknown"  # The class of an image that nobody classified.
Row = dict[str, str | None]  # A row of a table of text, by column.
_NAMED = 3  # Names that stand for more files of their kind.

_BIRADS = re.compile(
    r"(?:bi-?rads)?[ :_-]*(?:cat(?:egory|\.)?)?[ :_-]*([0-6]|vi|iv|v|i{1,3})(?:\.0|(?:(?<=4)|(?<=iv))[ -]?[abc])?"
)
_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4", "v": "5", "vi": "6"}


@dataclass(frozen=True)
class Record:
    """One image that a source lists, with a file that may turn out to be missing, and its mask files.

    ``id``, such as ``busi/benign (1)``, does not depend on where the source lies; ``patient`` is unique across sources;
    ``birads`` is normalised by `birads_category`; ``scanner`` names the device, such as ``GE Logiq 7``.
    """

    id: str
    image_class: str
    source: str
    image: Path
    masks: tuple[Path, ...]
    patient: str | None = None
    birads: str | None = None
    scanner: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "birads", birads_category(self.birads))
        object.__setattr__(self, "scanner", printable(self.scanner.strip()) or None if self.scanner else None)


def birads_category(text: str | None) -> str | None:
    """A BI-RADS category as one digit: 4 for ``4a``, ``4.0``, ``BI-RADS 4B`` or ``IV``; other text stays as it is."""
    found = _BIRADS.fullmatch((text or "").strip().lower())
    return text if found is None else _ROMAN.get(found[1], found[1])


@dataclass(frozen=True)
class Refusal:
    """What is left out, why, and what to do about it, as printable text; ``file`` names some of ``count`` files."""

    file: str
    problem: str
    fix: str
    count: int = 1

    def __post_init__(self) -> None:
        for name in ("file", "problem", "fix"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def to_error(self) -> InputError:
        """The same as an error."""
        return InputError(f"{self.file}: {self.problem}", fix=self.fix)

    def to_dict(self) -> dict[str, str]:
        """The three texts, for JSON."""
        return {"file": self.file, "problem": self.problem, "fix": self.fix}


def counted(what: str, files: Sequence[str]) -> str:
    """One line of notes: how many files, what became of them, and the names of some."""
    return f"{len(files):,} {what}: {named(files)}"


def named(files: Iterable[str]) -> str:
    """The first few names, and how many there are besides: ``a.png, b.png, c.png and 12 more``."""
    names = list(files)
    shown = ", ".join(names[:_NAMED])
    return printable(f"{shown} and {len(names) - _NAMED:,} more" if len(names) > _NAMED else shown)


@dataclass
class Listing:
    """All that a source folder lists, what it lists in vain, and what else a person should know of it.

    ``folder`` is that in which the layout was found. ``unlabelled``: images of no class are listed, too, under class
    `UNKNOWN_CLASS`. ``loose``: also where nothing else of the layout is there, as for a folder of healthy images.
    ``refused`` is what is left out and should not be, ``doubtful`` says why by file; ``notes`` are on what is as it
    should be, one line a kind.
    """

    layout: str
    folder: Path
    tree: Tree
    unlabelled: bool = False
    loose: bool = False
    records: list[Record] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    doubtful: dict[Path, str] = field(default_factory=dict)
    _noted: set[Path] = field(default_factory=set)

    def relative(self, path: Path) -> str:
        """A path as it is recorded: below the source folder's name, with forward slashes; of DICOM, by its hash."""
        if path in self.tree.scans:
            return f"{self.folder.name}/{name_of(path)}"
        if real_file(path) != path:
            return f"{self.folder.name}/{path.name}"
        return printable(f"{self.folder.name}/{path.relative_to(self.folder).as_posix()}")

    def refuse(self, paths: Sequence[Path], problem: str, fix: str, masks: Iterable[Path] = ()) -> None:
        """Note files that are left out for one reason, their masks with them; no files are no refusal."""
        self._noted.update(masks)
        if paths:
            self.doubtful.update(dict.fromkeys(paths, problem))
            self.refused.append(Refusal(named(map(self.relative, paths)), problem, fix, count=len(paths)))

    def note(self, paths: Sequence[Path], what: str) -> None:
        """Note what became of some files, as a clause that follows their number; none are no note."""
        if paths:
            self._noted.update(paths)
            self.notes.append(counted(what, [self.relative(path) for path in paths]))

    def knows(self) -> set[Path]:
        """All files that it lists, refuses or notes."""
        listed = {path for record in self.records for path in (record.image, *record.masks)}
        return listed | self.doubtful.keys() | self._noted


@dataclass(frozen=True)
class Layout:
    """One way of laying out a labelled folder, which ``looks_like`` describes in messages.

    ``is_root`` says whether a place is the root of such a set (asked loosely for a folder of healthy images), and
    ``read`` fills a listing whose ``folder`` is that root.
    """

    name: str
    looks_like: str
    is_root: Callable[[Tree, Place, bool], bool]
    read: Callable[[Listing], None]


def read_rows(path: Path, required: Sequence[str]) -> list[Row]:
    """The rows of a CSV file (UTF-8, any line ends) as text: stripped values by column, None where empty.

    An InputError says that it is unreadable, no CSV, or lacks a required column.
    """
    import polars as pl

    try:
        # Nothing is inferred: a patient "007" must not become 7.
        # An open file, because polars takes a path for a pattern.
        with open_file(path) as file:
            frame = pl.read_csv(file, infer_schema=False, encoding="utf8-lossy")
    except (pl.exceptions.PolarsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or ["unknown reason"])[0]
        problem = f"{path.name} cannot be read as CSV: {reason}."
        raise InputError(problem, fix="Save it as comma-separated UTF-8.") from error
    frame = frame.rename({name: name.strip().lstrip("\ufeff") for name in frame.columns})
    missing = [name for name in required if name not in frame.columns]
    if missing:
        problem = f"{path.name} has no column {', '.join(missing)}; it has {', '.join(frame.columns)}."
        raise InputError(problem, fix=f"Name its columns {', '.join(required)}.")
    return [{name: (value or "").strip() or None for name, value in row.items()} for row in frame.iter_rows(named=True)]
