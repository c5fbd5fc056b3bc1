"""The autoencoder, whose latents hold the anatomy and whose decoder draws speckle from noise, and its critic.

An autoencoder that should repeat the speckle's grains averages over all that are possible, and paints smooth grey. So
this decoder gets white noise at every scale (as StyleGAN does, Karras et al. 2019, 3.2), and what it draws is only to
be *distributed* like the image (:func:`busigen.training.losses.reconstruction`).
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

from busigen.registry import SCANNERS

INITIAL_SPECKLE = 0.1  # Initial noise amplitude of every channel; at 0, two decodings would not repel each other.


class Speckle(nn.Module):
    """Adds noise with an amplitude that depends on the features at each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.amplitude = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.amplitude.weight)
        self.amplitude.bias = nn.Parameter(torch.full((channels,), INITIAL_SPECKLE))

    def forward(self, features: Tensor, noise: Tensor) -> Tensor:
        """Add noise ``(B, 1, h, w)`` of unit variance to features ``(B, C, h, w)``."""
        return features + self.amplitude(features) * noise


class SpeckleDecoder(ModelMixin, ConfigMixin):
    """Latents, white noise and a lesion's mask to pixels, from the coarsest level to the finest.

    Margins are sharper than a cell of the latents, so every level reads the mask at its own resolution.
    """

    @register_to_config
    def __init__(self, latent_channels: int, channels: tuple[int, ...], layers: tuple[int, ...]) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(latent_channels, channels[-1], 3, padding=1)
        order = range(len(channels) - 1, -1, -1)
        # Reducing channels before the interpolation costs a quarter of doing it after.
        self.ups = nn.ModuleList(nn.Conv2d(channels[k + 1], channels[k], 3, padding=1) for k in order[1:])
        self.speckles = nn.ModuleList(Speckle(channels[k]) for k in order)
        self.outlines = nn.ModuleList(nn.Conv2d(1, channels[k], 3, padding=1, bias=False) for k in order)
        for weight in self.outlines.parameters():  # No effect at first, because training starts without masks.
            nn.init.zeros_(weight)
        self.scanners = nn.ModuleList(nn.Linear(SCANNERS, channels[k], bias=False) for k in order)
        for weight in self.scanners.parameters():
            nn.init.zeros_(weight)
        self.levels = nn.ModuleList(
            nn.Sequential(
                *(ResBlock(channels[k], channels[k], norm_type="rms_norm", act_fn="silu") for _ in range(layers[k]))
            )
            for k in order
        )
        self.conv_out = nn.Conv2d(channels[0], 1, 3, padding=1)

    def forward(
        self, latents: Tensor, noise: Tensor, mask: Tensor | None = None, scanner: Tensor | None = None
    ) -> Tensor:
        """Decode ``(B, C, s, s)`` latents to ``(B, 1, S, S)`` pixels.

        ``noise`` is standard normal and ``mask`` in {0, 1}, both ``(B, 1, S, S)``; no mask equals an empty one.
        ``scanner`` ``(B, SCANNERS)`` is 1 for the image's own, and none equals any.
        """
        features = self.conv_in(latents)
        factor = 2 ** (len(self.levels) - 1)
        for number, level in enumerate(self.levels):
            if number:
                # Pixel-shuffle and nearest neighbours would leave a block pattern in the speckle.
                features = F.interpolate(self.ups[number - 1](features), scale_factor=2, mode="bilinear")
            # One field for all levels: means over factor x factor pixels, scaled to unit variance.
            coarse = F.avg_pool2d(noise, factor) * float(factor) if factor > 1 else noise
            if mask is not None:
                features = features + self.outlines[number](F.avg_pool2d(mask, factor) if factor > 1 else mask)
            if scanner is not None:
                features = features + self.scanners[number](scanner)[:, :, None, None]
            features = level(self.speckles[number](features, coarse))
            factor //= 2
        return self.conv_out(F.silu(features))


class Autoencoder(ModelMixin, ConfigMixin):
    """Encoder (diffusers' DC-AE blocks, Chen et al. 2024) and noise-driven decoder, eight pixels per latent cell.

    Levels are listed finest first, the encoder's at half resolution. One without layers is a strided convolution.
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
        return self.decoder(self.encoder(pixels), noise)


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
        return self.last(F.leaky_relu(self.joint(joint), SLOPE))

    def contest(self, generated: Tensor, real: Tensor, latents: Tensor) -> tuple[Tensor, Tensor]:
        """The losses of decoder and critic: by how much each crop looks more real than the other.

        Both crops ``(B, 1, S, S)`` show the same place, and only their speckle differs (Jolicoeur-Martineau 2018).
        Neither loss has a gradient for the other's weights, so that one optimiser follows their sum.
        """
        real_scores = self(real, latents)
        critic_loss = F.softplus(self(generated.detach(), latents) - real_scores).mean()
        self.requires_grad_(False)
        decoder_loss = F.softplus(real_scores.detach() - self(generated, latents)).mean()
        self.requires_grad_(True)
        return decoder_loss, critic_loss
