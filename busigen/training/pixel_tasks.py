"""The tasks that train on pixels: the autoencoder, and its decoder alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from busigen.training import objectives, sheets
from busigen.training.critic import Critic
from busigen.training.examples import Frames, to_tensor
from busigen.training.recipe import TaskSpec
from busigen.training.setting import Setting, mean_loss

HOLE_SHARE = 0.3
"""Share of the autoencoder's crops with a grey hole, as the windows of stage 2 have."""

LATENT_NOISE = 0.15
"""Noise on the latents in the autoencoder's training, as a share of each channel's deviation."""


class AutoencoderTask:
    """Random crops through encoder and decoder; some crops carry a grey hole, as the windows of stage 2 do."""

    crop = 96

    def __init__(self, spec: TaskSpec, setting: Setting, module: Any) -> None:
        self.spec, self.device = spec, setting.device
        self.autoencoder, self.module = module, module
        self.train, self.held_out = setting.frames("train", spec), setting.frames("val", spec)

    def _batch(self, frames: Frames, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
        pixels, weights = [], []
        for position in rng.integers(0, len(frames), size):
            frame = frames[int(position)]
            frame = (frame.flipped() if rng.random() < 0.5 else frame).with_gain(rng)
            top, left = rng.integers(0, frame.image.shape[0] - self.crop + 1, 2)
            cut = (slice(top, top + self.crop), slice(left, left + self.crop))
            window = to_tensor(frame.image[cut])
            weight = torch.from_numpy((~frame.overlay[cut]).astype(np.float32))[None]
            if rng.random() < HOLE_SHARE:
                y, x = rng.integers(0, 64, 2)
                hole = (..., slice(y, y + rng.integers(16, 64)), slice(x, x + rng.integers(16, 64)))
                # The encoder must cope with holes; nobody will ever ask the decoder for one.
                window[hole], weight[hole] = 0.0, 0.0
            pixels.append(window)
            weights.append(weight)
        return torch.stack(pixels).to(self.device), torch.stack(weights).to(self.device)

    def _noise(self, pixels: Tensor, generator: Generator) -> Tensor:
        return torch.randn(pixels.shape, generator=generator).to(pixels)

    def _decoded(self, frames: Frames, generator: Generator) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Two decodings of a batch, the pixels, where they count, and the latents that were decoded, without noise."""
        pixels, weight = self._batch(frames, self.spec.batch, generator)
        latents = self.autoencoder.encoder(pixels)
        spread = latents.detach().float().std(dim=(0, 2, 3), keepdim=True).to(latents)
        # Noise makes the decoder forgive what the denoisers get slightly wrong, and keeps grains out of the latents.
        noisy = latents + LATENT_NOISE * spread * torch.randn(latents.shape, generator=generator).to(latents)
        noise = torch.cat([self._noise(pixels, generator) for _ in range(2)])
        first, second = self.autoencoder.decoder(torch.cat((noisy, noisy)), noise).float().chunk(2)
        return first, second, pixels, weight, latents.float()

    def _loss(self, frames: Frames, generator: Generator) -> Tensor:
        return objectives.reconstruction(*self._decoded(frames, generator), generator)

    def loss(self, generator: Generator) -> Tensor:
        """See :class:`busigen.training.trainer.Task`."""
        return self._loss(self.train, generator)

    def validate(self) -> float:
        """Mean loss of fixed held-out crops."""
        return mean_loss(lambda g: self._loss(self.held_out, g))

    def findings(self) -> dict[str, Any]:
        """See :class:`busigen.training.trainer.Task`."""
        return {}

    def sheet(self) -> Image.Image:
        """Held-out crops above their reconstructions."""
        generator = Generator().manual_seed(1)
        pixels, _ = self._batch(self.held_out, 8, generator)
        output = self.autoencoder(pixels, self._noise(pixels, generator))
        return sheets.grid([[sheets.to_picture(p) for p in pixels], [sheets.to_picture(p) for p in output]])


class DecoderTask(AutoencoderTask):
    """The decoder alone, once the latents are settled: against its cells' showing in what it draws, and a critic.

    From the start on, pressure against the cells would cost sharpness: the decoder then flees from edges instead. The
    critic finds what the energy distance, which compares patch by patch, does not see.
    """

    def __init__(self, spec: TaskSpec, setting: Setting, module: Any) -> None:
        super().__init__(spec, setting, module)
        module.encoder.requires_grad_(False)
        self.critic = Critic(module.config.latent_channels).to(setting.device)
        self.module = nn.ModuleDict({"autoencoder": module, "critic": self.critic})

    def _score(self, decoded: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], generator: Generator) -> Tensor:
        first, second, pixels, weight, latents = decoded
        seams = objectives.lattice(first, pixels) + objectives.lattice(second, pixels)
        score = objectives.reconstruction(first, second, pixels, weight, latents, generator)
        return score + objectives.LATTICE_WEIGHT * seams

    def loss(self, generator: Generator) -> Tensor:
        """See :class:`busigen.training.trainer.Task`; the sum of what the decoder and what the critic lose."""
        decoded = self._decoded(self.train, generator)
        first, _, pixels, weight, latents = decoded
        ours, critics = self.critic.contest(first * weight, pixels * weight, latents)
        return self._score(decoded, generator) + objectives.CRITIC_WEIGHT * ours + critics

    def validate(self) -> float:
        """Mean loss of fixed held-out crops, without the critic's part: its scores mean another thing every step."""
        return mean_loss(lambda g: self._score(self._decoded(self.held_out, g), g))
