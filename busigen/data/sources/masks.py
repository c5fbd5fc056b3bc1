"""Which mask files belong to an image, in any of the layouts that busigen reads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from busigen.data.sources.files import Place, Tree, name_key

_WORDS = ("mask", "tumor", "tumour", "lesion", "segmentation", "seg", "gt", "label", "annotation")
_SUFFIX = re.compile(rf"(?P<image>.+)[_ -](?P<word>{'|'.join(_WORDS)})([_ -]?\d+)?", re.IGNORECASE)
_BREAK = re.compile(r"[\W_]+")
_SET_ASIDE = frozenset({"old", "backup", "backups", "bak", "trash", "archive", "archived", "deleted"})
"""Folders of masks that somebody put aside; keys as of `name_key`."""

Stem = Callable[[Path], str]
"""What an image's masks are named after: for most layouts its own name without the ending."""


def mask_stem(path: Path) -> tuple[str, str] | None:
    """What a mask's name says: the image's name without its ending and the word for a mask; None if it has no word.

    That of ``X_mask_1.png`` is ``("X", "mask")``, of ``X_tumor.png`` ``("X", "tumor")``.
    """
    match = _SUFFIX.fullmatch(path.stem)
    return (match["image"], match["word"].lower()) if match else None


@dataclass(frozen=True)
class _Candidate:
    """A mask by one of the image names that it may stand for: the folders it lies in, that name, the word after it."""

    folders: tuple[str, ...]
    image: str
    word: str
    path: Path


@dataclass(frozen=True)
class Match:
    """The masks of one image.

    Attributes:
        masks: One or more lesions each; empty where there are none.
        rivals: Files of which only a person can say which is the mask; ``masks`` is empty then.
        guessed: Images and masks lie in different folders and only the name, which is the only one, joins them.
    """

    masks: tuple[Path, ...] = ()
    rivals: tuple[Path, ...] = ()
    guessed: bool = False


@dataclass
class MaskFiles:
    """The mask files of one set of images.

    A mask is named like its image, or with a word for a mask after it (``X_mask.png``, ``X_mask_1.png``,
    ``X_tumor.png``), or as in BUS-BRA (``mask_1.png`` of ``bus_1.png``); the same name comes first. It lies in the
    folder of the image's own name (``masks/benign`` for ``images/benign``). Where either side has no such folders, the
    name alone decides, but only if one image and one folder of masks have it: ``masks/benign/2.png`` is never the mask
    of ``images/malignant/2.png``. Folders that put masks aside (``old``) count for nothing. Names are compared without
    case and in one Unicode form where no name is exactly the same.

    Attributes:
        all: The mask files that were taken in.
        used: Those that some image has.
    """

    stem: Stem = field(default=lambda path: path.stem)
    all: list[Path] = field(default_factory=list, init=False)
    used: set[Path] = field(default_factory=set, init=False)
    _masks: dict[str, list[_Candidate]] = field(default_factory=dict, init=False)
    _images: dict[str, set[tuple[str, ...]]] = field(default_factory=dict, init=False)
    _exact: set[str] = field(default_factory=set, init=False)

    def add_images(self, images: Iterable[Path], folder: Path) -> None:
        """Take in images below a folder."""
        for image in images:
            stem = self.stem(image)
            self._exact.add(stem)
            self._images.setdefault(name_key(stem), set()).add(_folders(image.parent, folder))

    def add_masks(self, masks: Iterable[Path], folder: Path, *, suffixed: bool = False) -> None:
        """Take in the files below a folder of masks; with ``suffixed``, only by the names that have a word for one."""
        for path in masks:
            self.all.append(path)
            folders = _folders(path.parent, folder)
            names = [] if suffixed else [(path.stem, "")]
            names += [named] if (named := mask_stem(path)) else []
            if path.stem.lower().startswith("mask_"):
                names.append((f"bus_{path.stem[5:]}", "mask"))
            for image, word in names:
                self._masks.setdefault(name_key(image), []).append(_Candidate(folders, image, word, path))

    def of(self, image: Path, folder: Path) -> Match:
        """The masks of an image, of those that were taken in."""
        stem = self.stem(image)
        folders = _folders(image.parent, folder)
        candidates = [
            mask
            for mask in self._masks.get(name_key(stem), ())
            # The mask of img1.png is not that of IMG1.png where both are there, nor that of x_seg1.png also x.png's.
            if (mask.image == stem or mask.image not in self._exact)
            and not (mask.word and mask.path.stem in self._exact)
            and not _SET_ASIDE.intersection(mask.folders)
        ]
        own = [mask for mask in candidates if mask.folders == folders]
        if own:
            return self._best(own, stem, guessed=False)
        near = [mask for mask in candidates if _one_ends_with_the_other(mask.folders, folders)]
        if len({mask.folders for mask in near}) > 1 or (near and len(self._images.get(name_key(stem), ())) > 1):
            return Match(rivals=tuple(dict.fromkeys(mask.path for mask in near)))
        return self._best(near, stem, guessed=any(mask.folders for mask in near))

    @property
    def unused(self) -> list[Path]:
        """The masks that no image has, once all images have been asked for."""
        return [path for path in self.all if path not in self.used]

    def belongs(self, mask: Path) -> bool:
        """Whether an image has the name that a mask's name says."""
        names = [mask.stem, *([named[0]] if (named := mask_stem(mask)) else [])]
        return any(name_key(name) in self._images for name in names)

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
        self.used.update(paths)
        return Match(paths, guessed=guessed)


def masks_beside(place: Place) -> tuple[MaskFiles, dict[Path, Match]]:
    """The images that lie directly in a folder, each with the masks beside it: ``X.png`` with ``X_mask.png``.

    A file that has a word for a mask after another image's name is that one's mask; without such an image it is an
    image itself, but for ``X_mask.png``, which is always a mask.
    """
    stems = {name_key(path.stem) for path in place.images}

    def is_mask(path: Path) -> bool:
        parts = mask_stem(path)
        return parts is not None and (parts[1] == "mask" or name_key(parts[0]) in stems)

    images = [path for path in place.images if not is_mask(path)]
    found = MaskFiles()
    found.add_images(images, place.path)
    found.add_masks([path for path in place.images if is_mask(path)], place.path, suffixed=True)
    return found, {image: found.of(image, place.path) for image in images}


def mask_of(masks: Sequence[Path], images: Sequence[Path]) -> dict[Path, Path]:
    """For each image that a mask is named like, by its whole name or the words after it, one such mask."""
    by_name: dict[str, list[Path]] = {}
    for image in images:
        by_name.setdefault(name_key(image.stem), []).append(image)
    found: dict[Path, Path] = {}
    for mask in masks:
        stem = name_key(mask.stem)
        ends = (len(stem), *(match.start() for match in reversed(list(_BREAK.finditer(stem)))))
        # The longest name that is there: case_1_2.png's is not case_1.png's.
        name = next((stem[:end] for end in ends if stem[:end] in by_name), None)
        found.update(dict.fromkeys(by_name.get(name or "", ()), mask))
    return found


def masks_below(tree: Tree, folder: Path) -> list[Path]:
    """All files with an image's ending below a folder of masks, in natural order of the folders."""
    return [path for place in tree.below(folder) for path in place.images]


@lru_cache(maxsize=1024)
def _folders(place: Path, folder: Path) -> tuple[str, ...]:
    """Keys of the folders between a folder and a place below it; many files share them."""
    return tuple(name_key(part) for part in place.relative_to(folder).parts)


def _one_ends_with_the_other(one: tuple[str, ...], other: tuple[str, ...]) -> bool:
    shared = min(len(one), len(other))
    return one[len(one) - shared :] == other[len(other) - shared :]
