"""How much samples differ in each coefficient, and the solver step that makes use of it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from busigen.solver import gaussian_constants

LEAST = 0.05
"""Smallest deviation that is believed: a frequency in which no training image differs from the others would freeze."""


class Spread(nn.Module):
    """Solver steps whose spread is each coefficient's own instead of one number.

    Stage 1's codes are standardised over all lesions, and those of one class are not: malignant outlines vary half as
    much again in their fine components as benign ones do. With one spread for all, eight steps made malignant outlines
    too smooth.

    Args:
        shape: of one sample.
    """

    spread: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(shape))

    @torch.no_grad()
    def assume(self, spread: float) -> None:
        """Take one deviation for everything, until :meth:`fit` measures it."""
        self.spread.fill_(spread)

    def coefficients(self, sample: Tensor) -> Tensor:
        """What of a sample varies independently of the rest, as far as is known; linear."""
        return sample

    def sample(self, coefficients: Tensor) -> Tensor:
        """The way back from :meth:`coefficients`."""
        return coefficients

    @torch.no_grad()
    def fit(self, clean: Tensor) -> None:
        """Measure the spread on training samples ``(N, ...)``; of fewer than two, there is none to measure."""
        if len(clean) < 2:
            return
        # In parts: the training split's coefficients all at once would be as large as the split itself.
        total = torch.zeros_like(self.spread, dtype=torch.float64)
        mean = clean.double().mean(0).float()
        for part in clean.split(64):
            total += self.coefficients(part.float() - mean).double().square().sum(0)
        self.spread.copy_((total / (len(clean) - 1)).sqrt().clamp(min=LEAST).float())

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor, *_: Tensor) -> Tensor:
        """Go from time ``t`` to ``s``.

        Args:
            x: noisy samples ``(B, ...)``.
            velocity: the network's answer to them, of the same shape.
            t: time of ``x``, ``(1,)`` in (0, 1].
            s: time to go to, ``(1,)`` in [0, t).
        """
        a, b = gaussian_constants(t, s, self.spread)
        return self.sample(a * self.coefficients(x) + b * self.coefficients(velocity))


class Spectrum(Spread):
    """Solver steps whose spread is that of each spatial frequency, along axes of its own among the channels.

    Latents are standardised cell by cell, but neighbouring cells vary together: the mean of a whole image's latents
    varies up to eighteen times as much as independent cells would let it, their finest detail less than half as much.
    With one spread for all, ten steps lost a third of what images differ by in brightness and overdid the detail. In
    the basis of the discrete cosine transform the coefficients of natural images are nearly uncorrelated (Ahmed et al.
    1974), so each can have a step of its own (:func:`busigen.solver.gaussian_constants`). The channels of one frequency
    are not: an image's brightness shows in several of them at once. They are turned to the axes on which they are.

    Args:
        channels: of the latents.
        cells: their rows and columns.
    """

    axes: Tensor

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__(channels, cells, cells)
        # Alike for all directions of one frequency: a matrix for each pair of row and column would be half of what the
        # prior's largest layer takes in a bundle.
        self.register_buffer("axes", torch.eye(channels).repeat(int(_radius(cells).max()) + 1, 1, 1))

    def coefficients(self, sample: Tensor) -> Tensor:
        """Latents ``(B, C, s, s)`` by frequency, ``(B, K, s, s)``: along the ``K = C`` axes of each."""
        return turned(transformed(sample), self._axes())

    def sample(self, coefficients: Tensor) -> Tensor:
        """Its inverse."""
        found = turned(coefficients, self._axes().transpose(2, 3))
        basis = cosines(found.shape[-1]).to(found)
        return basis.T @ found @ basis

    @property
    def marginal(self) -> Tensor:
        """The deviation of each channel's cosine coefficients, ``(C, s, s)``."""
        squares = self._axes().square() @ self.spread.permute(1, 2, 0)[..., None].square()
        return squares[..., 0].permute(2, 0, 1).sqrt()

    @torch.no_grad()
    def fit(self, clean: Tensor) -> None:
        """Measure axes and spread on training latents ``(N, C, s, s)``; of fewer than two, there is none to measure."""
        if len(clean) < 2:
            return
        total = torch.zeros_like(self._axes(), dtype=torch.float64)
        mean = clean.double().mean(0).float().to(total.device)
        for part in clean.split(64):
            found = transformed(part.float().to(total.device) - mean).permute(2, 3, 1, 0)
            total += (found @ found.transpose(2, 3)).double()
        total /= len(clean) - 1
        radius = _radius(total.shape[0]).flatten().to(total.device)
        pooled = total.new_zeros(self.axes.shape).index_add_(0, radius, total.flatten(0, 1))
        self.axes.copy_(torch.linalg.eigh(pooled)[1].float())
        axes = self._axes().double()
        variance = torch.einsum("uvck,uvcd,uvdk->kuv", axes, total, axes)
        self.spread.copy_(variance.clamp(min=LEAST**2).sqrt().float())

    def _axes(self) -> Tensor:
        """The axes of every frequency, ``(s, s, C, K)``."""
        cells = self.spread.shape[-1]
        radius = _radius(cells).flatten().to(self.axes.device)
        return self.axes.index_select(0, radius).view(cells, cells, *self.axes.shape[1:])


def _radius(cells: int) -> Tensor:
    """Each coefficient's frequency whatever its direction, in half periods per side, to the next whole number."""
    frequency = torch.arange(cells, dtype=torch.float64)
    return (frequency[:, None] ** 2 + frequency[None] ** 2).sqrt().round().long()


def transformed(sample: Tensor) -> Tensor:
    """The cosine transform of latents ``(B, C, s, s)``."""
    basis = cosines(sample.shape[-1]).to(sample)
    return basis @ sample @ basis.T


def turned(coefficients: Tensor, axes: Tensor) -> Tensor:
    """Coefficients ``(B, C, s, s)`` along the axes ``(s, s, C, K)`` of each frequency, ``(B, K, s, s)``."""
    return (coefficients.permute(2, 3, 0, 1) @ axes).permute(2, 3, 0, 1)


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of ``size`` samples as a matrix ``(frequency, sample)``."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    basis = torch.cos(torch.arange(size, dtype=torch.float64)[:, None] * places[None]) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()
