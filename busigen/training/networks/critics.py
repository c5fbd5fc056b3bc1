"""A decoder's opponents: networks that learn to tell its pixels from an image's, while it learns to escape them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

CHANNELS = (16, 32, 64, 128)  # The critic's channels at full resolution and after each halving, down to a latent cell.
SLOPE = 0.2  # Negative slope of the critic's leaky ReLUs.


class Critic(nn.Module):
    """Scores each cell of the latents by these (Mirza and Osindero 2014) and the pixels around it, about 60 x 60.

    Spectral normalisation (Miyato et al. 2018) bounds its scores without a second derivative.
    """

    def __init__(self, latent_channels: int, channels: Sequence[int] = CHANNELS, *, pixel_channels: int = 1) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Conv2d(pixel_channels, channels[0], 3, padding=1))
        halvings = (nn.Conv2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(channels))
        self.halvings = nn.ModuleList(spectral_norm(halving) for halving in halvings)
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


def contest(critic: nn.Module, generated: Tensor, real: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of decoder and critic: by how much each crop looks more real than the other.

    Both crops ``(B, 1, S, S)`` show the same place, and only their speckle differs (Jolicoeur-Martineau 2018).
    Neither loss has a gradient for the other's weights, so that one optimiser follows their sum.
    """
    real_scores = critic(real, told)
    critic_loss = F.softplus(critic(generated.detach(), told) - real_scores).mean()
    critic.requires_grad_(False)
    decoder_loss = F.softplus(real_scores.detach() - critic(generated, told)).mean()
    critic.requires_grad_(True)
    return decoder_loss, critic_loss
