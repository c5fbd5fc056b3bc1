"""Proof that a sample is its healthy image, bit for bit, outside the region that was painted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from busigen.data.files import find_images
from busigen.data.geometry import edit_region
from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.errors import BusigenError, InputError
from busigen.runtime.atomic import sha256_of


@lru_cache(maxsize=64)
def _frame(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    pixels, box = letterbox(read_image(path).pixels)
    return pixels, box.valid


@dataclass(frozen=True)
class Backgrounds:
    """Healthy images by the sha256 of their files."""

    folder: Path
    paths: dict[str, Path]

    @classmethod
    def below(cls, folder: Path) -> Backgrounds:
        """Hash every image below a folder.

        Raises:
            InputError: the folder does not exist or an image cannot be read.
        """
        try:
            return cls(folder=folder, paths={sha256_of(path): path for path in find_images(folder)})
        except OSError as error:
            raise InputError(
                f"{error.filename} cannot be read: {error.strerror}.", fix="Check its permissions."
            ) from error

    def difference(self, sha256: str, image: NDArray[np.uint8], mask: NDArray[np.bool_]) -> BusigenError | None:
        """Compare a sample with its healthy image outside the edit region, which follows from the mask alone.

        Args:
            sha256: of the healthy image's file, which must be among ``paths``.
            image: (256, 256) uint8.
            mask: (256, 256) bool.

        Returns:
            None where every such pixel is equal, else what is wrong.
        """
        path = self.paths[sha256]
        try:
            healthy, valid = _frame(path)
        except BusigenError as error:
            return error
        changed = int(((image != healthy) & ~edit_region(mask, valid)).sum())
        if changed == 0:
            return None
        return InputError(
            f"{changed} pixels outside its edit region differ from its healthy image {path.name}.",
            fix="Use the busigen version that made the dataset; if they still differ, the dataset was altered.",
        )
