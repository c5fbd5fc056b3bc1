"""The kinds of task that a recipe can name: each owns its data, loss, validation and sheet, the trainer the rest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor, nn

from busigen.registry import BUCKETS, CLASSES, SOLVER_STEPS
from busigen.solver import solver_steps
from busigen.training import losses
from busigen.training.examples import Frames, WindowExamples, background_examples, to_tensor
from busigen.training.fitting import fit_styles
from busigen.training.networks.build import MaskedAutoencoder, place_condition
from busigen.training.networks.inference import integrate
from busigen.training.recipe import TaskSpec
from busigen.training.tasks import base as sheets
from busigen.training.tasks.autoencoder import AutoencoderTask, DecoderTask, FinishTask
from busigen.training.tasks.base import PixelTask, TaskContext, random_frames
from busigen.training.tasks.denoiser import DenoiserTask, WindowTask
from busigen.training.tasks.outline import MaskTask
from busigen.training.trainer import Task


class ContextTask(PixelTask):
    """Masked-autoencoder pre-training of the context encoder on all images."""

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        super().__init__(spec, setting)
        self.module = self.network = MaskedAutoencoder(module).to(setting.device)

    def _batch(self, frames: Frames, size: int, generator: Generator) -> tuple[Tensor, Tensor]:
        side = 256 // self.network.patch
        images, keeps = [], []
        for frame, rng in random_frames(frames, size, generator):
            keep = np.ones((side, side), dtype=np.float32)
            # Blocks, because that is how edit regions drop patches; scattered ones on top make the task hard enough.
            for _ in range(2):
                y, x = rng.integers(0, side, 2)
                keep[y : y + rng.integers(side // 4, side // 2 + 1), x : x + rng.integers(side // 4, side // 2 + 1)] = 0
            keep[rng.random((side, side)) < 0.4] = 0
            images.append(to_tensor(frame.image))
            keeps.append(torch.from_numpy(keep.ravel()))
        return torch.stack(images).to(self.device), torch.stack(keeps).to(self.device)

    def _loss(self, frames: Frames, generator: Generator) -> Tensor:
        images, keep = self._batch(frames, self.spec.batch, generator)
        return losses.masked_patches(self.network(images, keep).float(), images, keep, self.network.patch)

    def sheet(self) -> Image.Image:
        """Images, what is kept of them, and what is predicted."""
        images, keep = self._batch(self.held_out, 6, Generator().manual_seed(1))
        output = self.network(images, keep).transpose(1, 2)
        patch = self.network.patch
        full = nn.functional.fold(output, 256, patch, stride=patch)
        seen = nn.functional.interpolate(keep.view(-1, 1, 256 // patch, 256 // patch), scale_factor=patch)
        return sheets.grid([[sheets.to_picture(p) for p in row] for row in (images, images * seen, full)])


class BackgroundTask(DenoiserTask):
    """The healthy prior: whole healthy images out of noise."""

    examples = "backgrounds"

    def __init__(self, spec: TaskSpec, setting: TaskContext, module: Any) -> None:
        super().__init__(spec, setting, module)
        module.spectrum.fit(torch.cat([part.tensors["clean"] for part in self.train.values()]))

    def _encode(self, frames: Frames, options: dict[str, Any]) -> dict[int, WindowExamples]:
        assert self.setting.healed is not None
        tensors = background_examples(frames, self.setting.healed, **options)
        count = tensors["clean"].shape[0]
        tokens, keep = self.setting.networks.no_context(1)
        tensors["tokens"], tensors["keep"] = tokens.repeat(count, 1, 1), keep.repeat(count, 1)
        tensors["label"] = torch.full((count,), CLASSES.index("normal"))
        return {BUCKETS[0]: WindowExamples(tensors)}

    def _condition(self, batch: dict[str, Tensor], generator: Generator) -> tuple[Tensor, ...]:
        return (place_condition(batch["clean"], batch["frame"]),)

    def findings(self) -> dict[str, Any]:
        """The styles that drawn images lack (:mod:`busigen.noise_styles`)."""
        clean, places = (torch.cat([part.tensors[name] for part in self.train.values()]) for name in ("clean", "frame"))
        chosen = places[torch.randperm(len(places), generator=Generator().manual_seed(self.setting.seed))]
        steps = solver_steps("prior", SOLVER_STEPS["prior"])

        def draw(noise: Tensor) -> Tensor:
            parts = []
            for x, frame in zip(noise.split(16), chosen.split(16), strict=False):
                x, frame = x.to(self.device), frame.to(self.device)
                label = torch.full((len(x),), CLASSES.index("normal"), device=self.device)
                context = self.setting.networks.no_context(len(x), self.device)
                parts.append(integrate(self.velocity, x, label, *context, steps, place_condition(x, frame)).cpu())
            return torch.cat(parts)

        return {"styles": fit_styles(self.module.spectrum, clean, draw, self.setting.seed)}

    def sheet(self) -> Image.Image:
        """Held-out backgrounds (through the autoencoder) above sampled ones."""
        batch, latents = self._sampled(6)
        decode = self._decoder()
        return sheets.grid([[sheets.to_picture(p) for p in decode(z)] for z in (batch["clean"], latents)])


KINDS: dict[str, Callable[[TaskSpec, TaskContext, Any], Task]] = {
    "autoencoder": AutoencoderTask,
    "decoder": DecoderTask,
    "context": ContextTask,
    "window": WindowTask,
    "mask": MaskTask,
    "background": BackgroundTask,
    "finish": FinishTask,
}
"""Task classes by the kind that a recipe names. An adapter uses the class of its stage's base task."""
