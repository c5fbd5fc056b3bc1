"""Losses. Each takes plain tensors and returns a scalar tensor; none of them knows where its batch came from."""

from __future__ import annotations

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

SPECTRAL_PATCH = 16
"""Side in pixels of the patches whose spectra are compared: a few speckle grains wide."""


def spectral(output: Tensor, target: Tensor, generator: Generator | None = None) -> Tensor:
    """L1 distance of log-magnitude spectra of small windowed patches.

    Speckle's phase cannot be carried by f8 latents, but its power can: this term asks for the right energy at every
    frequency without asking for the same grains (in the spirit of focal frequency loss, Jiang et al. 2021).
    """
    offset = int(torch.randint(SPECTRAL_PATCH, (1,), generator=generator))
    window = torch.hann_window(SPECTRAL_PATCH, periodic=False, device=output.device)
    taper = window[:, None] * window[None, :]

    def spectrum(image: Tensor) -> Tensor:
        image = image[..., offset:, offset:].float()
        patches = image.unfold(2, SPECTRAL_PATCH, SPECTRAL_PATCH).unfold(3, SPECTRAL_PATCH, SPECTRAL_PATCH)
        patches = patches - patches.mean(dim=(-2, -1), keepdim=True)
        return torch.log(torch.fft.rfft2(patches * taper).abs() + 0.05)

    return F.l1_loss(spectrum(output), spectrum(target))


def reconstruction(output: Tensor, target: Tensor, weight: Tensor, latents: Tensor, generator: Generator) -> Tensor:
    """Autoencoder loss: L1 on pixels and on a coarser scale, speckle spectra, and a light pull of latents to zero.

    ``weight`` is 0 on overlays (calipers, text), which the decoder must not learn to paint.
    """
    output, target = output * weight, target * weight
    coarse = F.l1_loss(F.avg_pool2d(output, 4), F.avg_pool2d(target, 4))
    pixels = F.l1_loss(output, target)
    return pixels + coarse + 0.06 * spectral(output, target, generator) + 1e-3 * latents.pow(2).mean()


def masked_patches(output: Tensor, image: Tensor, keep: Tensor, patch: int) -> Tensor:
    """MAE loss: squared error on the dropped patches alone; ``output`` is ``(B, N, patch * patch)``."""
    target = F.unfold(image, patch, stride=patch).transpose(1, 2)
    hidden = 1.0 - keep
    return ((output - target).pow(2).mean(dim=-1) * hidden).sum() / hidden.sum().clamp(min=1.0)


def noisy(clean: Tensor, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the flow-matching pair: ``x_t``, ``t`` (logit-normal, Esser et al. 2024, 3.1) and the target velocity."""
    t = torch.sigmoid(torch.randn(clean.shape[0], generator=generator) * 1.1 + 0.2).to(clean)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    wide = t.view(-1, *[1] * (clean.ndim - 1))
    return (1.0 - wide) * clean + wide * noise, t, noise - clean


def velocity(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error; ``weight`` broadcasts over channels, 0 where nothing is to be learnt."""
    weight = weight.expand_as(output)
    return ((output - target).pow(2) * weight).sum() / weight.sum().clamp(min=1.0)
