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
        self.register_buffer("axes", torch.eye(channels).repeat(cells, cells, 1, 1))

    def coefficients(self, sample: Tensor) -> Tensor:
        """Latents ``(B, C, s, s)`` by frequency, ``(B, K, s, s)``: along the ``K = C`` axes of each."""
        return turned(transformed(sample), self.axes)

    def sample(self, coefficients: Tensor) -> Tensor:
        """Its inverse."""
        found = turned(coefficients, self.axes.transpose(2, 3))
        basis = cosines(found.shape[-1]).to(found)
        return basis.T @ found @ basis

    @property
    def marginal(self) -> Tensor:
        """The deviation of each channel's cosine coefficients, ``(C, s, s)``."""
        squares = self.axes.square() @ self.spread.permute(1, 2, 0)[..., None].square()
        return squares[..., 0].permute(2, 0, 1).sqrt()

    @torch.no_grad()
    def fit(self, clean: Tensor) -> None:
        """Measure axes and spread on training latents ``(N, C, s, s)``; of fewer than two, there is none to measure."""
        if len(clean) < 2:
            return
        # Cases in which no latents differ at all leave the axes open, and any will do.
        total = torch.zeros_like(self.axes, dtype=torch.float64)
        mean = clean.double().mean(0).float()
        for part in clean.split(64):
            found = transformed(part.float().to(self.axes.device) - mean.to(self.axes.device)).permute(2, 3, 1, 0)
            total += (found @ found.transpose(2, 3)).double()
        variance, axes = torch.linalg.eigh(total / (len(clean) - 1))
        self.axes.copy_(axes.float())
        self.spread.copy_(variance.clamp(min=LEAST**2).sqrt().permute(2, 0, 1).float())


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
