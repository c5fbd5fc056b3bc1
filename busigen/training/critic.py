"""The decoder's opponent: told what an image shows, it judges whether the speckle is real."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

CHANNELS = (16, 32, 64, 128)
"""Channels at full resolution and after each halving, down to one cell of the latents."""

SLOPE = 0.2


class Critic(nn.Module):
    """One score per cell of the latents for pixels around it, about 60 x 60 of them.

    It sees the latents as well (a conditional critic, Mirza and Osindero 2014), because speckle that is real
    somewhere may be wrong here: every scanner has its own. Spectral normalisation (Miyato et al. 2018) keeps its scores
    from running away from the decoder's, without a second derivative.

    Args:
        latent_channels: channels of the latents.
        channels: at full resolution and after each halving.
        pixel_channels: 1, and more for what it is told at full resolution.
    """

    def __init__(self, latent_channels: int, channels: Sequence[int] = CHANNELS, *, pixel_channels: int = 1) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(pixel_channels, channels[0], 3, padding=1))
        self.halvings = nn.ModuleList(
            spectral_norm(nn.Conv2d(a, b, 4, stride=2, padding=1)) for a, b in pairwise(channels)
        )
        self.told = spectral_norm(nn.Conv2d(latent_channels, channels[1], 1))
        self.joint = spectral_norm(nn.Conv2d(channels[-1] + channels[1], channels[-1], 3, padding=1))
        self.last = spectral_norm(nn.Conv2d(channels[-1], 1, 3, padding=1))

    def forward(self, pixels: Tensor, latents: Tensor) -> Tensor:
        """Score ``(B, 1, 8s, 8s)`` pixels that show ``(B, C, s, s)`` latents as ``(B, 1, s, s)``; high is real."""
        features = F.leaky_relu(self.first(pixels), SLOPE)
        for halving in self.halvings:
            features = F.leaky_relu(halving(features), SLOPE)
        joint = torch.cat((features, F.leaky_relu(self.told(latents), SLOPE)), dim=1)
        scores: Tensor = self.last(F.leaky_relu(self.joint(joint), SLOPE))
        return scores

    def contest(self, drawn: Tensor, real: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder loses and what the critic loses: by how much each crop looks more real than the other.

        The relativistic pairing of Jolicoeur-Martineau (2018): the two crops show the same place, so what the critic
        compares is the speckle alone. The decoder's loss leaves the critic's weights without gradient, and the other
        way round, so that one optimiser can follow their sum.

        Args:
            drawn: ``(B, 1, S, S)`` pixels that the decoder drew.
            real: the images, of the same shape.
            latents: ``(B, C, S / 8, S / 8)``, what the decoder saw.
        """
        real_scores = self(real, latents)
        critic_loss = F.softplus(self(drawn.detach(), latents) - real_scores).mean()
        self.requires_grad_(False)
        decoder_loss = F.softplus(real_scores.detach() - self(drawn, latents)).mean()
        self.requires_grad_(True)
        return decoder_loss, critic_loss
