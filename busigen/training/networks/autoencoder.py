"""The autoencoder: latents carry the anatomy, the decoder draws the speckle from noise of its own.

Speckle is random: which grains lie where says nothing about the tissue, and f8 latents could not carry it. An
autoencoder that is asked for the very grains it was shown averages over all that are possible, and paints smooth grey.
This one is given white noise at every scale (as StyleGAN is, Karras et al. 2019, 3.2) and is only asked that what it
draws be *distributed* like the image (:func:`busigen.training.losses.reconstruction`). The denoisers are spared
the grains as well, which is what lets them do with few steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.autoencoder_dc import Encoder, ResBlock
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

INITIAL_SPECKLE = 0.1
"""Noise amplitude that every channel starts with: at 0 the repulsion between two decodings would have no gradient."""


class Speckle(nn.Module):
    """Noise, added with an amplitude that each position's features decide: speckle's depends on what scatters."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.amplitude = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.amplitude.weight)
        self.amplitude.bias = nn.Parameter(torch.full((channels,), INITIAL_SPECKLE))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Add noise ``(B, 1, h, w)`` of unit variance to features ``(B, C, h, w)``."""
        return features + self.amplitude(features) * noise


class SpeckleDecoder(nn.Module):
    """Latents, white noise and a lesion's mask to pixels, from the coarsest level to the finest.

    A cell of the latents is eight pixels wide, and the stages are told an outline four pixels at a time. A margin is
    sharper than that: so every level of the decoder is told the mask at its own resolution, once there is one.
    """

    def __init__(self, latent_channels: int, channels: tuple[int, ...], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        order = range(len(channels) - 1, -1, -1)
        # Channels are reduced before the interpolation, at a quarter of the cost of doing it after.
        self.ups = nn.ModuleList(nn.Conv2d(channels[k + 1], channels[k], 3, padding=1) for k in order[1:])
        self.speckles = nn.ModuleList(Speckle(channels[k]) for k in order)
        self.outlines = nn.ModuleList(_mask_input(channels[k]) for k in order)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(ResBlock(channels[k], channels[k], norm_type="rms_norm", act_fn="silu") for _ in range(layers[k]))
            )
            for k in order
        )
        self.conv_out = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(self, latents: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
        """Decode.

        Args:
            latents: ``(B, C, s, s)``.
            noise: ``(B, 1, S, S)``, standard normal.
            mask: ``(B, 1, S, S)`` in {0, 1}, the lesion; none is as good as an empty one.

        Returns:
            ``(B, 1, S, S)`` pixels.
        """
        features = self.conv_in(latents)
        factor = 2 ** (len(self.levels) - 1)
        for number, level in enumerate(self.levels):
            if number:
                # Bilinear, because pixel-shuffle and nearest neighbours leave a block pattern in the speckle.
                features = F.interpolate(self.ups[number - 1](features), scale_factor=2, mode="bilinear")
            # One field for all levels: its means over factor x factor pixels, scaled back to unit variance.
            coarse = F.avg_pool2d(noise, factor) * float(factor) if factor > 1 else noise
            if mask is not None:
                features = features + self.outlines[number](F.avg_pool2d(mask, factor) if factor > 1 else mask)
            features = level(self.speckles[number](features, coarse))
            factor //= 2
        return self.conv_out(F.silu(features))


def _mask_input(channels: int) -> nn.Conv2d:
    """Reads a mask and makes nothing of it yet: a decoder is first trained without, and goes on from where it stood."""
    outline = nn.Conv2d(1, channels, 3, padding=1, bias=False)
    nn.init.zeros_(outline.weight)
    return outline


class Autoencoder(ModelMixin, ConfigMixin):
    """Encoder (diffusers' DC-AE blocks, Chen et al. 2024) and noise-driven decoder, eight pixels per latent cell.

    Args:
        latent_channels: channels of the latents.
        encoder_channels: channels of the encoder's levels, finest (half resolution) first.
        encoder_layers: residual blocks per level; 0 for the first makes it a single strided convolution.
        decoder_channels: channels of the decoder's levels, finest (full resolution) first.
        decoder_layers: residual blocks per level.
    """

    @register_to_config
    def __init__(
        self,
        latent_channels: int,
        encoder_channels: tuple[int, ...],
        encoder_layers: tuple[int, ...],
        decoder_channels: tuple[int, ...],
        decoder_layers: tuple[int, ...],
    ) -> None:
        super().__init__()
        self.encoder = Encoder(
            in_channels=1,
            latent_channels=latent_channels,
            block_type="ResBlock",
            block_out_channels=tuple(encoder_channels),
            layers_per_block=tuple(encoder_layers),
            qkv_multiscales=((),) * len(encoder_channels),
            downsample_block_type="Conv",
        )
        self.decoder = SpeckleDecoder(latent_channels, tuple(decoder_channels), tuple(decoder_layers))

    def forward(self, pixels: Tensor, noise: Tensor) -> Tensor:
        """Encode and decode ``(B, 1, S, S)`` pixels in [-1, 1]; ``noise`` is standard normal, of the same shape."""
        decoded: Tensor = self.decoder(self.encoder(pixels), noise)
        return decoded


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

    def contest(self, generated: Tensor, real: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """What the decoder loses and what the critic loses: by how much each crop looks more real than the other.

        The relativistic pairing of Jolicoeur-Martineau (2018): the two crops show the same place, so what the critic
        compares is the speckle alone. The decoder's loss leaves the critic's weights without gradient, and the other
        way round, so that one optimiser can follow their sum.

        Args:
            generated: ``(B, 1, S, S)`` pixels that the decoder drew.
            real: the images, of the same shape.
            latents: ``(B, C, S / 8, S / 8)``, what the decoder saw.
        """
        real_scores = self(real, latents)
        critic_loss = F.softplus(self(generated.detach(), latents) - real_scores).mean()
        self.requires_grad_(False)
        decoder_loss = F.softplus(real_scores.detach() - self(generated, latents)).mean()
        self.requires_grad_(True)
        return decoder_loss, critic_loss
