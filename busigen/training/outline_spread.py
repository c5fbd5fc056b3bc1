"""Stage 1's solver steps, the last of which makes drawn outlines differ as real ones do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import minimize
from torch import Tensor

from busigen.data.geometry import Mask, around
from busigen.data.outline import circularity, solidity
from busigen.registry import ATTRIBUTES
from busigen.training.spectrum import Spread

COUNT = len(ATTRIBUTES)

LEVELS = (0.02, *(k / 16 for k in range(1, 16)), 0.98)
"""Quantiles at which an attribute's drawn and real distributions are matched."""

EDGES = (4, 36)
"""Components of the form at which its two bands begin: lobes, and what is finer. Before them lie broad shapes."""

LEAST_AMPLITUDE = 1e-3
"""Below it, a band holds nothing to amplify."""

FEWEST = 64
"""Lesions, real and drawn, from which a distribution is believed."""

EVALUATIONS = 100
"""Sets of drawn outlines that the search for the bands' gains looks at, each a second or so."""

FINE = 2.0
"""Deviation in pixels of the filter that takes the finest of an outline away."""

RELUCTANCE = 0.03
"""What a gain costs, against distances in deviations: of gains that do as well, the smallest are taken."""

Floats = NDArray[np.float64]


class OutlineSpread(Spread):
    """A spread for each number of a code, and after the last step the class's own distributions.

    A network that has seen a few hundred lesions draws their places and sizes about right, and its outlines are too
    regular: a code leaves out the finest of a contour, and lesions differ in how ragged they are more than its draws
    do. So attributes are carried over quantile by quantile, and the deviation of each of two bands of the form by a
    power law, ``a' = exp(gain) a^(1 + power)``. What a user asks for replaces its attribute afterwards.

    Args:
        length: numbers in a code.
    """

    drawn: Tensor
    wanted: Tensor
    gains: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.bands = [(COUNT + a, b) for a, b in zip(EDGES, (COUNT + EDGES[1], length), strict=True) if COUNT + a < b]
        self.register_buffer("drawn", torch.zeros(COUNT, len(LEVELS)))
        self.register_buffer("wanted", torch.zeros(COUNT, len(LEVELS)))
        self.register_buffer("gains", torch.zeros(len(EDGES), 2))
        self.forget()

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor, *_: Tensor) -> Tensor:
        """Go from time ``t`` to ``s``; see :meth:`Spread.forward`."""
        moved = super().forward(x, velocity, t, s)
        return torch.where(s <= 0.0, self.calibrated(moved), moved)

    def calibrated(self, code: Tensor) -> Tensor:
        """Codes ``(B, length)`` as they are drawn, distributed as real ones."""
        values = code[:, :COUNT, None]
        widths = self.drawn.diff(dim=1)
        slopes = self.wanted.diff(dim=1) / widths
        within = torch.minimum((values - self.drawn[:, :-1]).clamp(min=0.0), widths)
        # Beyond the outermost quantiles, distances are kept.
        beyond = values[..., 0] - values[..., 0].clamp(self.drawn[:, 0], self.drawn[:, -1])
        parts = [self.wanted[:, 0] + (within * slopes).sum(dim=2) + beyond]
        start = COUNT
        for (first, last), (gain, power) in zip(self.bands, self.gains.unbind(), strict=False):
            band = code[:, first:last]
            amplitude = band.square().mean(dim=1, keepdim=True).sqrt().clamp(min=LEAST_AMPLITUDE)
            parts += [code[:, start:first], band * torch.exp(gain + power * amplitude.log())]
            start = last
        return torch.cat((*parts, code[:, start:]), dim=1)

    @torch.no_grad()
    def forget(self) -> None:
        """Take draws as they are, until they are measured."""
        identity = torch.linspace(-2.0, 2.0, len(LEVELS)).expand(COUNT, -1)
        self.drawn.copy_(identity)
        self.wanted.copy_(identity)
        self.gains.zero_()

    @torch.no_grad()
    def fit_attributes(self, drawn: Tensor, real: Tensor) -> None:
        """Match the attributes' quantiles.

        Args:
            drawn: codes ``(N, length)`` as the solver draws them without this.
            real: codes of the class's lesions.
        """
        if min(len(drawn), len(real)) < FEWEST:
            return
        levels = torch.tensor(LEVELS, dtype=torch.float32)
        for table, codes in ((self.drawn, drawn), (self.wanted, real)):
            quantiles = torch.quantile(codes[:, :COUNT].float().cpu(), levels, dim=0).T
            # No two alike: between them, a line must have a slope.
            steps = quantiles.diff(dim=1).clamp(min=1e-3).cumsum(dim=1)
            table.copy_(torch.cat((quantiles[:, :1], quantiles[:, :1] + steps), dim=1))

    @torch.no_grad()
    def fit_form(self, codes: Tensor, outlined: Callable[[Tensor], Sequence[Mask]], real: Sequence[Mask]) -> None:
        """Find the bands' gains with which outlines are as irregular, and as variously so, as real ones.

        Args:
            codes: as the solver draws them without this.
            outlined: draws the outlines of codes that are calibrated; those that are no lesion are left out.
            real: lesions of the class.
        """
        if min(len(codes), len(real)) < FEWEST or not self.bands:
            return
        target = _irregularity(real)
        scale = target.std(axis=0)

        def missed(gains: Floats) -> float:
            self.gains.view(-1)[: gains.size] = torch.from_numpy(gains).to(self.gains)
            found = _irregularity(outlined(self.calibrated(codes)))
            if len(found) < FEWEST // 2:
                return float("inf")
            distance = (np.abs(_quantiles(found) - _quantiles(target)).mean(axis=0) / scale).sum()
            return float(distance + RELUCTANCE * np.abs(gains).sum())

        start = np.zeros(2 * len(self.bands))
        simplex = np.vstack([start, start + 0.4 * np.eye(start.size)])
        options = {"maxfev": EVALUATIONS, "initial_simplex": simplex, "xatol": 0.02, "fatol": 0.005}
        best = minimize(missed, start, method="Nelder-Mead", options=options)
        missed(best.x)


def _irregularity(masks: Sequence[Mask]) -> Floats:
    """Circularity and solidity of lesions, and their circularity without what is finer than ``FINE``: ``(N, 3)``."""
    found = [(circularity(mask), solidity(mask), circularity(_smoothed(mask))) for mask in masks]
    return np.array(found, dtype=np.float64).reshape(-1, 3)


def _smoothed(mask: Mask) -> Mask:
    """A lesion without the finest of its outline; it stays one that has pixels."""
    part = np.pad(mask[around(mask, 0)], 4 * round(FINE))
    smooth: Mask = ndimage.gaussian_filter(part.astype(np.float32), FINE) >= 0.5
    return smooth if smooth.any() else mask


def _quantiles(values: Floats) -> Floats:
    return np.asarray(np.quantile(values, np.linspace(0.02, 0.98, 49), axis=0))
