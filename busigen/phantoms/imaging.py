"""B-mode of a phantom: shadows, attenuation, speckle and compression.

Scatterers of a tissue's power, convolved with a point spread function that widens with depth, give speckle, which is
attenuated, shadowed and compressed to grey levels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from busigen.phantoms.tissue import Canvas

KNEE = 0.1  # How gently the map of grey levels ends in black and in white, as a share of them.

Floats = NDArray[Any]


def b_mode(canvas: Canvas, decibels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Grey levels of tissue with that backscatter, ``float32 (height, width)``, of which 0 to 255 can be shown."""
    p = canvas.p
    depth = canvas.rows / canvas.height
    level = decibels - p["attenuation"] * depth ** p["bow"] - _shadows(canvas, depth)
    level += p["haze"] * canvas.field(0.4 * p["haze_size"], p["haze_size"], rough=True)
    # What is too dark is lost in noise.
    amplitude = np.sqrt(10.0 ** (level / 10.0) + 10.0 ** (p["floor"] / 10.0)).astype(np.float32)
    parts = [canvas.normals(canvas.height, canvas.width) * amplitude for _ in range(2)]
    near, far = (_envelope(parts, p["axial"], lateral) for lateral in (p["lateral"], p["lateral"] + p["spread"]))
    envelope = near * (1.0 - depth) + far * depth
    # Compounding averages speckle (shorter bright streaks and all the rest stay): towards the mean.
    mean = np.sqrt(2.0 * ndimage.gaussian_filter(amplitude**2, (p["axial"], p["lateral"])))
    compressed = 20.0 * np.log10((1.0 - p["compound"]) * envelope + p["compound"] * mean)
    # As a sonographer sets the gain: by what is near the skin.
    grey = p["level"] + (compressed - np.median(compressed[: canvas.height // 2])) / p["range"]
    ends = (np.logaddexp(0.0, (grey - end) / KNEE) for end in (0.0, 1.0))
    return np.asarray(255.0 * KNEE * np.subtract(*ends), np.float32)


def _shadows(canvas: Canvas, depth: Floats) -> Floats:
    """Decibels lost in shadows, whose edges grow softer with depth, and at sides without contact."""
    p, width = canvas.p, canvas.width
    across = canvas.curve(1.0, 20) / canvas.height
    dark = np.clip(across - across.mean() - 0.8 + p["shadows"], 0.0, 1.2)
    sharp, soft = (ndimage.gaussian_filter1d(dark, share * width, mode="nearest") for share in (0.015, 0.08))
    lost = p["shadow_drop"] * (sharp * (1.0 - depth) + soft * depth) * np.clip(4.0 * depth, 0.0, 1.0)
    for weight, apart in zip(canvas.normals(2), (canvas.columns, width - canvas.columns), strict=True):
        reach = p["contact_width"] * width * (0.3 + depth)
        lost += p["contact"] * np.clip(float(weight) - 0.4, 0.0, 2.0) * np.exp(-((apart / reach) ** 2))
    return np.asarray(lost)


def _envelope(parts: list[NDArray[np.float32]], axial: float, lateral: float) -> Floats:
    """The magnitude of real and imaginary scatterers after a point spread function of these pixels, of mean power 2."""
    real, imaginary = (ndimage.gaussian_filter(part, (axial, lateral)) for part in parts)
    return np.asarray(np.hypot(real, imaginary) * np.sqrt(4.0 * np.pi * axial * lateral))


def shown(grey: Floats) -> NDArray[np.uint8]:
    """Grey levels as an image shows them."""
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)
