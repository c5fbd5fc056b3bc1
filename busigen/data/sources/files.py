"""What lies in a folder that somebody gave: its images, and what is passed over there and why.

All that reads a folder of images looks at it through `Tree`, so that every command sees the same files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from busigen.data.sources.records import Refusal, named
from busigen.errors import InputError
from busigen.foreign import MAX_DEPTH

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff")
"""File name endings, lower case, that count as an image."""

_FORMATS = "PNG, JPEG, BMP and TIFF"
_DOCUMENTS = re.compile(
    r"|\.(csv|tsv|docx?|htm|html|ini|ipynb|jsonl?|lnk|log|m|md|ods|pdf|pptx?|py|rst|txt|url|xlsx?|xml|ya?ml|db)"
)
"""Endings of files that nobody takes for images; all others are named where they are passed over."""

_FOREIGN_FOLDERS = frozenset({"__macosx", "lost+found", "$recycle.bin", "system volume information", "@eadir"})
_OURS = tuple(
    frozenset(names.split())
    for names in (
        "run.json shards",
        "dataset.json shards",
        "dataset.json parts",
        "prepared.json",
        "busigen.json",
        "bundle.json",
        "bench.json",
        "report.json sections",
    )
)
"""What tells a folder that busigen wrote: a dataset, prepared data, a checkpoint, a bundle, measurements, a report."""

_MASK_NAME = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
_MASK_FOLDER = re.compile(
    r"(.*[\W_])?(masks?|gt|ground[\W_]?truths?|segmentations?|annotations?|labelst[rs])", re.IGNORECASE
)
_DIGITS = re.compile(r"(\d+)")


@dataclass(frozen=True)
class Place:
    """One folder.

    Attributes:
        path: Where it is.
        folders: The folders in it that are looked into, in natural order.
        images: The files in it with an image's ending, masks among them, in natural order.
        others: Names of the other files.
    """

    path: Path
    folders: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    others: tuple[str, ...] = ()

    def file(self, name: str) -> Path | None:
        """The file of that name, upper or lower case, that is no image."""
        return next((self.path / other for other in self.others if name_key(other) == name_key(name)), None)


@dataclass
class Tree:
    """A folder and those below it, each looked at once. Links to folders are not followed, so there are no loops.

    Attributes:
        root: The folder that was given.
        skip: A folder below that is passed over.
    """

    root: Path
    skip: Path | None = None
    _places: dict[Path, Place] = field(default_factory=dict, init=False)
    _passed: dict[str, list[Path]] = field(default_factory=dict, init=False)
    _seen: dict[tuple[int, int], Path] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Look at nothing yet, but know where links may lead."""
        self._inside = os.path.realpath(self.root)
        self._skipped = None if self.skip is None else os.path.realpath(self.skip)

    def at(self, path: Path) -> Place:
        """One folder.

        Raises:
            InputError: It cannot be read.
        """
        if path not in self._places:
            self._places[path] = self._look(path)
        return self._places[path]

    def below(self, start: Path | None = None) -> Iterator[Place]:
        """A folder, by default the root, and all below it that are looked into; errors are those of `at`."""
        waiting = [start or self.root]
        while waiting:
            place = self.at(waiting.pop())
            yield place
            waiting.extend(reversed(place.folders))

    def name(self, path: Path) -> str:
        """A path as people are told of it: it begins with the root's name."""
        return (Path(Path(self._inside).name) / path.relative_to(self.root)).as_posix()

    def refused(self) -> list[Refusal]:
        """What was passed over so far although it may hold images, one entry for each reason."""
        return [
            Refusal(named(map(self.name, paths)), f"{_REASONS[why][0]}.", _REASONS[why][1], count=len(paths))
            if why in _REASONS
            else Refusal(
                named(map(self.name, paths)),
                f"Files that end in {why} are not read.",
                f"Convert them; {_FORMATS} are read.",
                count=len(paths),
            )
            for why, paths in self._passed.items()
            if why not in _NOTES
        ]

    def notes(self) -> list[str]:
        """What was passed over so far as it should be, one line for each reason."""
        return [
            f"{len(paths)} {_NOTES[why]}: {named(map(self.name, paths))}"
            for why, paths in self._passed.items()
            if why in _NOTES
        ]

    def found(self) -> str:
        """What lies below the root, as a clause for an error: counts of files by their ending."""
        endings: Counter[str] = Counter()
        for place in self.below():
            names = [*(path.name for path in place.images), *place.others]
            endings.update(ending_of(name) or "no ending" for name in names)
        links = len(self._passed.get("link", ()))
        described = [f"{count:,} {ending}" for ending, count in endings.most_common(6)]
        return ", ".join([*described, *([f"{links} links, which are not followed"] if links else [])]) or "no files"

    def _look(self, path: Path) -> Place:
        try:
            status = os.stat(path)
            # Some systems have ways around to a folder above that do not show as links: mounts, junctions.
            if self._seen.setdefault((status.st_dev, status.st_ino), path) != path:
                self._pass("again", path)
                return Place(path)
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda entry: natural_key(entry.name))
            names = {entry.name for entry in found}
            if any(ours <= names for ours in _OURS) or (self._skipped and os.path.realpath(path) == self._skipped):
                self._pass("ours", path)
                return Place(path)
            folders: list[Path] = []
            images: list[Path] = []
            others: list[str] = []
            for entry in found:
                self._sort(entry, path / entry.name, folders, images, others)
        except OSError as error:
            raise InputError(
                f"{path} cannot be read: {error.strerror}.", fix="Check the folder's permissions."
            ) from error
        return Place(path, tuple(folders), tuple(images), tuple(others))

    def _sort(
        self, entry: os.DirEntry[str], path: Path, folders: list[Path], images: list[Path], others: list[str]
    ) -> None:
        ending, linked = ending_of(entry.name), entry.is_symlink()
        # Of links that lead in circles, a directory entry raises what `os.path` answers.
        folder = os.path.isdir(path) if linked else entry.is_dir()
        if _hidden(entry.name):
            if folder or ending in SUFFIXES:
                self._pass("hidden", path)
        elif linked and (folder or not self._stays_inside(path)):
            if folder or not _DOCUMENTS.fullmatch(ending):
                self._pass("link", path)
        elif folder:
            if len(path.relative_to(self.root).parts) > MAX_DEPTH:
                self._pass("deep", path)
            else:
                folders.append(path)
        elif ending in SUFFIXES:
            images.append(path)
        else:
            others.append(entry.name)
            if not _DOCUMENTS.fullmatch(ending):
                self._pass(ending, path)

    def _stays_inside(self, link: Path) -> bool:
        # Never raises, whatever the link's loops.
        target = os.path.realpath(link)
        return os.path.isfile(target) and Path(target).is_relative_to(self._inside)

    def _pass(self, why: str, path: Path) -> None:
        self._passed.setdefault(why, []).append(path)


_REASONS = {
    "link": ("Links are not followed out of the folder that was given, nor to folders", "Put the files there instead"),
    "deep": (f"Folders are looked into {MAX_DEPTH} deep", "Give a folder further down"),
}
_NOTES = {
    "hidden": "hidden, passed over",
    "ours": "written by busigen, passed over",
    "again": "other names of a folder that was read, passed over",
}


def find_images(folder: Path) -> list[Path]:
    """List the images below a folder in natural order: no masks, nothing hidden, no links that leave the folder.

    Args:
        folder: Where to look, at any depth.

    Returns:
        Paths that begin with ``folder``.

    Raises:
        InputError: The folder does not exist or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.", fix="Give the folder that holds the images.")
    return images_below(Tree(folder), folder)


def images_below(tree: Tree, folder: Path, counted: Callable[[Path], None] | None = None) -> list[Path]:
    """The images at any depth below a folder of a tree, in natural order; ``counted`` is told of every mask."""
    found: list[Path] = []
    for place in tree.below(folder):
        inside = any(is_mask_folder(part) for part in place.path.relative_to(folder).parts)
        for path in place.images:
            if not inside and is_image_name(path.name):
                found.append(path)
            elif counted is not None:
                counted(path)
    return in_natural_order(found, folder)


def in_natural_order(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Paths below a folder, sorted as a person would: ``benign (2).png`` before ``benign (10).png``."""
    return sorted(paths, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def is_image_name(name: str) -> bool:
    """Whether a file name is that of an image rather than a mask, a hidden file or anything else."""
    path = Path(name)
    return not _hidden(name) and path.suffix.lower() in SUFFIXES and not _MASK_NAME.search(path.stem)


def is_mask_folder(name: str) -> bool:
    """Whether a folder's name says that it holds masks: ``masks``, ``USG Masks``, ``GT``, ``labelsTr``."""
    return _MASK_FOLDER.fullmatch(name) is not None


def ending_of(name: str) -> str:
    """A file name's ending, lower case, with its dot; that of ``x.nii.gz`` is ``.nii.gz``."""
    stem, ending = os.path.splitext(name)
    before = os.path.splitext(stem)[1] if ending.lower() in {".gz", ".bz2", ".xz"} else ""
    return (before + ending).lower()


def name_key(name: str) -> str:
    """A name as names are compared: without case, in one Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``benign (2)`` comes before ``benign (10)``."""
    parts = _DIGITS.split(text.casefold())
    keyed = tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part)
    return (*keyed, (2, 0, text))


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in _FOREIGN_FOLDERS
