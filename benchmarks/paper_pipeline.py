"""A lesion into a healthy image with diffusers, as a script after the paper does it: whole images, 50 guided steps.

The networks are busigen's, so the scheduler is diffusers' own for flow matching. Classifier-free guidance evaluates
every step twice: with the class and the image's tokens, and with neither.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from numpy.typing import NDArray
from torch import Tensor, nn

from busigen.data.geometry import Mask, edit_region, largest_component, paste, patches_outside, ring_region, window_for
from busigen.registry import (
    ASKED_LENGTH,
    CLASSES,
    LATENT_FACTOR,
    LESION_CLASSES,
    RESOLUTION,
    SCANNERS,
    SOLVER_SHIFT,
    STAGES,
)
from busigen.solver import TIME_SCALE
from busigen.training.networks.build import region_condition
from busigen.training.networks.inference import Networks, Velocity, blend_input, window_condition

NORMAL = CLASSES.index("normal")
"""The class of the evaluation that guidance leads away from."""

Pair = tuple[NDArray[np.uint8], Mask]


class PaperPipeline(DiffusionPipeline):
    """Outline, lesion and blend stage of one class, one after the other."""

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        context: ModelMixin,
        mask: ModelMixin,
        lesion: ModelMixin,
        blend: ModelMixin,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(
            encoder=encoder,
            decoder=decoder,
            context=context,
            mask=mask,
            lesion=lesion,
            blend=blend,
            scheduler=scheduler,
        )

    @torch.no_grad()
    def __call__(
        self,
        healthy: Sequence[NDArray[np.uint8]],
        label: str,
        generator: torch.Generator,
        num_inference_steps: int = 50,
        guidance_scale: float = 7.5,
        side: int = RESOLUTION,
    ) -> list[Pair]:
        """Paint a lesion into each of ``(256, 256)`` images; ``side`` pixels around it are worked on."""
        batch, steps = len(healthy), (label, generator, num_inference_steps, guidance_scale)
        pixels = _unit(healthy)
        keep = torch.ones(batch, self.context.position.shape[1])
        asked = torch.zeros(batch, ASKED_LENGTH)
        tokens = self.context(pixels, keep)
        code = self._denoise(
            self.mask, (batch, self.mask.length), tokens, keep, steps, self.mask.space.condition(asked)
        )
        distance = self.mask.space.distance(code, asked)[:, 0] > 0
        masks = [_usable(largest_component(outline)) for outline in distance.numpy()]

        edits = [edit_region(mask, np.ones_like(mask)) for mask in masks]
        windows = [window_for(edit, (side,)) for edit in edits]

        def cut(arrays: Sequence[Mask]) -> Tensor:
            parts = [array[window.slices] for array, window in zip(arrays, windows, strict=True)]
            return torch.from_numpy(np.stack(parts)[:, None]).float()

        keep = torch.from_numpy(np.stack([patches_outside(edit, self.context.config.patch) for edit in edits])).float()
        tokens = self.context(pixels, keep)
        edit, ring, mask = cut(edits), cut([ring_region(edit) for edit in edits]), cut(masks)
        emptied = [np.where(edit, 127.5, image) for edit, image in zip(edits, healthy, strict=True)]
        known = self.encoder(cut(_unit(emptied)[:, 0].numpy()))
        anything = torch.zeros(batch, SCANNERS)
        shape = (batch, known.shape[1], side // LATENT_FACTOR, side // LATENT_FACTOR)
        painted = self._denoise(self.lesion, shape, tokens, keep, steps, *window_condition(known, mask, edit, anything))
        seen = blend_input(known, painted, region_condition(edit), region_condition(ring))
        blended = self._denoise(self.blend, shape, tokens, keep, steps, *window_condition(seen, mask, ring, anything))
        inside = (region_condition(edit) - region_condition(ring)) > 0
        latents = torch.where(inside, painted, blended)
        new = self.decoder(latents, torch.randn((batch, 1, side, side), generator=generator), mask).numpy()
        return [
            (paste(image, part[0], region, window), outline)
            for image, part, region, window, outline in zip(healthy, new, edits, windows, masks, strict=True)
        ]

    def _denoise(
        self,
        network: ModelMixin,
        shape: Sequence[int],
        tokens: Tensor,
        keep: Tensor,
        steps: tuple[str, torch.Generator, int, float],
        *condition: Tensor,
    ) -> Tensor:
        label, generator, count, guidance = steps
        velocity = Velocity(network)
        x = torch.randn(shape, generator=generator)
        batch = len(x)
        labels = torch.tensor([NORMAL] * batch + [CLASSES.index(label)] * batch)
        tokens, keep = torch.cat((torch.zeros_like(tokens), tokens)), torch.cat((torch.ones_like(keep), keep))
        condition = tuple(torch.cat((part, part)) for part in condition)
        self.scheduler.set_timesteps(count)
        for t in self.scheduler.timesteps:
            now = (t / TIME_SCALE).expand(2 * batch)
            without, towards = velocity(torch.cat((x, x)), now, labels, tokens, keep, *condition).chunk(2)
            x = self.scheduler.step(without + guidance * (towards - without), t, x, return_dict=False)[0]
        return x


def pipelines(networks: Networks) -> dict[str, PaperPipeline]:
    """A pipeline per lesion class, as every class has its own fine-tuned stages."""
    found = {}
    for label in LESION_CLASSES:
        stages = {stage: networks.denoiser(stage, label).eval() for stage in STAGES}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=SOLVER_SHIFT["lesion"])
        assert networks.context is not None
        found[label] = PaperPipeline(
            networks.encoder, networks.decoder, networks.context, **stages, scheduler=scheduler
        )
        found[label].set_progress_bar_config(disable=True)
    return found


def _unit(images: Sequence[NDArray[np.generic]]) -> Tensor:
    return torch.from_numpy(np.stack(images).astype(np.float32) / 127.5 - 1.0)[:, None]


def _usable(outline: Mask) -> Mask:
    """The outline, or an ellipse where guidance left none or an absurd one: a pair's cost does not depend on it."""
    if 0.0 < outline.mean() < 0.5:
        return outline
    rows, columns = np.ogrid[:RESOLUTION, :RESOLUTION]
    mask: Mask = ((rows - 110) / 22) ** 2 + ((columns - 128) / 32) ** 2 <= 1.0
    return mask
