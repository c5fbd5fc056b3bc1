"""What a source folder says about its images, before any of them is opened."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from busigen.errors import InputError
from busigen.text import printable

UNKNOWN_CLASS = "unknown"
"""The class of an image that nobody classified."""

# Names that stand for more files of their kind.
_NAMED = 3
_BIRADS = re.compile(
    r"(?:bi-?rads)?[ :_-]*(?:cat(?:egory|\.)?)?[ :_-]*([0-6]|vi|iv|v|i{1,3})(?:\.0|(?:(?<=4)|(?<=iv))[ -]?[abc])?"
)
_ROMAN = {"i": "1", "ii": "2", "iii": "3", "iv": "4", "v": "5", "vi": "6"}


@dataclass(frozen=True)
class Record:
    """One image that a source lists.

    Attributes:
        id: Unique name, such as ``busi/benign (1)``; it does not depend on where the source lies.
        image_class: One of ``registry.CLASSES``.
        source: Short name of the source.
        image: The image file, which may turn out to be missing.
        masks: Its mask files, one or more lesions each; empty if there are none.
        patient: Patient name, unique across sources, or None.
        birads: BI-RADS category as text, or None; as `birads_category` writes it.
    """

    id: str
    image_class: str
    source: str
    image: Path
    masks: tuple[Path, ...]
    patient: str | None = None
    birads: str | None = None

    def __post_init__(self) -> None:
        """Write the category as it is learnt from."""
        object.__setattr__(self, "birads", birads_category(self.birads))


def birads_category(text: str | None) -> str | None:
    """A BI-RADS category as one digit: 4 for ``4a``, ``4.0`` (as pandas writes it), ``BI-RADS 4B`` or ``IV``.

    What is no category stays as it is.
    """
    found = _BIRADS.fullmatch((text or "").strip().lower())
    return text if found is None else _ROMAN.get(found[1], found[1])


@dataclass(frozen=True)
class Refusal:
    """One file that is left out, why, and what to do about it. ``file`` begins with the source folder's name."""

    file: str
    problem: str
    fix: str

    def __post_init__(self) -> None:
        """Make the texts printable: they quote file names."""
        for name in ("file", "problem", "fix"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def to_error(self) -> InputError:
        """The same as an error, for strict runs."""
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
    """All that a source folder lists, and what it lists in vain.

    With ``unlabelled``, a layout that can do without classes lists images of none under class `UNKNOWN_CLASS`.
    """

    layout: str
    folder: Path
    unlabelled: bool = False
    records: list[Record] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def relative(self, path: Path) -> str:
        """A path as it is recorded: below the source folder's name, with forward slashes."""
        return printable(f"{self.folder.name}/{path.relative_to(self.folder).as_posix()}")

    def refuse(self, path: Path, problem: str, fix: str) -> None:
        """Note a file that is left out."""
        self.refused.append(Refusal(file=self.relative(path), problem=problem, fix=fix))

    def note(self, paths: Sequence[Path], what: str) -> None:
        """Note what became of some files, as a clause that follows their number; none are no note."""
        if paths:
            self.notes.append(counted(what, [self.relative(path) for path in paths]))


@dataclass(frozen=True)
class Layout:
    """One way of laying out a labelled folder.

    Attributes:
        name: Short name.
        looks_like: What such a folder holds, for messages.
        find: The folder's root in this layout, or None if it is laid out otherwise.
        read: Fills a listing whose ``folder`` is that root.
    """

    name: str
    looks_like: str
    find: Callable[[Path], Path | None]
    read: Callable[[Listing], None]
