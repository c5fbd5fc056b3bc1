"""The task that gives Stable Diffusion's latents a decoder that draws speckle from noise."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image
from torch import Generator, Tensor, nn
from torch.nn import functional as F

from busigen.registry import LATENT_FACTOR
from busigen.training.examples import window_examples
from busigen.training.networks.autoencoder import Critic
from busigen.training.networks.inference import Decoder
from busigen.training.recipe import TaskSpec
from busigen.training.tasks import Buckets, Task, TaskContext, grid, nothing_to_train_on, to_pictures
from busigen.training.tasks.autoencoder import Decoded, DecoderTask
from busigen.training.tasks.denoiser import WindowTask


class SpeckleTask(DecoderTask):
    """A decoder for the latents of Stable Diffusion's encoder, which is not changed, and for the windows of its stages.

    What it draws is judged at a window's own grid, however large the window is shown. It is told the mask.
    """

    def __init__(self, spec: TaskSpec, context: TaskContext, module: Any) -> None:
        Task.__init__(self, spec, context)
        networks = context.networks
        if spec.start is None and networks.prior_decoder is not None:
            # Speckle is drawn alike, whatever the latents: only what reads these is new.
            known = networks.prior_decoder.network.state_dict()
            module.load_state_dict({k: v for k, v in known.items() if not k.startswith("conv_in.")}, strict=False)
        self.decoder = Decoder(module, networks.latents_mean, networks.latents_std).to(context.device)
        self.critic = Critic(networks.channels).to(context.device)
        self.module = nn.ModuleDict({"decoder": module, "critic": self.critic})

    def _data(self, split: str) -> Buckets:
        found = self.context.examples(WindowTask.examples, split, self.spec.variants, window_examples)
        if not found and split == "train":
            raise nothing_to_train_on(self.spec)
        return found or self._data("train")

    def _decoded(self, data: Any, generator: Generator) -> Decoded:
        counts = torch.tensor([float(len(part)) for part in data.values()])
        side = list(data)[int(torch.multinomial(counts, 1, generator=generator))]
        cells = data[side].tensors["clean"].shape[-1]
        factor = LATENT_FACTOR * cells // side
        size = max(2, self.spec.batch // factor)
        batch = data[side].batch(torch.randint(len(data[side]), (size,), generator=generator), self.device)
        # The same place in all of them, from the corner of a cell of a window that is shown as large as it is.
        wide = factor * self.crop // LATENT_FACTOR
        top, left = (factor * int(torch.randint((cells - wide) // factor + 1, (1,), generator=generator)) for _ in "yx")
        seen = (..., slice(top, top + wide), slice(left, left + wide))
        y, x = (LATENT_FACTOR * place // factor for place in (top, left))
        cut = (..., slice(y, y + self.crop), slice(x, x + self.crop))
        latents, pixels, mask = batch["clean"][seen], batch["pixels"][cut] / 127.5 - 1.0, batch["lesion"][cut]

        def decoder(noisy: Tensor, noise: Tensor) -> Tensor:
            return self.decoder.drawn(noisy, noise, torch.cat((mask, mask)))

        weight = F.interpolate(batch["weight"][seen], size=self.crop)
        return *self._twice(latents, pixels, generator, decoder), pixels, weight, latents

    def sheet(self) -> Image.Image:
        """Held-out windows above what is drawn of their latents."""
        part = self.held_out[min(self.held_out)]
        batch = part.batch(torch.linspace(0, len(part) - 1, 8).long(), self.device)
        noise = torch.randn(batch["pixels"].shape, generator=Generator().manual_seed(1)).to(self.device)
        drawn = self.decoder(batch["clean"], noise, batch["lesion"])
        return grid([to_pictures(batch["pixels"] / 127.5 - 1.0), to_pictures(drawn)])
