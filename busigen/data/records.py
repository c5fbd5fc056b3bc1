"""What a source folder says about its images, before any of them is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from busigen.errors import InputError
from busigen.text import printable

UNKNOWN_CLASS = "unknown"
"""The class of an image that nobody classified."""


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
        birads: BI-RADS category as text, or None.
    """

    id: str
    image_class: str
    source: str
    image: Path
    masks: tuple[Path, ...]
    patient: str | None = None
    birads: str | None = None


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

    def relative(self, path: Path) -> str:
        """A path as it is recorded: below the source folder's name, with forward slashes."""
        return printable(f"{self.folder.name}/{path.relative_to(self.folder).as_posix()}")

    def refuse(self, path: Path, problem: str, fix: str) -> None:
        """Note a file that is left out."""
        self.refused.append(Refusal(file=self.relative(path), problem=problem, fix=fix))


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
