"""Statistics of texture, and what tells drawn ones from real ones: an opponent in closed form."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OCTAVES, ORIENTATIONS = 4, 6
"""Sizes of detail, each twice the one before, and directions."""

SIDE, WAVELENGTH, WIDTH = 9, 3.4, 1.9
"""Side, wavelength and width (sigma) in pixels of the filters."""

FLOOR = 2e-3
"""Added before a logarithm: what rounding to grey levels leaves, in units of [-1, 1]."""

LEAST_SHARE = 0.04
"""Share of a crop that a zone must cover for its statistics to be believed."""

MEMORY = 0.99
"""Momentum of the running moments: they are those of the last hundred batches or so."""

ENOUGH = 0.5
"""Share of the memory that must be filled before the discriminant speaks: a covariance of few items is no guide."""

RIDGE = 0.05
"""Added to the covariance, as a share of every feature's variance: what differs by less than this is noise."""


class Texture(nn.Module):
    """Logarithms of mean and fourth-power mean wavelet moduli, of one and of two layers, within zones of an image.

    Wavelet moduli of two layers tell textures apart that have one spectrum (Bruna and Mallat 2013, 2; Portilla and
    Simoncelli 2000 match such statistics to synthesise texture). Fourth powers see a few bright grains.
    """

    bank: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("bank", _gabor(), persistent=False)

    @property
    def features(self) -> int:
        """Numbers per zone."""
        deeper = ORIENTATIONS**2 * OCTAVES * (OCTAVES - 1) // 2
        return 2 * ORIENTATIONS * OCTAVES + deeper

    def forward(self, image: Tensor, zones: Tensor) -> Tensor:
        """Measure.

        Args:
            image: ``(B, 1, H, W)`` in [-1, 1]; sides divisible by 8.
            zones: ``(B, Z, H, W)`` in [0, 1]: where to look.

        Returns:
            ``(B, Z, features)``.
        """
        # Logarithms of small moduli need more digits than half precision has.
        with torch.autocast(image.device.type, enabled=False):
            return self._measured(image.float(), zones.float())

    def _measured(self, image: Tensor, zones: Tensor) -> Tensor:
        found: list[Tensor] = []
        deeper: list[Tensor] = []
        for octave in range(OCTAVES):
            if octave:
                image, zones = F.avg_pool2d(image, 2), F.avg_pool2d(zones, 2)
                deeper = [F.avg_pool2d(maps, 2) for maps in deeper]
            first = self._moduli(image)
            found.append(_pooled(first, zones))
            found.append(0.25 * _pooled(first.pow(4), zones, FLOOR**4))
            found += [_pooled(self._moduli(maps), zones) for maps in deeper]
            deeper.append(first)
        return torch.cat(found, dim=2)

    def _moduli(self, maps: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C * ORIENTATIONS, H, W)``."""
        batch, channels, height, width = maps.shape
        flat = F.pad(maps.reshape(batch * channels, 1, height, width), (SIDE // 2,) * 4, mode="reflect")
        parts = F.conv2d(flat, self.bank).view(batch, channels * ORIENTATIONS, 2, height, width)
        # The square root has no gradient at zero, which flat parts of an image are.
        return (parts.square().sum(dim=2) + 1e-8).sqrt()


def _gabor() -> Tensor:
    """Real and imaginary parts of the filters, ``(2 * ORIENTATIONS, 1, SIDE, SIDE)``, each of zero mean."""
    grid = torch.arange(SIDE, dtype=torch.float64) - SIDE // 2
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    window = torch.exp(-(x**2 + y**2) / (2.0 * WIDTH**2))
    window /= window.sum()
    filters = []
    for number in range(ORIENTATIONS):
        angle = math.pi * number / ORIENTATIONS
        phase = 2.0 * math.pi / WAVELENGTH * (x * math.cos(angle) + y * math.sin(angle))
        for wave in (torch.cos(phase), torch.sin(phase)):
            filters.append(window * (wave - (window * wave).sum()))
    return torch.stack(filters).unsqueeze(1).float()


def _pooled(maps: Tensor, zones: Tensor, floor: float = FLOOR) -> Tensor:
    """Logarithm of the maps' means in each zone: ``(B, C, H, W)`` and ``(B, Z, H, W)`` to ``(B, Z, C)``."""
    sums = torch.einsum("bchw,bzhw->bzc", maps, zones)
    return torch.log(sums / zones.sum(dim=(2, 3)).clamp(min=1e-3)[:, :, None] + floor)


class Discriminant(nn.Module):
    """Fisher's linear discriminant between drawn and real statistics, as a loss for whoever draws.

    Half the squared Mahalanobis distance of the two means has the discriminant as its gradient, so that the opponent
    needs no training of its own: running means and the real ones' covariance give it in closed form (mean feature
    matching, Mroueh et al. 2017, McGan).

    Args:
        features: numbers per item.
    """

    shift: Tensor
    mean: Tensor
    covariance: Tensor
    seen: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("shift", torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("covariance", torch.zeros(features, features))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, drawn: Tensor, real: Tensor) -> Tensor:
        """What is lost by ``drawn`` against ``real``, ``(B, features)`` each; nothing at first, or by no item."""
        if not len(drawn):
            return drawn.sum()
        with torch.autocast(drawn.device.type, enabled=False):
            if self.training:
                self._remember(drawn.detach(), real)
            if self.seen < ENOUGH:
                return drawn.sum() * 0.0
            return ((drawn - real) @ self._direction()).mean()

    @property
    def distance(self) -> float:
        """Half the squared Mahalanobis distance of the running means."""
        return 0.5 * float(self._direction() @ self.shift) / max(float(self.seen), 1e-9)

    def _direction(self) -> Tensor:
        share = self.seen.clamp(min=1e-9)
        covariance = self.covariance / share
        ridge = RIDGE * covariance.diagonal() + 1e-6
        return torch.linalg.solve(covariance + ridge.diag(), self.shift / share)

    @torch.no_grad()
    def _remember(self, drawn: Tensor, real: Tensor) -> None:
        self.seen.lerp_(torch.ones_like(self.seen), 1.0 - MEMORY)
        self.shift.lerp_((drawn - real).mean(dim=0), 1.0 - MEMORY)
        self.mean.lerp_(real.mean(dim=0), 1.0 - MEMORY)
        centred = real - self.mean / self.seen
        self.covariance.lerp_(centred.T @ centred / len(real), 1.0 - MEMORY)


def believed(zones: Tensor) -> Tensor:
    """Which zones ``(B, Z, H, W)`` are large enough to measure, ``(B, Z)`` bool."""
    return zones.mean(dim=(2, 3)) >= LEAST_SHARE
