"""How far two images, two masks or two arrays are apart."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.data.geometry import Mask

Image = NDArray[np.uint8]

MAX_PSNR = 99.0
"""Reported for images that are equal to the byte."""

_SSIM_SIGMA, _SSIM_K1, _SSIM_K2 = 1.5, 0.01, 0.03
"""Of Wang et al. 2004 (IEEE Trans. Image Process. 13(4)), section III.C."""


def psnr(image: Image, other: Image, region: Mask) -> float:
    """Peak signal-to-noise ratio in decibels over a region that is not empty."""
    error = float(((image.astype(np.float64) - other)[region] ** 2).mean())
    return min(MAX_PSNR, 10.0 * float(np.log10(255.0**2 / error))) if error else MAX_PSNR


def ssim(image: Image, other: Image, region: Mask) -> float:
    """Structural similarity, -1 to 1, averaged over a region that is not empty (Wang et al. 2004, Gaussian window)."""
    x, y = image.astype(np.float64), other.astype(np.float64)

    def mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(ndimage.gaussian_filter(values, _SSIM_SIGMA, truncate=3.5))

    small, smaller = (_SSIM_K1 * 255.0) ** 2, (_SSIM_K2 * 255.0) ** 2
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, both = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    luminance = (2.0 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small)
    structure = (2.0 * both + smaller) / (var_x + var_y + smaller)
    return float((luminance * structure)[region].mean())


def grey_difference(image: Image, other: Image) -> int:
    """Largest difference of two images in grey levels."""
    return int(np.abs(image.astype(np.int64) - other).max())


def dice(mask: Mask, other: Mask) -> float:
    """Overlap of two masks, 0 to 1; two empty ones are equal."""
    total = int(mask.sum() + other.sum())
    return 2.0 * float((mask & other).sum()) / total if total else 1.0


def boundary_distance(mask: Mask, other: Mask) -> float:
    """95th percentile of the distances in pixels from each mask's outline to the other's; infinite if one is empty."""
    edges = [found & ~ndimage.binary_erosion(found) for found in (mask, other)]
    if not (edges[0].any() and edges[1].any()):
        return 0.0 if edges[0].any() == edges[1].any() else float("inf")
    there, back = (
        ndimage.distance_transform_edt(~edges[1])[edges[0]],
        ndimage.distance_transform_edt(~edges[0])[edges[1]],
    )
    return float(np.percentile(np.concatenate((there, back)), 95))


def relative_error(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square of the differences over that of what was expected, of the worst row; infinite if any is NaN."""
    if not np.isfinite(found).all():
        return float("inf")
    rows = (len(expected), -1)
    error = ((found.astype(np.float64) - expected) ** 2).reshape(rows).mean(axis=1)
    size = (expected.astype(np.float64) ** 2).reshape(rows).mean(axis=1)
    return float(np.sqrt(error / np.maximum(size, 1e-12)).max())


def pixels_off(found: NDArray[Any], expected: NDArray[Any]) -> float:
    """Root mean square error in pixels of signed distances within five pixels of the outline, of the worst row."""
    if not np.isfinite(found).all():
        return float("inf")
    near = np.abs(expected) < 5.0
    errors = [float(((f - e)[n] ** 2).mean()) for f, e, n in zip(found, expected, near, strict=True) if n.any()]
    return float(np.sqrt(max(errors, default=0.0)))
