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

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor) -> Tensor:
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
    """Solver steps whose spread is that of each channel and spatial frequency.

    Latents are standardised cell by cell, but neighbouring cells vary together: the mean of a whole image's latents
    varies up to eighteen times as much as independent cells would let it, their finest detail less than half as much.
    With one spread for all, ten steps lost a third of what images differ by in brightness and overdid the detail. In
    the basis of the discrete cosine transform the coefficients of natural images are nearly uncorrelated (Ahmed et al.
    1974), so each can have a step of its own (:func:`busigen.solver.gaussian_constants`).

    Args:
        channels: of the latents.
        cells: their rows and columns.
    """

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__(channels, cells, cells)

    def coefficients(self, sample: Tensor) -> Tensor:
        """The cosine transform of latents ``(B, C, s, s)``."""
        basis = cosines(sample.shape[-1]).to(sample)
        return basis @ sample @ basis.T

    def sample(self, coefficients: Tensor) -> Tensor:
        """Its inverse."""
        basis = cosines(coefficients.shape[-1]).to(coefficients)
        return basis.T @ coefficients @ basis


def cosines(size: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) of ``size`` samples as a matrix ``(frequency, sample)``."""
    places = (torch.arange(size, dtype=torch.float64) + 0.5) * math.pi / size
    basis = torch.cos(torch.arange(size, dtype=torch.float64)[:, None] * places[None]) * math.sqrt(2.0 / size)
    basis[0] /= math.sqrt(2.0)
    return basis.float()
