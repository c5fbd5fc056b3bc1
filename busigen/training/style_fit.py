"""Fitting what images vary by as a whole and the trained prior does not (:mod:`busigen.styles`)."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from busigen.styles import LARGEST, Floats, bounded, fitted, powers, styled
from busigen.training.spectrum import Spectrum, transformed

COUNT = 128
"""Images that are drawn to see what the prior varies by, and as many again to see what it makes of styles."""

LESIONS = 64
"""Fewest lesions, real or drawn, that say how much lesions differ."""

TRIAL = 0.35
"""Share of the missing deviation that is tried first; the network takes up what it is given and adds to it."""


def fit_styles(
    spectrum: Spectrum,
    clean: Tensor,
    draw: Callable[[Tensor], Tensor],
    seed: int,
) -> list[list[float]]:
    """The ``styles`` of a bundle, with which drawn latents vary in their bands by as much as training latents do.

    How much of a style the solver carries on is measured in one trial, on the sum of all bands' variances, to which the
    square of the share that is tried contributes in proportion.

    Args:
        spectrum: the prior's.
        clean: training latents ``(N, C, s, s)``.
        draw: samples the prior from noise of that shape.
        seed: seeds the draws.

    Returns:
        Rows of :func:`busigen.styles.styled`'s ``factor``, within the bounds that bundles have; none where drawn
        images lack nothing, or fewer than ``COUNT`` training images say what they should vary by.
    """
    if len(clean) < COUNT:
        return []
    mean, spread = clean.double().mean(0).float(), spectrum.marginal.cpu()

    def measured(latents: Tensor) -> Floats:
        parts = [powers((transformed(part.float() - mean) / spread).numpy()) for part in latents.split(64)]
        return np.concatenate(parts)

    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(COUNT, *clean.shape[1:], generator=generator)
    real, plain = measured(clean), measured(draw(noise))
    factor = fitted(real, plain)
    if not factor.size:
        return []
    normals = torch.randn(COUNT, factor.shape[1], generator=generator).numpy()
    tried = measured(draw(torch.from_numpy(styled(noise.numpy(), TRIAL * factor, normals))))
    share = _share(*(float(values.reshape(len(values), -1).var(axis=0).sum()) for values in (plain, real, tried)))
    return [[round(float(value), 4) for value in row] for row in bounded(share * factor, LARGEST, "styles")]


def fit_lesion_styles(real: Tensor, draw: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """The ``styles`` of :class:`busigen.training.wavelets.Wavelets`, with which lesions differ as training lesions do.

    Args:
        real: amplitudes of training lesions ``(N, C)`` (:func:`busigen.training.wavelets.amplitudes`).
        draw: those of lesions that are drawn with some styles ``(C, C)``.
        channels: ``C``.

    Returns:
        ``(C, C)``; zeros where drawn lesions lack nothing, or too few lesions say what they should differ by.
    """
    nothing = torch.zeros(channels, channels)
    plain = draw(nothing)
    if min(len(real), len(plain)) < LESIONS:
        return nothing
    factor = torch.from_numpy(fitted(real.double().numpy(), plain.double().numpy(), least=0.1)).float()
    if not factor.numel():
        return nothing
    wanted = torch.nn.functional.pad(factor, (0, channels - factor.shape[1]))
    tried = draw(TRIAL * wanted)
    found = wanted * _share(*(float(values.var(dim=0).sum()) for values in (plain, real, tried)))
    return torch.from_numpy(bounded(found.numpy(), LARGEST, "styles of lesions"))


def _share(has: float, wants: float, got: float) -> float:
    """The share of the missing deviation that brings drawn images to what they should vary by."""
    return min(1.0, TRIAL * math.sqrt(max(wants - has, 0.0) / max(got - has, 1e-9)))
