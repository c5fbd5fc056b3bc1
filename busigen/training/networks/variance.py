"""The spread of the training data in each coefficient, and the solver step that uses it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from busigen.noise_styles import LIMIT
from busigen.solver import gaussian_constants

LEAST = 0.05  # Smallest deviation: without it, a frequency in which all training images are equal would freeze.


class Spread(nn.Module):
    """Solver steps with a spread for each coefficient of samples of a ``shape``, in place of one number.

    Malignant outlines vary half as much again in their fine components as benign ones, and would be too smooth.
    """

    spread: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("spread", torch.ones(shape))

    @torch.no_grad()
    def assume(self, spread: float) -> None:
        """Set one deviation for everything, until :meth:`fit` measures it."""
        self.spread.fill_(spread)

    def coefficients(self, sample: Tensor) -> Tensor:
        """A linear transform of samples whose components are nearly independent."""
        return sample

    def sample(self, coefficients: Tensor) -> Tensor:
        """The inverse of :meth:`coefficients`."""
        return coefficients

    @torch.no_grad()
    def fit(self, clean: Tensor) -> None:
        """Measure the spread of at least two training samples ``(N, ...)``."""
        if len(clean) < 2:
            return
        # In parts, because all coefficients at once would take as much memory as the training split.
        total = torch.zeros_like(self.spread, dtype=torch.float64)
        mean = clean.double().mean(0).float()
        for part in clean.split(64):
            total += (part.float() - mean).double().square().sum(0)
        self.spread.copy_((total / (len(clean) - 1)).sqrt().clamp(min=LEAST).float())

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor, *_: Tensor) -> Tensor:
        """Noisy samples ``x`` ``(B, ...)`` and their velocity, taken from time ``t``, ``(1,)``, to ``s`` below it."""
        a, b = gaussian_constants(t, s, self.spread)
        return self.sample(a * self.coefficients(x) + b * self.coefficients(velocity))


class Spectrum(Spread):
    """Solver steps with the spread of each spatial frequency of latents, ``channels`` of ``cells`` a side.

    With one spread, ten steps lost a third of the differences in brightness and overdid the detail. Coefficients of the
    cosine transform are nearly uncorrelated (Ahmed et al. 1974), so each has a step of its own
    (:func:`busigen.solver.gaussian_constants`), along the principal axes of a frequency's channels.
    """

    axes: Tensor

    def __init__(self, channels: int, cells: int) -> None:
        super().__init__(channels, cells, cells)
        # The same for all directions of a frequency, or they would take half as much as the prior's largest layer.
        self.register_buffer("axes", torch.eye(channels).repeat(int(_radius(cells).max()) + 1, 1, 1))

    def coefficients(self, sample: Tensor) -> Tensor:
        """Latents ``(B, C, s, s)`` by frequency, along the ``K = C`` axes of each, ``(B, K, s, s)``."""
        return turned(transformed(sample), self._axes())

    def sample(self, coefficients: Tensor) -> Tensor:
        """The inverse of :meth:`coefficients`."""
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
        """Measure axes and spread of at least two training latents ``(N, C, s, s)``."""
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
    """Each coefficient's frequency in any direction, in half periods per side, rounded."""
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


# Residuals ``(B, C, n, n)`` of two answers to pure noise in the same windows, and the regions to paint.
Residuals = tuple[Tensor, Tensor, Tensor]
MOST_COMPENSATED = 1.5  # Greatest factor by which :meth:`Wavelets.compensate` changes a deviation.
LEAST_CELLS = 6  # Fewest cells of a lesion whose power is measured.
FEWEST = 24  # Fewest windows from which a spread is fitted; with fewer, that of the base stays.


class Wavelets(nn.Module):
    """Solver steps with the spread of each scale of Haar wavelets, in the region to paint.

    With one spread, lesions are too much alike as a whole and too grainy within. The region to paint is a place, which
    cosines lack and wavelets have (Mallat 1989). Channels are rotated as in :class:`Spectrum`. ``sizes`` are the
    windows' sides in cells, powers of two.
    """

    styles: Tensor

    def __init__(self, channels: int, sizes: Sequence[int]) -> None:
        super().__init__()
        for size in sizes:
            scales = len(_counts(size))
            # By scale of row and of column, of which the first is the mean.
            self.register_buffer(f"spread_{size}", torch.ones(scales, scales, channels))
            self.register_buffer(f"axes_{size}", torch.eye(channels).repeat(scales, scales, 1, 1))
        self.register_buffer("styles", torch.zeros(channels, channels))

    @torch.no_grad()
    def assume(self, spread: float) -> None:
        """Set one deviation for everything, until :meth:`fit` measures it."""
        for name, table in self.named_buffers():
            if name.startswith("spread"):
                table.fill_(spread)

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor, *condition: Tensor) -> Tensor:
        """Noisy latents ``(B, C, n, n)`` and their velocity, taken from time ``t``, ``(1,)``, to ``s`` below it.

        ``condition`` ends with the mask, ``(B, 4, n, n)`` in [0, 1], and the region to paint, ``(B, 1, n, n)``.
        """
        *_, mask, region = condition
        change = self._style(x, mask, region) * (t >= 1.0).to(x)
        x, velocity = x + change, velocity + change
        size = x.shape[-1]
        basis = haar(size).to(x)
        axes, spread = (_by_wavelet(self.get_buffer(f"{name}_{size}"), size) for name in ("axes", "spread"))
        a, b = gaussian_constants(t, s, spread.permute(2, 0, 1))
        moved = a * turned(basis @ x @ basis.T, axes) + b * turned(basis @ velocity @ basis.T, axes)
        inside = basis.T @ turned(moved, axes.transpose(2, 3)) @ basis
        # The rest is known, and goes there straight.
        return inside * region + (x + (s - t) * velocity) * (1.0 - region)

    def _style(self, noise: Tensor, mask: Tensor, region: Tensor) -> Tensor:
        """The change of pure noise by a window's style: a factor for each channel within the lesion.

        A few steps from normal noise do not draw lesions that are empty or coarse as a whole
        (:mod:`busigen.noise_styles`). The noise outside the region to paint decides the style, and nothing else.
        """
        beside = 1.0 - region
        normals = (noise * beside).sum(dim=(2, 3)) / beside.sum(dim=(2, 3)).clamp(min=1.0).sqrt()
        logarithms = normals.clamp(-LIMIT, LIMIT) @ self.styles.T
        return noise * (logarithms.exp()[:, :, None, None] - 1.0) * mask.mean(dim=1, keepdim=True)

    @torch.no_grad()
    def fit(self, size: int, parts: Sequence[Residuals], factor: float = 1.0) -> None:
        """Measure the spread in windows of ``size`` cells a side; ``factor`` multiplies the residuals' variances."""
        if sum(len(first) for first, _, _ in parts) < FEWEST:
            return
        axes, spread = (self.get_buffer(f"{name}_{size}") for name in ("axes", "spread"))
        variance, vectors = torch.linalg.eigh(factor * _covariances(size, parts))
        axes.copy_(vectors.view(axes.shape).float())
        spread.copy_(variance.clamp(min=LEAST**2).sqrt().view(spread.shape).float())

    @torch.no_grad()
    def compensate(self, size: int, parts: Sequence[Residuals]) -> None:
        """Correct the spread, which noise in the network's answers changes, by residuals of windows drawn with it."""
        if sum(len(first) for first, _, _ in parts) < FEWEST:
            return
        axes, spread = (self.get_buffer(f"{name}_{size}") for name in ("axes", "spread"))
        vectors = axes.double().cpu().flatten(0, 1)
        found = torch.einsum("pck,pcd,pdk->pk", vectors, _covariances(size, parts), vectors)
        found = found.clamp(min=LEAST**2).sqrt().view(spread.shape).to(spread)
        spread.mul_((spread / found).clamp(1.0 / MOST_COMPENSATED, MOST_COMPENSATED))


def _covariances(size: int, parts: Sequence[Residuals]) -> Tensor:
    """Covariances of the channels for each pair of scales, of rows and of columns, ``(S * S, C, C)``."""
    basis, counts = haar(size), _counts(size)
    squares = basis.square()
    scale_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    pair = (scale_of[:, None] * len(counts) + scale_of[None]).flatten()
    channels = parts[0][0].shape[1]
    weights = torch.zeros(len(counts) ** 2, dtype=torch.float64)
    moments = torch.zeros(len(counts) ** 2, channels, channels, dtype=torch.float64)
    for first, second, region in parts:
        share = (squares @ region @ squares.T).clamp(0.0, 1.0).double().flatten(2)[:, 0]
        one, other = ((basis @ (part * region) @ basis.T).double().flatten(2) for part in (first, second))
        # Wavelets count by the share of them that lies in the region.
        both = torch.einsum("bcp,bdp,bp->pcd", one, other, share**4)
        moments.index_add_(0, pair, 0.5 * (both + both.transpose(1, 2)))
        weights.index_add_(0, pair, (share**5).sum(0))
    return moments / weights.clamp(min=1e-9)[:, None, None]


def amplitudes(latents: Tensor, mask: Tensor) -> Tensor:
    """Half the logarithm of the power of latents ``(B, C, n, n)`` in each lesion that is large enough, ``(N, C)``."""
    within = (mask.mean(dim=1, keepdim=True) > 0.9).to(latents)
    latents, within = (part[within.sum(dim=(1, 2, 3)) >= LEAST_CELLS] for part in (latents, within))
    cells = within.sum(dim=(2, 3), keepdim=True)
    mean = (latents * within).sum(dim=(2, 3), keepdim=True) / cells
    power = ((latents - mean).square() * within).sum(dim=(2, 3)) / (cells[:, :, 0, 0] - 1.0)
    return 0.5 * power.clamp(min=1e-6).log()


def mean_square(parts: Sequence[Residuals]) -> float:
    """Mean square in the region to paint of what two answers miss in common, which is none of their noise's doing."""
    total = sum(float((first * second * region).sum()) for first, second, region in parts)
    cells = sum(float(region.sum()) * first.shape[1] for first, _, region in parts)
    return max(total, 0.0) / max(cells, 1.0)


def _by_wavelet(table: Tensor, size: int) -> Tensor:
    """A table by scales ``(S, S, ...)`` as one by wavelets ``(n, n, ...)``."""
    scale_of = torch.arange(table.shape[0]).repeat_interleave(torch.tensor(_counts(size))).to(table.device)
    return table.index_select(0, scale_of).index_select(1, scale_of)


def _counts(size: int) -> list[int]:
    """Wavelets of each scale among ``size`` samples: the mean, then from the widest to the finest."""
    return [1, *(2**k for k in range(round(math.log2(size))))]


def haar(size: int) -> Tensor:
    """The orthonormal Haar transform of ``size`` samples (a power of two) as a matrix ``(wavelet, sample)``."""
    rows = [torch.full((1, size), size**-0.5)]
    for count in _counts(size)[1:]:
        width = size // count
        wavelet = torch.cat((torch.ones(width // 2), -torch.ones(width // 2))) * width**-0.5
        rows.append(torch.block_diag(*[wavelet[None]] * count))
    return torch.cat(rows)
