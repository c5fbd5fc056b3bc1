"""What the networks' wrappers add in use to what was trained."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from busigen.registry import PRESETS, SPECKLE_GAIN
from busigen.training.models import build
from busigen.training.networks import Decoder


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=Generator().manual_seed(seed))


@torch.no_grad()
def test_grains_in_use_are_stronger_than_in_training_and_the_latents_mean_the_same() -> None:
    torch.manual_seed(0)
    channels = PRESETS["tiny"].latent_channels
    autoencoder = build("autoencoder", PRESETS["tiny"]).eval()
    mean, deviation = torch.full((channels,), 0.5), torch.full((channels,), 2.0)
    decoder = Decoder(autoencoder, mean, deviation)
    latents, silence = normal(1, 4, channels, 8, 8), torch.zeros(4, 1, 64, 64)
    own = latents * 2.0 + 0.5
    torch.testing.assert_close(decoder(latents, silence), autoencoder.decoder(own, silence).clamp(-1.0, 1.0))
    # Noise weak enough for the untrained network to answer in proportion.
    noise = 0.01 * normal(2, 4, 1, 64, 64)
    in_use = decoder(latents, noise) - decoder(latents, silence)
    in_training = autoencoder.decoder(own, noise) - autoencoder.decoder(own, silence)
    ratio = float(in_use.std() / in_training.std())
    # A hundredth for what is left of the curvature.
    assert abs(ratio - SPECKLE_GAIN) < 0.01
