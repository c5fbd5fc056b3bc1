"""Fitting what images vary by as a whole and the trained prior does not (:mod:`busigen.styles`)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from busigen.styles import Floats, fitted, powers, styled
from busigen.training.spectrum import Spectrum, transformed

COUNT = 128
"""Images that are drawn to see what the prior varies by, and as many again to see what it makes of styles."""

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
        Rows of :func:`busigen.styles.styled`'s ``factor``; none where drawn images lack nothing, or fewer than
        ``COUNT`` training images say what they should vary by.
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
    has, wants, got = (float(values.reshape(len(values), -1).var(axis=0).sum()) for values in (plain, real, tried))
    share = TRIAL * float(np.sqrt(max(wants - has, 0.0) / max(got - has, 1e-9)))
    return [[round(float(value), 4) for value in row] for row in min(share, 1.0) * factor]
