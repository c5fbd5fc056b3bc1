"""Codes of outlines: a lesion's attributes, and principal components of its form.

A code is the lesion's four attributes (place, size, slenderness) and its form's principal components in the canonical
frame (:mod:`busigen.data.geometry`), all standardised. Decoding is in torch, so that it is exported with the network,
and gives exactly the attributes that a user asks for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.linalg import eigh
from scipy.optimize import minimize
from torch import Tensor, nn

from busigen.data.geometry import Mask, around, attributes, canonical_field, circularity, grid_positions, solidity
from busigen.data.sources.records import birads_category
from busigen.registry import ATTRIBUTES, BIRADS, FIELD_EDGE, RESOLUTION
from busigen.training.networks.variance import Spread

Floats = NDArray[np.float64]

COUNT = len(ATTRIBUTES)
CODE_LIMIT = 8.0  # Deviations at which a sampled code is clipped; 1 % of held-out lesions have a component beyond 6.


class OutlineSpace(nn.Module):
    """Masks to standardised codes and back, in a basis that is fitted on the base's training lesions.

    An outline is as likely as its mirror image, so every component is symmetric or antisymmetric, and only its left
    half is kept. ``coefficients`` counts components, ``grid`` samples a side of the canonical field.
    """

    attribute_mean: Tensor
    attribute_std: Tensor
    field: Tensor
    left: Tensor
    parity: Tensor

    def __init__(self, coefficients: int, grid: int) -> None:
        super().__init__()
        self.grid, self.coefficients = grid, coefficients
        self.register_buffer("attribute_mean", torch.zeros(COUNT))
        self.register_buffer("attribute_std", torch.ones(COUNT))
        self.register_buffer("field", torch.zeros(grid * grid))
        # Left half of each component times its deviation over the training lesions.
        self.register_buffer("left", torch.zeros(coefficients, grid, grid // 2))
        self.register_buffer("parity", torch.ones(coefficients))  # 1 if symmetric, else -1.

    def fit(self, masks: Sequence[Mask]) -> None:
        """Fit mean, deviations and components on lesions, ``(256, 256)`` bool each, and their mirror images."""
        values = np.stack([attributes(mask) for mask in masks])
        values = np.concatenate((values, values * [-1.0, 1.0, 1.0, 1.0] + [1.0, 0.0, 0.0, 0.0]))
        fields = np.stack([canonical_field(mask, self.grid) for mask in masks]).astype(np.float64)
        mean = 0.5 * (fields + fields[:, :, ::-1]).mean(axis=0)
        parts = [_components(fields - mean, parity, self.coefficients) for parity in (1.0, -1.0)]
        power, left, parity = (np.concatenate(found) for found in zip(*parts, strict=True))
        order = np.argsort(-power, kind="stable")[: self.coefficients]
        # A handful of lesions spans fewer components; the rest are small, but not so small that codes explode.
        deviation = np.sqrt(np.maximum(power[order], 1e-5 * power.max() + 1e-12))
        for buffer, value in (
            (self.attribute_mean, values.mean(axis=0)),
            (self.attribute_std, np.maximum(values.std(axis=0), 1e-3)),
            (self.field, mean.ravel()),
            (self.left, left[order] * deviation[:, None, None]),
            (self.parity, parity[order]),
        ):
            buffer.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    def basis(self) -> Tensor:
        """The components times their deviations, ``(coefficients, grid * grid)``."""
        right = self.left.flip(2) * self.parity[:, None, None]
        return torch.cat((self.left, right), dim=2).flatten(1)

    def encode(self, masks: Sequence[Mask]) -> Tensor:
        """Codes of lesions, ``(B, 4 + coefficients)`` float32; masks as for :meth:`fit`."""
        device = self.field.device
        found = torch.from_numpy(np.stack([attributes(mask) for mask in masks])).float().to(device)
        fields = torch.from_numpy(np.stack([canonical_field(mask, self.grid) for mask in masks])).to(device)
        basis = self.basis()
        forms = (fields.flatten(1) - self.field) @ basis.T / basis.pow(2).sum(dim=1)
        return torch.cat(((found - self.attribute_mean) / self.attribute_std, forms), dim=1)

    def condition(self, asked: Tensor) -> Tensor:
        """What is asked for, as the network reads it: attributes standardised, or 0 if not asked for.

        ``asked`` ``(B, ASKED_LENGTH)`` holds attributes in the units of :func:`busigen.data.geometry.attributes`, their
        flags (1 if asked for), and BI-RADS one-hot.
        """
        values, flags, birads = asked.split([COUNT, COUNT, len(BIRADS)], dim=1)
        return torch.cat(((values - self.attribute_mean) / self.attribute_std * flags, flags, birads), dim=1)

    def distance(self, sample: Tensor, asked: Tensor) -> Tensor:
        """Codes ``(B, 4 + coefficients)`` as signed distances ``(B, 1, 256, 256)``, with the attributes asked for.

        They are about pixels near the outline, and above 0 inside. ``asked`` is as for :meth:`condition`.
        """
        code = sample.clamp(-CODE_LIMIT, CODE_LIMIT)
        values, flags = asked[:, :COUNT], asked[:, COUNT : 2 * COUNT]
        found = (code[:, :COUNT] * self.attribute_std + self.attribute_mean) * (1.0 - flags) + values * flags
        across, down, size, ratio = (part[:, 0] for part in found.split(1, dim=1))
        at = torch.from_numpy(grid_positions(self.grid)).to(code)
        step = 2.0 * FIELD_EDGE / self.grid
        far = torch.maximum(at.abs()[:, None], at.abs()[None, :])
        field = (self.field + code[:, COUNT:] @ self.basis()).view(-1, self.grid, self.grid)
        # Nothing reaches the frame's edge.
        field = torch.minimum(field, FIELD_EDGE - step - far)
        # A sampled form has only about the frame's area, centre and proportions: rescaling it makes attributes exact.
        cover = (field / step + 0.5).clamp(0.0, 1.0)
        total = cover.sum(dim=(1, 2)).clamp(min=1.0)
        centre_x = (cover.sum(dim=1) * at).sum(dim=1) / total
        centre_y = (cover.sum(dim=2) * at).sum(dim=1) / total
        height = cover.amax(dim=2).sum(dim=1).clamp(min=1.0)
        width = cover.amax(dim=1).sum(dim=1).clamp(min=1.0)
        slender = torch.exp(ratio) * width / height
        scale = torch.exp(size) / (total.sqrt() * step)
        scale_x, scale_y = scale / slender.sqrt(), scale * slender.sqrt()
        columns = self._weights(across, scale_x, centre_x, step)
        rows = self._weights(down, scale_y, centre_y, step)
        pixels = rows @ field @ columns.transpose(1, 2)
        return (pixels * scale[:, None, None]).unsqueeze(1)

    def _weights(self, place: Tensor, scale: Tensor, centre: Tensor, step: float) -> Tensor:
        """Cubic interpolation (Keys 1981) along one axis, clamped at the edges, as matrices ``(B, 256, grid)``."""
        pixels = torch.arange(RESOLUTION, device=place.device, dtype=place.dtype) + 0.5
        canonical = (pixels[None] - RESOLUTION * place[:, None]) / scale[:, None] + centre[:, None]
        index = ((canonical + FIELD_EDGE) / step - 0.5).clamp(0.0, self.grid - 1.0)
        cells = torch.arange(self.grid, device=place.device, dtype=place.dtype)
        d = (index[:, :, None] - cells).abs()
        near = (1.5 * d - 2.5) * d * d + 1.0
        beyond = ((2.5 - 0.5 * d) * d - 4.0) * d + 2.0
        weights = torch.where(d < 1.0, near, torch.where(d < 2.0, beyond, torch.zeros_like(d)))
        return weights / weights.sum(dim=2, keepdim=True)


def _components(fields: Floats, parity: float, count: int) -> tuple[Floats, Floats, Floats]:
    """Principal components of the symmetric (``parity`` 1) or antisymmetric (-1) parts of fields, at most ``count``.

    Gives their power ``(k,)``, their left halves ``(k, grid, grid / 2)``, with norm 1 when whole, and ``parity``.
    """
    half = fields.shape[2] // 2
    left = 0.5 * (fields + parity * fields[:, :, ::-1])[:, :, :half].reshape(len(fields), -1)
    # A component has twice the power of its half.
    covariance = 2.0 * left.T @ left / len(left)
    last = len(covariance) - 1
    power, vectors = eigh(covariance, subset_by_index=(max(0, last - count + 1), last))
    basis = vectors.T * np.sqrt(0.5)
    # The larger side is positive, so that the same lesions give the same basis.
    basis *= np.sign((basis**3).sum(axis=1, keepdims=True) + 1e-30)
    return power, basis.reshape(-1, fields.shape[1], half), np.full(len(power), parity)


def birads_flags(categories: Sequence[str | None]) -> NDArray[np.bool_]:
    """BI-RADS categories one-hot, ``(N, 4)`` bool; all false for unknown ones and those that are not learnt."""
    # Folders prepared by older versions hold categories as their tables wrote them.
    found = [birads_category(category) for category in categories]
    return np.array([[category == known for known in BIRADS] for category in found]).reshape(-1, len(BIRADS))


LEVELS = (0.02, *(k / 16 for k in range(1, 16)), 0.98)  # Quantiles at which attributes are matched.
EDGES = (4, 36)  # Components of the form at which its two bands begin, after the broad shapes: lobes, and finer detail.
FINEST = 120  # Component at which the part of the finer detail begins that an annotator's hand leaves.
LEAST_AMPLITUDE = 1e-3  # Least amplitude of a band that is amplified.
FEWEST = 64  # Fewest lesions, real and drawn, from which a distribution is fitted.
EVALUATIONS = 160  # Sets of drawn outlines that the search for the bands' gains evaluates, in a second or so each.
FINE = 2.0  # Deviation in pixels of the filter that removes the finest detail of an outline.
RELUCTANCE = 0.03  # Cost of a gain, against distances in deviations: of gains that are as good, the smallest are taken.


class OutlineSpread(Spread):
    """A spread for each of a code's ``length`` numbers, and after the last step the class's own distributions.

    A network that has seen a few hundred lesions draws too regular outlines, and real ones differ more in how ragged
    they are. So attributes are mapped quantile by quantile, and the deviations of two bands of the form by a power law,
    ``a' = exp(gain) a^(1 + power)``, and after that the deviation of the finest detail by one of its own.
    """

    drawn: Tensor
    wanted: Tensor
    gains: Tensor
    finest: Tensor

    def __init__(self, length: int) -> None:
        super().__init__(length)
        self.bands = [(COUNT + a, b) for a, b in zip(EDGES, (COUNT + EDGES[1], length), strict=True) if COUNT + a < b]
        self.register_buffer("drawn", torch.zeros(COUNT, len(LEVELS)))
        self.register_buffer("wanted", torch.zeros(COUNT, len(LEVELS)))
        self.register_buffer("gains", torch.zeros(len(EDGES), 2))
        self.register_buffer("finest", torch.zeros(2))
        self.forget()

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor, *_: Tensor) -> Tensor:
        """:meth:`Spread.forward`, calibrated after the last step."""
        moved = super().forward(x, velocity, t, s)
        return torch.where(s <= 0.0, self.calibrated(moved), moved)

    def calibrated(self, code: Tensor) -> Tensor:
        """Drawn codes ``(B, length)``, mapped to the distribution of real ones."""
        values = code[:, :COUNT, None]
        widths = self.drawn.diff(dim=1)
        slopes = self.wanted.diff(dim=1) / widths
        within = torch.minimum((values - self.drawn[:, :-1]).clamp(min=0.0), widths)
        # Beyond the outermost quantiles, distances are kept.
        beyond = values[..., 0] - values[..., 0].clamp(self.drawn[:, 0], self.drawn[:, -1])
        parts = [self.wanted[:, 0] + (within * slopes).sum(dim=2) + beyond]
        start = COUNT
        for (first, last), (gain, power) in zip(self.bands, self.gains.unbind(), strict=False):
            parts += [code[:, start:first], _amplified(code[:, first:last], gain, power)]
            start = last
        result = torch.cat((*parts, code[:, start:]), dim=1)
        first = COUNT + FINEST
        if first >= code.shape[1]:
            return result
        return torch.cat((result[:, :first], _amplified(result[:, first:], *self.finest.unbind())), dim=1)

    @torch.no_grad()
    def forget(self) -> None:
        """Reset the mapping to the identity."""
        identity = torch.linspace(-2.0, 2.0, len(LEVELS)).expand(COUNT, -1)
        self.drawn.copy_(identity)
        self.wanted.copy_(identity)
        self.gains.zero_()
        self.finest.zero_()

    @torch.no_grad()
    def fit_attributes(self, generated: Tensor, real: Tensor) -> None:
        """Match the attributes' quantiles of uncalibrated codes ``(N, length)`` to those of ``real`` ones."""
        if min(len(generated), len(real)) < FEWEST:
            return
        levels = torch.tensor(LEVELS, dtype=torch.float32)
        for table, codes in ((self.drawn, generated), (self.wanted, real)):
            quantiles = torch.quantile(codes[:, :COUNT].float().cpu(), levels, dim=0).T
            # No two are equal, so that slopes between them are finite.
            steps = quantiles.diff(dim=1).clamp(min=1e-3).cumsum(dim=1)
            table.copy_(torch.cat((quantiles[:, :1], quantiles[:, :1] + steps), dim=1))

    @torch.no_grad()
    def fit_form(self, codes: Tensor, outlined: Callable[[Tensor], Sequence[Mask]], real: Sequence[Mask]) -> None:
        """Find the bands' gains with which the irregularity of outlines is distributed as that of real ones.

        ``codes`` are uncalibrated; ``outlined`` gives the masks of calibrated ones, without those that are no lesion.
        """
        if min(len(codes), len(real)) < FEWEST or not self.bands:
            return
        count, target, levels = 2 * len(self.bands), _irregularity(real), np.linspace(0.02, 0.98, 49)
        scale, wanted = target.std(axis=0), np.quantile(target, levels, axis=0)

        def missed(found: Floats) -> float:
            gains = torch.from_numpy(found).to(self.gains)
            self.gains.view(-1)[:count] = gains[:count]
            self.finest[: len(gains) - count] = gains[count:]
            drawn = _irregularity(outlined(self.calibrated(codes)))
            if len(drawn) < FEWEST // 2:
                return float("inf")
            distance = (np.abs(np.quantile(drawn, levels, axis=0) - wanted).mean(axis=0) / scale).sum()
            return float(distance + RELUCTANCE * np.abs(found).sum())

        start = np.zeros(count + 2 * (codes.shape[1] > COUNT + FINEST))
        simplex = np.vstack([start, start + 0.4 * np.eye(start.size)])
        options = {"maxfev": EVALUATIONS, "initial_simplex": simplex, "xatol": 0.02, "fatol": 0.005}
        best = minimize(missed, start, method="Nelder-Mead", options=options)
        missed(best.x)


def _amplified(band: Tensor, gain: Tensor, power: Tensor) -> Tensor:
    """A part of codes ``(B, n)`` by the power law of its deviation."""
    amplitude = band.square().mean(dim=1, keepdim=True).sqrt().clamp(min=LEAST_AMPLITUDE)
    return band * torch.exp(gain + power * amplitude.log())


def _irregularity(masks: Sequence[Mask]) -> Floats:
    """How irregular lesions are, ``(N, 4)``.

    Circularity and solidity, circularity without detail finer than ``FINE``, and the area that such detail changes,
    over the root of the area: how a hand or a grid has drawn the outline.
    """
    found = []
    for mask in masks:
        part = np.pad(mask[around(mask, 0)], 4 * round(FINE))
        smooth = ndimage.gaussian_filter(part.astype(np.float32), FINE) >= 0.5
        without = circularity(smooth if smooth.any() else mask)
        found.append((circularity(mask), solidity(mask), without, (smooth ^ part).sum() / np.sqrt(part.sum())))
    return np.array(found, dtype=np.float64).reshape(-1, 4)
