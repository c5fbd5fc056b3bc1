"""A two-layer scattering network: fixed filters, so that a classifier on it is trained anew in milliseconds."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

SCALES = 4
"""Octaves: filters span 7, 14, 28 and 56 pixels."""

ORIENTATIONS = 4

_SIZE = 7
_FREQUENCY = 0.75 * math.pi
_SIGMA = 1.3
"""Centre frequency in radians per pixel and width in pixels of the Morlet wavelets: the frequency of Bruna and Mallat
2013, and the width that seven pixels hold."""

_FLOOR = 1e-3
"""Below a tenth of a grey level, a response is rounding."""


def scattering_features(
    pixels: NDArray[np.uint8], cells: tuple[int, int], device: str = "cpu", batch: int = 32
) -> NDArray[np.float32]:
    """Logarithms of pooled wavelet moduli up to second order.

    As in Bruna and Mallat, "Invariant scattering convolution networks", TPAMI 2013, section 2, with an average-pooling
    pyramid in place of low-pass filters. Added are mean and standard deviation of grey levels and the *largest* modulus
    per cell and first-order path: averages alone do not see a few bright marks. Cells in mirrored columns are averaged,
    because left and right mean nothing in ultrasound.

    Args:
        pixels: ``uint8 (N, H, W)``.
        cells: Rows and columns of the pooling grid.
        device: Where to compute.
        batch: Images at a time.

    Returns:
        ``float32 (N, features)``.
    """
    bank = _wavelets().to(device)
    parts = []
    for start in range(0, len(pixels), batch):
        block = torch.from_numpy(pixels[start : start + batch].astype(np.float32) / 255.0).unsqueeze(1).to(device)
        with torch.inference_mode():
            parts.append(_features(block, bank, cells).cpu().numpy())
    return np.concatenate(parts)


def _wavelets() -> Tensor:
    """Real and imaginary parts of Morlet wavelets: ``(2 * ORIENTATIONS, 1, 7, 7)``, each of zero mean."""
    grid = torch.arange(_SIZE, dtype=torch.float64) - _SIZE // 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2 * _SIGMA**2))
    window /= window.sum()
    filters = []
    for k in range(ORIENTATIONS):
        angle = math.pi * k / ORIENTATIONS
        phase = _FREQUENCY * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (torch.cos(phase), torch.sin(phase)):
            filters.append(window * (wave - (window * wave).sum()))
    return torch.stack(filters).unsqueeze(1).float()


def _modulus(maps: Tensor, bank: Tensor) -> Tensor:
    """``(B, C, H, W)`` to ``(B, C * ORIENTATIONS, H, W)``."""
    batch, channels, height, width = maps.shape
    flat = F.pad(maps.reshape(batch * channels, 1, height, width), (_SIZE // 2,) * 4, mode="reflect")
    parts = F.conv2d(flat, bank).reshape(batch, channels * ORIENTATIONS, 2, height, width)
    return torch.linalg.vector_norm(parts, dim=2)


def _features(pixels: Tensor, bank: Tensor, cells: tuple[int, int]) -> Tensor:
    def pooled(maps: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(maps, cells)

    mean = pooled(pixels)
    moments = [mean, torch.log((pooled(pixels**2) - mean**2).clamp_min(0).sqrt() + _FLOOR)]
    paths: list[Tensor] = []
    deeper: list[Tensor] = []
    level = pixels
    for _ in range(SCALES):
        first = _modulus(level, bank)
        paths += [pooled(first), F.adaptive_max_pool2d(first, cells)]
        second = [_modulus(maps, bank) for maps in deeper]
        paths += [pooled(maps) for maps in second]
        deeper = [_half(maps) for maps in (*deeper, first)]
        level = _half(level)
    joint = torch.cat([*moments, *(torch.log(path + _FLOOR) for path in paths)], dim=1)
    joint = (joint + joint.flip(-1)) / 2
    return joint[..., : (cells[1] + 1) // 2].flatten(1)


def _half(maps: Tensor) -> Tensor:
    return F.avg_pool2d(maps, 2)
