"""What lies in a folder that somebody gave: its images, which masks are theirs, and what is passed over and why.

All that reads a folder of images looks at it through `Tree`, so that every command sees the same files.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import eq
from pathlib import Path

from busigen.data.dicom.header import MARK_END, installed, is_dicom, is_dicom_name
from busigen.data.sources.frames import all_frames, name_of
from busigen.data.sources.records import Refusal, named
from busigen.errors import BusigenError, InputError
from busigen.foreign import MAX_DEPTH, open_file
from busigen.text import counted, install_command

SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".tif", ".tiff")  # Endings of images, lower case.
_FORMATS = "PNG, JPEG, BMP, TIFF and DICOM"
# Endings of files that nobody takes for images; all others are named where they are passed over.
_DOCUMENTS = re.compile(
    r"|\.(csv|tsv|docx?|htm|html|ini|ipynb|jsonl?|lnk|log|m|md|ods|pdf|pptx?|py|rst|txt|url|xlsx?|xml|ya?ml|db)"
)
_FOREIGN_FOLDERS = frozenset({"__macosx", "lost+found", "$recycle.bin", "system volume information", "@eadir"})
# Names that tell a folder that busigen wrote: a dataset, a report, prepared data, a checkpoint, a bundle, timings.
_OURS = (
    frozenset(("run.json", "shards")),
    frozenset(("dataset.json", "shards")),
    frozenset(("dataset.json", "parts")),
    frozenset(("report.json", "sections")),
    *(frozenset((name,)) for name in ("prepared.json", "busigen.json", "bundle.json", "bench.json")),
)
_MASK_NAME = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
_MASK_FOLDER = re.compile(
    r"(.*[\W_])?(masks?|gt|ground[\W_]?truths?|segmentations?|annotations?|labelst[rs])", re.IGNORECASE
)
_DIGITS = re.compile(r"(\d+)")
# Words for a mask that may follow its image's name, the plainest first.
_WORDS = ("mask", "tumor", "tumour", "lesion", "segmentation", "seg", "gt", "label", "annotation")
_WORD_AT_END = re.compile(rf"(.+)[_ -]({'|'.join(_WORDS)})([_ -]?\d+)?", re.IGNORECASE)
_BREAK = re.compile(r"[\W_]+")
# Folders of masks that somebody put aside; keys as of `name_key`.
_SET_ASIDE = frozenset({"old", "backup", "backups", "bak", "trash", "archive", "archived", "deleted"})

# Why files are passed over, by what they are: as a refusal with its fix, or as a note. Others are unknown endings.
_REASONS = {
    "link": ("Links are not followed out of the folder that was given, nor to folders.", "Put the files there instead"),
    "dicom": ("DICOM files are read with an extra.", f"Run {install_command('dicom')}"),
    "deep": (f"Folders are looked into {MAX_DEPTH} deep.", "Give a folder further down"),
}
_NOTES = {
    "hidden": "hidden, passed over",
    "ours": "written by busigen, passed over",
    "again": "other names of a folder that was read, passed over",
}


@dataclass(frozen=True)
class Place:
    """One folder: in natural order the folders that are looked into, and images, masks among them; other files."""

    path: Path
    folders: tuple[Path, ...] = ()
    images: tuple[Path, ...] = ()
    others: tuple[str, ...] = ()

    def file(self, name: str) -> Path | None:
        """The file of that name, upper or lower case, that is no image."""
        return next((self.path / other for other in self.others if name_key(other) == name_key(name)), None)


class Tree:
    """A folder and those below it, each looked at once. Links to folders are not followed, so there are no loops.

    ``skip`` names a folder below that is passed over; ``scans`` are the images that are DICOM, of those seen so far.
    """

    def __init__(self, root: Path, skip: Path | None = None) -> None:
        self.root = root
        self._inside = os.path.realpath(root)
        self._skipped = None if skip is None else os.path.realpath(skip)
        self.scans: set[Path] = set()
        self._places: dict[Path, Place] = {}
        self._passed: dict[str, list[Path]] = {}
        self._seen: dict[tuple[int, int], Path] = {}

    def at(self, path: Path) -> Place:
        """One folder; InputError where it cannot be read."""
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
        """A path as people are told of it: it begins with the root's name, and a DICOM file's ends with its hash."""
        if path in self.scans:
            return (Path(self._inside).name / Path(name_of(path))).as_posix()
        return (Path(Path(self._inside).name) / path.relative_to(self.root)).as_posix()

    def passed_over(self) -> tuple[list[Refusal], list[str]]:
        """What was passed over so far, an entry for each reason: what may hold images, and what should be."""
        refused, notes = [], []
        for why, paths in self._passed.items():
            # Names of DICOM files may tell patients.
            files = counted(len(paths), "DICOM file") if why == "dicom" else named(map(self.name, paths))
            if why in _NOTES:
                notes.append(f"{len(paths)} {_NOTES[why]}: {files}")
            else:
                unread = f"Files that end in {why} are not read.", f"Convert them; {_FORMATS} are read."
                refused.append(Refusal(files, *_REASONS.get(why, unread), count=len(paths)))
        return refused, notes

    def found(self) -> str:
        """What lies below the root, as a clause for an error: counts of files by their ending."""
        endings: Counter[str] = Counter()
        for place in self.below():
            endings.update("DICOM" if path in self.scans else ending_of(path.name) for path in place.images)
            endings.update(ending_of(name) or "no ending" for name in place.others)
        if not os.listdir(self._inside):
            return "nothing: it is empty"
        links = len(self._passed.get("link", ()))
        described = [f"{count:,} {ending}" for ending, count in endings.most_common(6)]
        return (
            ", ".join([*described, *([f"{links} links, which are not followed"] if links else [])])
            or "no files but what busigen may have written"
        )

    @property
    def lacks_extra(self) -> bool:
        """Whether DICOM files were passed over because the extra that reads them is not installed."""
        return "dicom" in self._passed

    def unread(self) -> bool:
        """Whether files of unknown endings were passed over so far."""
        return any(why.startswith(".") for why in self._passed)

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
            kinds: defaultdict[str, list[Path]] = defaultdict(list)
            for entry in found:
                kinds[self._kind(entry, path / entry.name)].append(path / entry.name)
        except OSError as error:
            fix = "Check the folder's permissions."
            raise InputError(f"{path} cannot be read: {error.strerror}.", fix=fix) from error
        return Place(path, tuple(kinds["folder"]), tuple(kinds["image"]), tuple(other.name for other in kinds["other"]))

    def _kind(self, entry: os.DirEntry[str], path: Path) -> str:
        """``folder``, ``image`` or ``other``; anything else is passed over, and noted where it may hold images."""
        ending, linked = ending_of(entry.name), entry.is_symlink()
        # Of links that lead in circles, a directory entry raises what `os.path` answers.
        folder = os.path.isdir(path) if linked else entry.is_dir()
        document = _DOCUMENTS.fullmatch(ending) is not None
        if entry.name.startswith(".") or entry.name.casefold() in _FOREIGN_FOLDERS:
            return self._pass("hidden", path) if folder or ending in SUFFIXES else ""
        target = os.path.realpath(path) if linked else ""  # Never raises, whatever the link's loops.
        if linked and (folder or not (os.path.isfile(target) and Path(target).is_relative_to(self._inside))):
            return self._pass("link", path) if folder or not document else ""
        if folder:
            deep = len(path.relative_to(self.root).parts) > MAX_DEPTH
            return self._pass("deep", path) if deep else "folder"
        if ending in SUFFIXES:
            return "image"
        if _is_scan(path, ending):
            if installed():
                self.scans.add(path)
                return "image"
            self._pass("dicom", path)
            return "other"
        if not document:
            self._pass(ending, path)
        return "other"

    def _pass(self, why: str, path: Path) -> str:
        self._passed.setdefault(why, []).append(path)
        return why


def find_images(folder: Path) -> list[Path]:
    """The images below a folder in natural order, without masks, hidden ones and links out; else an InputError.

    Of DICOM files, every frame (`busigen.data.sources.renamed`).
    """
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder.", fix="Give the folder that holds the images.")
    tree = Tree(folder)
    return list(all_frames(images_below(tree, folder), tree.scans))


def images_below(tree: Tree, folder: Path) -> list[Path]:
    """The images at any depth below a folder of a tree, in natural order, without masks."""
    found: list[Path] = []
    for place in tree.below(folder):
        if not any(map(is_mask_folder, place.path.relative_to(folder).parts)):
            found.extend(path for path in place.images if not _MASK_NAME.search(stem_of(path)))
    return in_natural_order(found, folder)


def in_natural_order(paths: Iterable[Path], folder: Path) -> list[Path]:
    """Paths below a folder, sorted as a person would: ``benign (2).png`` before ``benign (10).png``."""
    return sorted(paths, key=lambda path: natural_key(path.relative_to(folder).as_posix()))


def is_mask_folder(name: str) -> bool:
    """Whether a folder's name says that it holds masks: ``masks``, ``USG Masks``, ``GT``, ``labelsTr``."""
    return _MASK_FOLDER.fullmatch(name) is not None


def ending_of(name: str) -> str:
    """A file name's ending, lower case, with its dot; that of ``x.nii.gz`` is ``.nii.gz``."""
    stem, ending = os.path.splitext(name)
    before = os.path.splitext(stem)[1] if ending.lower() in {".gz", ".bz2", ".xz"} else ""
    return (before + ending).lower()


def stem_of(path: Path) -> str:
    """A file's name without its ending; all of ``1.2.840.5``, as DICOM files are named, where numbers are no ending."""
    return path.name if path.suffix[1:].isdecimal() else path.stem


def _is_scan(path: Path, ending: str) -> bool:
    """Whether a file is DICOM: by its name, or by its content where it has no ending, or a number."""
    if is_dicom_name(path.name):
        return True
    if (ending and not ending[1:].isdecimal() and ending != ".ima") or path.name.lower() == "dicomdir":
        return False
    try:
        with open_file(path) as file:
            return is_dicom(file.read(MARK_END))
    except (OSError, BusigenError):
        return False


def name_key(name: str) -> str:
    """A name as names are compared: without case, in one Unicode form."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def natural_key(text: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key under which ``benign (2)`` comes before ``benign (10)``."""
    parts = _DIGITS.split(text.casefold())
    keyed = tuple((0, int(part), part) if part.isdecimal() else (1, 0, part) for part in parts if part)
    return (*keyed, (2, 0, text))


@dataclass(frozen=True)
class _Candidate:
    """A mask by one of the image names that it may stand for: keys of its folders, that name, the word after it."""

    folders: tuple[str, ...]
    image: str
    word: str
    path: Path


@dataclass(frozen=True)
class Match:
    """The masks of one image, or ``rivals``, of which only a person can say which is the mask.

    ``guessed`` ones lie in another folder, and only a name that nothing else has joins them.
    """

    masks: tuple[Path, ...] = ()
    rivals: tuple[Path, ...] = ()
    guessed: bool = False


class MaskFiles:
    """The mask files of one set of images.

    A mask is named like its image, or with a word for a mask after it (``X_mask.png``, ``X_mask_1.png``,
    ``X_tumor.png``), or as in BUS-BRA (``mask_1.png`` of ``bus_1.png``); the same name comes first. It lies in the
    folder of the image's own name (``masks/benign`` for ``images/benign``). Where either side has no such folders, the
    name alone decides, but only if one image and one folder of masks have it: ``masks/benign/2.png`` is never the mask
    of ``images/malignant/2.png``. Folders that put masks aside (``old``) count for nothing. Names are compared without
    case and in one Unicode form where no name is exactly the same. ``channel`` ends the images' names, but not those of
    their masks; ``all`` are the masks that were taken in.
    """

    def __init__(self, images: Iterable[Path], folder: Path, channel: str = "") -> None:
        self.folder = folder
        self.channel = channel
        self.all: list[Path] = []
        self._used: set[Path] = set()
        self._masks: dict[str, list[_Candidate]] = {}
        self._images: dict[str, set[tuple[str, ...]]] = {}
        self._exact: set[str] = set()
        for image in images:
            stem = stem_of(image).removesuffix(channel)
            self._exact.add(stem)
            self._images.setdefault(name_key(stem), set()).add(_folders(image.parent, folder))

    def add_masks(self, masks: Iterable[Path], folder: Path, *, suffixed: bool = False) -> None:
        """Take in the files below a folder of masks; with ``suffixed``, only by the names that have a word for one."""
        for path in masks:
            self.all.append(path)
            names = [] if suffixed else [(path.stem, "")]
            names += [parts] if (parts := _name_and_word(path)) else []
            if path.stem.lower().startswith("mask_"):
                names.append((f"bus_{path.stem[5:]}", "mask"))
            for image, word in names:
                candidate = _Candidate(_folders(path.parent, folder), image, word, path)
                self._masks.setdefault(name_key(image), []).append(candidate)

    def of(self, image: Path) -> Match:
        """The masks of an image, of those that were taken in."""
        stem = stem_of(image).removesuffix(self.channel)
        folders = _folders(image.parent, self.folder)
        candidates = [
            mask
            for mask in self._masks.get(name_key(stem), ())
            # The mask of img1.png is not that of IMG1.png where both are there, nor that of x_seg1.png also x.png's.
            if (mask.image == stem or mask.image not in self._exact)
            and not (mask.word and mask.path.stem in self._exact)
            and not _SET_ASIDE.intersection(mask.folders)
        ]
        if own := [mask for mask in candidates if mask.folders == folders]:
            return self._best(own, stem, guessed=False)
        # One place ends with the other, as that without folders does with any.
        near = [mask for mask in candidates if all(map(eq, reversed(mask.folders), reversed(folders)))]
        if len({mask.folders for mask in near}) > 1 or (near and len(self._images.get(name_key(stem), ())) > 1):
            return Match(rivals=tuple(dict.fromkeys(mask.path for mask in near)))
        return self._best(near, stem, guessed=any(mask.folders for mask in near))

    def unused(self, *, belonging: bool) -> list[Path]:
        """The masks that no image has, once all were asked for: those named like some image, or all others."""
        found = []
        for path in self.all:
            names = path.stem, *(_name_and_word(path) or ())[:1]
            if path not in self._used and any(name_key(name) in self._images for name in names) is belonging:
                found.append(path)
        return found

    def _best(self, masks: Sequence[_Candidate], stem: str, *, guessed: bool) -> Match:
        """Of masks in one folder, those of the plainest name."""
        if not masks:
            return Match()
        word = min((mask.word for mask in masks), key=lambda word: ("", *_WORDS).index(word))
        same = [mask for mask in masks if mask.word == word]
        exact = [mask for mask in same if mask.image == stem] or same
        paths = tuple(dict.fromkeys(mask.path for mask in exact))
        # A word may have numbers, one for each lesion; the same name twice is two versions of one mask.
        if len({mask.image for mask in exact}) > 1 or (not word and len(paths) > 1):
            return Match(rivals=paths)
        self._used.update(paths)
        return Match(paths, guessed=guessed)


def masks_beside(place: Place) -> tuple[MaskFiles, dict[Path, Match]]:
    """The images that lie directly in a folder, each with the masks beside it: ``X.png`` with ``X_mask.png``.

    A file that has a word for a mask after another image's name is that one's mask; without such an image it is an
    image itself, but for ``X_mask.png``, which is always a mask.
    """
    stems = {name_key(stem_of(path)) for path in place.images}

    def is_mask(path: Path) -> bool:
        parts = _name_and_word(path)
        return parts is not None and (parts[1] == "mask" or name_key(parts[0]) in stems)

    images = [path for path in place.images if not is_mask(path)]
    found = MaskFiles(images, place.path)
    found.add_masks([path for path in place.images if is_mask(path)], place.path, suffixed=True)
    return found, {image: found.of(image) for image in images}


def image_name(mask: Path) -> str:
    """The name of the image that a mask's own name says: ``X`` of ``X_mask_1.png``, all of ``X.png``."""
    found = _name_and_word(mask)
    return found[0] if found else stem_of(mask)


def mask_of(masks: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path]:
    """For each image that a mask is named like, by its whole name or the words after it, one such mask."""
    by_name: dict[str, list[Path]] = {}
    for image in images:
        by_name.setdefault(name_key(image.stem), []).append(image)
    found: dict[Path, Path] = {}
    for mask in masks:
        stem = name_key(mask.stem)
        ends = (len(stem), *reversed([match.start() for match in _BREAK.finditer(stem)]))
        # The longest name that is there: case_1_2.png's is not case_1.png's.
        name = next((stem[:end] for end in ends if stem[:end] in by_name), None)
        found.update(dict.fromkeys(by_name.get(name or "", ()), mask))
    return found


@lru_cache(maxsize=1024)
def _folders(place: Path, folder: Path) -> tuple[str, ...]:
    """Keys of the folders between a folder and a place below it; many files share them."""
    return tuple(name_key(part) for part in place.relative_to(folder).parts)


def _name_and_word(path: Path) -> tuple[str, str] | None:
    """``("X", "mask")`` of ``X_mask_1.png``: the image's name and the word for a mask; None where there is no word."""
    match = _WORD_AT_END.fullmatch(path.stem)
    return (match[1], match[2].lower()) if match else None
