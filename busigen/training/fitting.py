"""Fitting what images vary by as a whole and the trained prior does not (:mod:`busigen.noise_styles`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from busigen.data.geometry import Mask, around
from busigen.mtf import KNOTS, LARGEST_GAIN, Transfer, detail, passed
from busigen.noise_styles import LARGEST_FACTOR, Floats, bounded, fitted, powers, styled
from busigen.training.networks.variance import Spectrum, transformed

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
        Rows of :func:`busigen.noise_styles.styled`'s ``factor``, within the bounds that bundles have; none where drawn
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
    return [[round(float(value), 4) for value in row] for row in bounded(share * factor, LARGEST_FACTOR, "styles")]


def fit_lesion_styles(real: Tensor, draw: Callable[[Tensor], Tensor], channels: int) -> Tensor:
    """The ``styles`` of :class:`busigen.training.networks.variance.Wavelets`: lesions differ as training lesions do.

    Args:
        real: amplitudes of training lesions ``(N, C)`` (:func:`busigen.training.networks.variance.amplitudes`).
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
    return torch.from_numpy(bounded(found.numpy(), LARGEST_FACTOR, "styles of lesions"))


def _share(has: float, wants: float, got: float) -> float:
    """The share of the missing deviation that brings drawn images to what they should vary by."""
    return min(1.0, TRIAL * math.sqrt(max(wants - has, 0.0) / max(got - has, 1e-9)))


FEWEST = 128
"""Real images, and drawn ones, from which it is believed how their detail is distributed."""

CORRECTIONS = 2
"""Times that the fit looks at what its filters do and mends them: a short filter cannot follow every gain."""

MOST_MENDED = 2.0
"""Factor by which a correction may change the filters' spread."""

Picture = tuple[NDArray[np.uint8], Mask]
"""An image ``(H, W)`` and which of its pixels count."""


def fit_transfer(real: Iterable[Picture], generated: Sequence[Picture], seed: int) -> Transfer | None:
    """The filters through which drawn images have their detail distributed as real ones have.

    Args:
        real: training images.
        generated: what the decoder draws; what does not count lies around the image's frame.
        seed: seeds the filters that are tried.

    Returns:
        Filters within the bounds that bundles have (:data:`busigen.mtf.LARGEST_GAIN`); a warning says where they were
        clipped to them. None where fewer than ``FEWEST`` images of either say what to fit, or where drawn images lack
        nothing that real ones vary by.
    """
    if len(generated) < FEWEST:
        return None
    wanted, plain = _measured(real), _measured(generated)
    if min(len(wanted), len(plain)) < FEWEST:
        return None
    result = Transfer(wanted.mean(axis=0) - plain.mean(axis=0), fitted(wanted, plain))
    if not result.factor.size:
        return None
    for _ in range(CORRECTIONS):
        # As they will be used: what has no effect beyond its bound is not to sway the rest.
        found = _measured(_filtered(_clipped(result), generated, seed))
        missing, brought = (_spread(part) - _spread(plain) for part in (wanted, found))
        share = math.sqrt(max(missing, 1e-9) / max(brought, 1e-9))
        share = min(max(share, 1.0 / MOST_MENDED), MOST_MENDED)
        result = Transfer(result.mean + wanted.mean(axis=0) - found.mean(axis=0), share * result.factor)
    return Transfer(*(bounded(part, LARGEST_GAIN, "transfer") for part in (result.mean, result.factor)))


def _clipped(transfer: Transfer) -> Transfer:
    return Transfer(*(np.clip(part, -LARGEST_GAIN, LARGEST_GAIN) for part in (transfer.mean, transfer.factor)))


def _measured(pictures: Iterable[Picture]) -> Floats:
    found = [detail(image, usable) for image, usable in pictures]
    return np.array([part for part in found if part is not None]).reshape(-1, 2 * len(KNOTS))


def _spread(measured: Floats) -> float:
    return float(measured.var(axis=0).sum())


def _filtered(transfer: Transfer, generated: Iterable[Picture], seed: int) -> Iterable[Picture]:
    rng = np.random.default_rng(seed)
    for image, usable in generated:
        frame = around(usable, 0)
        result = image.copy()
        normals = rng.standard_normal((transfer.factor.shape[1],))
        result[frame] = passed(image[frame], transfer.kernels(normals))
        yield result, usable
