"""Noise whose power in each channel and frequency band varies from image to image, as scanners and settings do.

A few solver steps on normal noise give all images about the same power in every band. Here each image's noise is
multiplied by factors of its own, a scale mixture of normals (Wainwright and Simoncelli 2000). Training fits how the
factors vary together; the runtime draws them.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.fft import dctn, idctn

log = logging.getLogger("busigen.training")

EDGES = (3.0, 8.0, 16.0, math.inf)  # Upper ends of bands, in half periods per image side; the mean is in none.
LIMIT = 2.5  # Deviations at which a style's normals are clipped.
LARGEST_FACTOR = 4.0  # Greatest magnitude of a number in a bundle's ``styles``.

Floats = NDArray[Any]


def bands(cells: int) -> NDArray[np.int64]:
    """The band of every coefficient of a cosine transform, ``(cells, cells)``; that of the mean is ``len(EDGES)``."""
    frequency = np.arange(cells, dtype=np.float64)
    radius = np.hypot(frequency[:, None], frequency[None, :])
    found = np.searchsorted(np.array(EDGES), radius, side="left")
    found[0, 0] = len(EDGES)
    return found


def powers(latents: Floats) -> Floats:
    """Half the logarithm of the power in every channel and band, ``(N, C, len(EDGES))``, of latents ``(N, C, s, s)``.

    Of the latents' cosine coefficients, the caller has removed mean and deviation.
    """
    band = bands(latents.shape[-1])
    squares: Floats = np.square(latents, dtype=np.float64)
    means = [squares[..., band == number].mean(axis=-1) for number in range(len(EDGES))]
    return np.asarray(0.5 * np.log(np.maximum(np.stack(means, axis=-1), 1e-6)))


def styled(noise: NDArray[np.float32], factor: Floats, generated: Floats) -> NDArray[np.float32]:
    """Standard normal noise ``(B, C, s, s)`` with a style.

    ``factor`` ``(C * len(EDGES), K)`` turns ``generated`` standard normals ``(B, K)`` into logarithms of factors.
    """
    count, channels, cells, _ = noise.shape
    logarithms = (np.clip(generated, -LIMIT, LIMIT) @ factor.T).reshape(count, channels, len(EDGES))
    scales = np.concatenate((np.exp(logarithms), np.ones((count, channels, 1))), axis=2)[:, :, bands(cells)]
    axes = (2, 3)
    return np.asarray(idctn(dctn(noise, axes=axes, norm="ortho") * scales, axes=axes, norm="ortho"), np.float32)


def bounded(numbers: Floats, largest: float, name: str) -> Floats:
    """Fitted numbers clipped to the ``largest`` magnitude that bundles hold, with a warning if any were beyond it."""
    sizes = np.abs(numbers)
    if beyond := int((sizes > largest).sum()):
        log.warning(
            "%s: %d of %d fitted numbers are clipped to %g, the largest was %.2f: what is drawn has far other detail "
            "than the training images, as after a short training",
            *(name, beyond, sizes.size, largest, sizes.max()),
        )
    return np.clip(numbers, -largest, largest)


def are_styles(found: Any, channels: int) -> bool:
    """Whether this is a ``factor`` as JSON holds it: rows of numbers, none larger than ``LARGEST_FACTOR``."""
    rows = channels * len(EDGES)
    if not isinstance(found, list) or len(found) != rows or not all(isinstance(row, list) for row in found):
        return False
    numbers = [value for row in found for value in row]
    plain = all(type(value) in (int, float) and abs(value) <= LARGEST_FACTOR for value in numbers)
    return plain and len({len(row) for row in found}) == 1 and len(found[0]) <= rows


def fitted(real: Floats, generated: Floats, least: float = 0.01) -> Floats:
    """The factor ``(C * len(EDGES), K)`` of what real images vary by and generated ones do not, strongest column first.

    ``real`` and ``generated`` are :func:`powers` of latents; components with less than ``least`` of the largest one's
    variance are left out.
    """
    missing = [np.cov(values.reshape(len(values), -1), rowvar=False) for values in (real, generated)]
    variance, vectors = np.linalg.eigh(missing[0] - missing[1])
    kept = np.flatnonzero(variance > least * max(variance[-1], 0.0))[::-1]
    return np.asarray(vectors[:, kept] * np.sqrt(variance[kept]))
