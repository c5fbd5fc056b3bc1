"""Frechet radiomic distance as published (Konz, Osuala et al. 2026, arXiv 2412.01496), on its authors' features.

The authors' package, ``frd-score``, reads pyradiomics' features of an image as it is, of Laplacians of Gaussians and of
wavelets; features are standardised by the real set, and the distance is the logarithm of the squared Frechet distance.
"""

from __future__ import annotations

import logging
import os
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busigen.data.geometry import around
from busigen.evaluation.context import AuditContext, ImageSet

Array = NDArray[np.float64]

_WORKERS = min(8, os.cpu_count() or 1)
ERRORS = (ImportError, ArithmeticError, LookupError, RuntimeError, ValueError)  # What measuring fails with
PACKAGES = ("frd_score", "radiomics")
ABSENT = (
    "FRD (Konz et al., arXiv 2412.01496) was not computed: it needs its authors' package, the extra frd, and "
    "pyradiomics; docs/audit.md says how to install them."
)


def is_there() -> bool:
    """Whether the features can be measured here."""
    return all(find_spec(name) is not None for name in PACKAGES)


def features(context: AuditContext, images: ImageSet) -> Array:
    """``(N, D)``: the package's features of its version 1, of images without their letterbox bars and as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for row, (image, valid) in enumerate(zip(images.images, images.valid, strict=True)):
            files.append(Path(folder) / f"{row}.png")
            Image.fromarray(np.ascontiguousarray(image[around(valid, 0)])).save(files[-1])
        # Half a second an image.
        with ProcessPoolExecutor(_WORKERS, get_context("spawn")) as pool:
            found = pool.map(_measured, files)
            return np.array(list(context.track(f"FRD's features of {images.name}", found, len(files))))


def standardised(real: Array, synthetic: Array) -> tuple[Array, Array]:
    """Both standardised by the real set, without the features that have no finite value in all rows of both.

    In single precision as far as the package does so.
    """
    sides = [side.astype(np.float32) for side in (real, synthetic)]
    with np.errstate(divide="ignore", invalid="ignore"):
        scaled = [(side - sides[0].mean(axis=0)) / sides[0].std(axis=0) for side in sides]
    known = np.isfinite(np.concatenate(scaled)).all(axis=0)
    first, second = (side[:, known].astype(np.float64) for side in scaled)
    return first, second


@cache
def _package() -> tuple[Any, Any]:
    """The package and its extractor, once a process, and silent."""
    package: Any = import_module("frd_score.frd")
    extractor = package.get_feature_extractor(package.FRD_VERSION_V1, image_dim=2)
    package.setVerbosity(60)
    logging.getLogger("radiomics").setLevel(logging.ERROR)
    return package, extractor


def _measured(file: Path) -> list[float]:
    package, extractor = _package()
    values, *_ = package.process_image_mask_pair((file, None), feature_extractor=extractor)
    return [float(value) for value in values]
