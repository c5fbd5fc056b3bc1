"""Which mask files belong to an image, in any of the layouts that busigen reads."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from busigen.data.busbra import mask_name
from busigen.data.images import MASK_FOLDERS, SUFFIXES, masks_by_stem, natural_key

_LESION_SUFFIX = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
_IMAGE_FOLDER = "images"


def masks_by_name(folder: Path) -> dict[str, list[Path]]:
    """The mask files below a mask folder by their image's name without its ending, with and without the class folder.

    ``masks/benign/X_mask_1.png`` is a mask of ``benign/X`` and of ``X``.
    """
    found: dict[str, list[Path]] = {}
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix.lower() in SUFFIXES)
    for path in sorted(files, key=lambda path: natural_key(path.as_posix())):
        if path.name.startswith(".") or not path.resolve().is_relative_to(folder.resolve()):
            continue
        stem = _LESION_SUFFIX.sub("", path.stem)
        for name in {path.relative_to(folder).with_name(stem).as_posix(), stem}:
            found.setdefault(name, []).append(path)
    return found


class MaskFiles:
    """The masks of the images below a folder: ``X_mask.png`` beside ``X.png``, or in a folder of masks near it.

    A folder of masks is one named as in :data:`busigen.data.images.MASK_FOLDERS`: beside the image, beside any folder
    between it and ``folder``, or beside ``images`` where ``folder`` is that or lies in it. In it, the mask is named as
    in the plain layout (``X.png``, ``X_mask.png``) or as in BUS-BRA (``mask_1.png`` of ``bus_1.png``). What was found
    is remembered, so use a new object after the files have changed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._root = folder.resolve()
        self._beside = lru_cache(maxsize=None)(masks_by_stem)
        self._of_folder = lru_cache(maxsize=None)(_all_masks)

    def of(self, image: Path) -> list[Path]:
        """The masks of an image, whose path begins with ``folder``; empty where it has none."""
        found = list(self._beside(image.parent).get(image.stem.lower(), ()))
        image = self._root / image.relative_to(self.folder)
        for place in self._places(image.parent):
            parts = image.with_suffix("").relative_to(place).parts
            inner = Path(*(parts[1:] if parts[0].lower() == _IMAGE_FOLDER else parts))
            names = (inner, Path(inner.name), inner.with_name(mask_name(inner.name)), Path(mask_name(inner.name)))
            masks = self._of_folder(place)
            found.extend(next((masks[name.as_posix()] for name in names if name.as_posix() in masks), ()))
        return found

    def _places(self, parent: Path) -> Iterator[Path]:
        """Where a folder of masks may lie."""
        while parent != self._root:
            yield parent
            parent = parent.parent
        yield parent
        for above in (parent, *parent.parents):
            if above.name.lower() == _IMAGE_FOLDER:
                yield above.parent
                return


def _all_masks(place: Path) -> dict[str, list[Path]]:
    """:func:`masks_by_name` of the folders of masks that lie in a folder."""
    try:
        folders = [path for path in sorted(place.iterdir()) if path.name.lower() in MASK_FOLDERS and path.is_dir()]
    except PermissionError:  # Of a folder above the one that was given: there is nothing that busigen may look at.
        return {}
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for name, masks in masks_by_name(folder).items():
            found.setdefault(name, []).extend(masks)
    return found
