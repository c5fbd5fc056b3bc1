"""Where healthy images come from: a folder of the user's, or the model's own prior."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask
from busigen.data.images import find_images, read_image
from busigen.data.letterbox import letterbox
from busigen.errors import InputError, IntegrityError
from busigen.registry import RESOLUTION
from busigen.runtime.progress import Progress

log = logging.getLogger("busigen.runtime")

SYNTHETIC = "synthetic"
"""The value of ``--healthy`` that asks for synthetic backgrounds."""

CACHED_IMAGES = 512


@dataclass(frozen=True)
class Healthy:
    """One healthy image on the working grid.

    Attributes:
        pixels: ``(256, 256)`` uint8.
        valid: pixels that are image rather than letterbox bars, ``(256, 256)`` bool.
        row: manifest fields: background, healthy_file, healthy_sha256, letterbox_scale, letterbox_left, letterbox_top.
    """

    pixels: NDArray[np.uint8]
    valid: Mask
    row: dict[str, Any]


def synthetic(pixels: NDArray[np.uint8]) -> Healthy:
    """A background that the prior painted; it fills the frame."""
    row = {
        "background": SYNTHETIC,
        "healthy_file": None,
        "healthy_sha256": None,
        "letterbox_scale": 1.0,
        "letterbox_left": 0,
        "letterbox_top": 0,
    }
    return Healthy(pixels, np.ones((RESOLUTION, RESOLUTION), dtype=bool), row)


class HealthyFolder:
    """A folder of healthy images, in the order of their content's hash, so that renaming them changes nothing.

    Files that cannot be read are named in a warning and left out; ``BUSI``'s mask files are not images.

    Raises:
        InputError: the folder is missing, or holds no readable image.
    """

    def __init__(self, folder: Path, progress: Progress | None = None) -> None:
        if not folder.is_dir():
            raise InputError(f"--healthy {folder} is no folder.", fix="Give a folder of images, or 'synthetic'.")
        self.folder = folder
        found: dict[str, Path] = {}
        problems = []
        paths = list(find_images(folder))
        progress = progress or Progress()
        progress.start("reading healthy images", len(paths))
        for path in paths:
            progress.advance(1)
            try:
                found.setdefault(read_image(path).sha256, path)
            except InputError as error:
                problems.append(error)
        if not found:
            first = f" For example: {problems[0].problem}" if problems else ""
            raise InputError(
                f"--healthy {folder} holds no readable image.{first}",
                fix="Give a folder with PNG, JPEG, BMP or TIFF images of healthy breasts, or 'synthetic'.",
            )
        for problem in problems:
            log.warning("left out: %s", problem)
        self.items = sorted(found.items())
        self._load = lru_cache(maxsize=CACHED_IMAGES)(self._read)

    def __len__(self) -> int:
        return len(self.items)

    def fingerprint(self) -> str:
        """One hash over the contents of all images."""
        return hashlib.sha256("\n".join(sha256 for sha256, _ in self.items).encode()).hexdigest()

    def pick(self, position: float) -> Healthy:
        """The image at a position in [0, 1) of the folder.

        Raises:
            IntegrityError: the file has changed since the run began.
        """
        return self._load(int(position * len(self.items)))

    def _read(self, number: int) -> Healthy:
        sha256, path = self.items[number]
        image = read_image(path)
        if image.sha256 != sha256:
            raise IntegrityError(
                f"{path} has changed since the run began.", fix="Restore it, or start a run of its own."
            )
        pixels, box = letterbox(image.pixels)
        row = {
            "background": "real",
            # File names need not be UTF-8, tables and JSON must be; the hash beside it is what identifies the image.
            "healthy_file": path.relative_to(self.folder).as_posix().encode("utf-8", "replace").decode(),
            "healthy_sha256": sha256,
            "letterbox_scale": box.scale,
            "letterbox_left": box.left,
            "letterbox_top": box.top,
        }
        return Healthy(pixels, box.valid, row)
