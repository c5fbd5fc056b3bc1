"""Losses. Each takes plain tensors and returns a scalar tensor; none of them knows where its batch came from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from busigen.registry import LATENT_FACTOR

GRAIN_PATCH, COARSE_FACTOR = 8, 4
"""Side in pixels of the patches that are compared grain by grain, and how much coarser the second comparison is."""

SPECTRAL_PATCHES = (8, 16, 32)
"""Sides in pixels of the patches whose spectra are compared: from one speckle grain to several."""

SPECTRAL_WEIGHT = 0.1
"""Weight of each spectral term: log-magnitudes differ by about ten times what pixels in [-1, 1] do."""

LATTICE_WEIGHT = 5.0
"""Weight of the lattice term: where cells can be seen in the speckle, its size is about 0.02."""

CRITIC_WEIGHT = 0.3
"""Weight of what the decoder loses to its critic: after 100 steps it pulls a third as hard as the energy distance."""

TEXTURE_WEIGHT = 0.005
"""Weight of what the decoder loses to the discriminants of texture."""

AT_SHARE = 0.5
"""Share of a denoiser's training times that are those of the few-step solver's table."""


def _patches(image: Tensor, side: int, stride: int) -> Tensor:
    """Patches of ``(B, 1, H, W)`` as ``(B, P, side, side)``."""
    return image.unfold(2, side, stride).unfold(3, side, stride).flatten(1, 3)


def _views(image: Tensor, offsets: list[int]) -> Iterator[tuple[float, Tensor]]:
    """Yield what two images are compared by: a weight and one vector per patch, ``(B, P, n)``.

    Grey levels fine and coarse, and log-magnitudes of windowed spectra, which know speckle's texture but not the
    places of its grains. ``offsets`` shift the tiling, so that no pixel always lies at a patch's rim.
    """
    yield 1.0, _patches(image[..., offsets[0] :, offsets[0] :], GRAIN_PATCH, GRAIN_PATCH).flatten(2)
    yield 1.0, _patches(F.avg_pool2d(image, COARSE_FACTOR), 4, 4).flatten(2)
    for side, offset in zip(SPECTRAL_PATCHES, offsets[1:], strict=True):
        window = torch.hann_window(side, periodic=False, device=image.device)
        taper = window[:, None] * window[None, :]
        patches = _patches(image[..., offset:, offset:], side, side // 2 if side > GRAIN_PATCH else side)
        patches = (patches - patches.mean(dim=(-2, -1), keepdim=True)) * taper
        # The floor is a few times what rounding to grey levels leaves in a frequency: below it there is nothing to see.
        magnitude = torch.log(torch.fft.rfft2(patches).abs() / side + 0.004)
        yield SPECTRAL_WEIGHT, magnitude.flatten(2)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square difference per patch, averaged; the square root makes the energy distance a proper score."""
    return ((first - second).pow(2).mean(dim=-1) + 1e-6).sqrt().mean()


def energy(first: Tensor, second: Tensor, target: Tensor, generator: Generator) -> Tensor:
    """Generalised energy distance between what a decoder may draw and the image, ``(B, 1, H, W)`` each.

    ``first`` and ``second`` are two draws from the same latents: both are pulled to the image, and pushed from each
    other, so that the least is reached where draws differ from the image just as they differ from one another. Without
    the push, the least is a blur (Gritsenko et al. 2020, A spectral energy distance for parallel speech synthesis).
    """
    offsets = [int(torch.randint(side, (1,), generator=generator)) for side in (GRAIN_PATCH, *SPECTRAL_PATCHES)]
    total = first.new_zeros(())
    views = (_views(image, offsets) for image in (first, second, target))
    for (weight, one), (_, two), (_, real) in zip(*views, strict=True):
        total = total + weight * (_distance(one, real) + _distance(two, real) - _distance(one, two))
    return total


def lattice(drawn: Tensor, target: Tensor) -> Tensor:
    """How much the latents' cells show: grey steps at each of the eight places in a cell, against the target's.

    A decoder's upsampling repeats itself with every cell, and so do the faint seams that it leaves. The energy distance
    compares at random offsets, to which they are noise. Measured against the target, because the edges of tissue
    fall on some places of the cells more than on others, too, and must stay.

    Args:
        drawn: ``(B, 1, H, W)`` decoded from whole cells.
        target: The images that they were encoded from.
    """
    total = drawn.new_zeros(())
    for turned in (False, True):
        ours, theirs = (image.transpose(2, 3) if turned else image for image in (drawn, target))
        for lag in (1, 2, 4):
            total = total + (_steps_by_place(ours, lag) - _steps_by_place(theirs, lag)).pow(2).mean()
    return total


def _steps_by_place(image: Tensor, lag: int) -> Tensor:
    """Mean size of the steps over ``lag`` columns that begin at each place of a cell, as a share of their mean."""
    steps = (image[..., lag:] - image[..., :-lag]).abs().mean(dim=(0, 1, 2))
    whole = steps.numel() // LATENT_FACTOR * LATENT_FACTOR
    places = steps[:whole].view(-1, LATENT_FACTOR).mean(dim=0)
    return places / places.mean().clamp(min=1e-6)


def reconstruction(
    first: Tensor, second: Tensor, target: Tensor, weight: Tensor, latents: Tensor, generator: Generator
) -> Tensor:
    """Autoencoder loss: the energy distance of two decodings to the image, and a light pull of latents to zero.

    ``weight`` is 0 on overlays (calipers, text), which the decoder must not learn to paint.
    """
    score = energy(first * weight, second * weight, target * weight, generator)
    return score + 1e-3 * latents.pow(2).mean()


def masked_patches(output: Tensor, image: Tensor, keep: Tensor, patch: int) -> Tensor:
    """MAE loss: squared error on the dropped patches alone; ``output`` is ``(B, N, patch * patch)``."""
    target = F.unfold(image, patch, stride=patch).transpose(1, 2)
    hidden = 1.0 - keep
    return ((output - target).pow(2).mean(dim=-1) * hidden).sum() / hidden.sum().clamp(min=1.0)


def noisy(clean: Tensor, generator: Generator, at: Sequence[float] = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the flow-matching pair: ``x_t``, ``t`` and the target velocity.

    Times are logit-normal (Esser et al. 2024, 3.1), but for a share ``AT_SHARE`` of them, which are drawn from ``at``:
    the times at which the few-step solver will ask. It always asks at pure noise, where the whole look of what is
    painted is decided, and of logit-normal times one in a thousand lies there.
    """
    count = clean.shape[0]
    t = torch.sigmoid(torch.randn(count, generator=generator) * 1.1 + 0.2)
    if at:
        asked = torch.tensor(at, dtype=t.dtype)[torch.randint(len(at), (count,), generator=generator)]
        t = torch.where(torch.rand(count, generator=generator) < AT_SHARE, asked, t)
    t = t.to(clean)
    noise = torch.randn(clean.shape, generator=generator).to(clean)
    wide = t.view(-1, *[1] * (clean.ndim - 1))
    return (1.0 - wide) * clean + wide * noise, t, noise - clean


def velocity(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean squared error; ``weight`` broadcasts over channels, 0 where nothing is to be learnt."""
    weight = weight.expand_as(output)
    return ((output - target).pow(2) * weight).sum() / weight.sum().clamp(min=1.0)
