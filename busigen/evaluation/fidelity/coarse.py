"""Coarse structure: what layers and masses an image shows, seen so small that speckle is averaged away.

Images at `classifiers.COARSE` become the classifier's scattering features, of which the first axes are compared.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import linalg
from sklearn.metrics import pairwise

from busigen.evaluation.realness.classifiers import VIEWS, Pixels, scattering_features

Array = NDArray[np.float64]

AXES = 24  # Principal axes that are compared: most of what coarse images differ by, in fewer numbers than images
LEVEL, SPREAD = 110.0, 40.0  # Grey levels that every image gets as its mean and deviation without contrast


class Space:
    """The principal axes of some images' features, each of unit variance, and a kernel as wide as these lie apart.

    ``pixels``: ``uint8 (N, 48, 64)``, of `classifiers.shrunk`. What the axes were fitted on lies nearer to itself than
    to more of the same: two sets that are tested against one another have to be fitted together.
    """

    def __init__(self, pixels: Pixels) -> None:
        raw = _features(pixels)
        self._mean, self._deviation = raw.mean(axis=0), raw.std(axis=0) + 1e-6
        standard = (raw - self._mean) / self._deviation
        *_, axes = linalg.svd(standard, full_matrices=False)
        self._axes = axes[:AXES].T
        scale = (standard @ self._axes).std(axis=0)
        # Of fewer images than axes, the last axes are rounding.
        known = scale > 1e-6 * max(float(scale.max()), 1e-12)
        self._axes, self._scale = self._axes[:, known], scale[known]
        self.fitted: Array = standard @ self._axes / self._scale
        apart = pairwise.euclidean_distances(self.fitted, squared=True)
        self._width = float(np.median(apart[apart > 0])) if (apart > 0).any() else 1.0

    def of(self, pixels: Pixels) -> Array:
        """``(N, axes)``."""
        return np.asarray((_features(pixels) - self._mean) / self._deviation @ self._axes / self._scale)

    def kernel(self, rows: Array) -> Array:
        """``(N, N)``: a Gaussian of the median squared distance of the images that were fitted."""
        return np.asarray(np.exp(-pairwise.euclidean_distances(rows, squared=True) / self._width))


def without_contrast(pixels: Pixels) -> Pixels:
    """Images ``uint8 (N, H, W)`` with one mean and one deviation."""
    values = pixels.astype(np.float32)
    mean, deviation = (function(values, axis=(1, 2), keepdims=True) for function in (np.mean, np.std))
    return np.clip((values - mean) / (deviation + 1e-3) * SPREAD + LEVEL, 0, 255).astype(np.uint8)


def _features(pixels: Pixels) -> Array:
    return scattering_features(pixels, VIEWS["coarse"].cells).astype(np.float64)
