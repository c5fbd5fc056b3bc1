"""Stable Diffusion's autoencoder with the interface of ours: grey pixels, no noise, no mask."""

from __future__ import annotations

from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor, nn


class GreyEncoder(nn.Module):
    """Grey pixels ``(B, 1, S, S)`` in [-1, 1], as three equal channels, to the mean of their latents."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.encoder, self.quant_conv = vae.encoder, vae.quant_conv

    def forward(self, pixels: Tensor) -> Tensor:
        """Latents ``(B, 4, S/8, S/8)``, not scaled."""
        moments: Tensor = self.quant_conv(self.encoder(pixels.expand(-1, 3, -1, -1)))
        return moments.chunk(2, dim=1)[0]


class GreyDecoder(nn.Module):
    """Latents to the mean of the three channels; noise and mask are not read."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.decoder, self.post_quant_conv = vae.decoder, vae.post_quant_conv

    def forward(self, latents: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
        """Pixels ``(B, 1, S, S)`` of latents ``(B, 4, S/8, S/8)`` that are not scaled."""
        return self.decoder(self.post_quant_conv(latents)).mean(dim=1, keepdim=True)


class TinyDecoder(nn.Module):
    """The decoder of a TAESD (Bohan 2023), which reads scaled latents; otherwise as `GreyDecoder`."""

    def __init__(self, taesd: AutoencoderTiny, scaling: float) -> None:
        super().__init__()
        self.decoder, self.scaling = taesd.decoder, scaling

    def forward(self, latents: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
        """See `GreyDecoder`."""
        return self.decoder(self.scaling * latents).mean(dim=1, keepdim=True)
