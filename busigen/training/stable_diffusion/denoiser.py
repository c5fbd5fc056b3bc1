"""Stable Diffusion's UNet as the denoiser of stages 2 and 3, with an adapter for each stage and class.

Stable Diffusion noises latents as ``alpha x_0 + sigma noise`` with ``alpha^2 + sigma^2 = 1`` and predicts the noise
(Ho et al. 2020). Divided by ``alpha + sigma`` these are points of the straight path ``(1 - t) x_0 + t noise`` at
``t = sigma / (alpha + sigma)``, with ``noise - x_0`` as the velocity. Euler's step is DDIM's (Song et al. 2021).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.registry import MASK_CHANNELS, PAINTED_CHANNELS
from busigen.solver import TIME_SCALE, SolverStep
from busigen.training.stable_diffusion.lora import Layer

FEW = 20  # Below this number of steps, the first is the noisiest that Stable Diffusion knows (Lin et al. 2024).


def times_of(alphas: Tensor) -> Tensor:
    """The straight path's time of each step of a noise schedule, ``(1000,)``, rising, from its cumulative products."""
    signal, noise = alphas.sqrt(), (1.0 - alphas).sqrt()
    return noise / (signal + noise)


def ddim_steps(times: Tensor, count: int) -> list[SolverStep]:
    """DDIM's ``count`` steps on the ``times`` of a noise schedule, the last one to its least noise.

    As diffusers' ``timestep_spacing`` has them: "leading" with an offset of 1, "trailing" where they are ``FEW``.
    """
    known = len(times)
    if count < FEW:
        numbers = [round(known - k * known / count) - 1 for k in range(count)]
    else:
        numbers = [k * (known // count) + 1 for k in reversed(range(count))]
    found = times.double()[numbers].tolist()
    return [SolverStep(t, s) for t, s in pairwise([*found, float(times[0])])]


def _scale(t: Tensor) -> Tensor:
    """``sqrt((1 - t)^2 + t^2)``: Stable Diffusion's noisy latents times this lie on the straight path."""
    return torch.sqrt((1.0 - t) ** 2 + t**2)


class DdimStep(nn.Module):
    """A solver step on Stable Diffusion's noisy latents.

    ``fresh_noise`` is the share, 0 to 1, of the noise that a step draws anew: 0 is DDIM, 1 what latent consistency
    models take (Luo et al. 2023); between them lie DDIM's eta and the steps of TCD (Zheng et al. 2024).
    """

    def __init__(self, fresh_noise: float = 0.0) -> None:
        super().__init__()
        self.fresh_noise = fresh_noise

    def forward(self, x: Tensor, velocity: Tensor, t: Tensor, s: Tensor, fresh: Tensor | None = None) -> Tensor:
        """Noisy latents ``(B, 4, n, n)`` at time ``t``, ``(1,)``, taken to ``s`` below it; ``fresh`` is alike."""
        x = x * _scale(t)
        if fresh is None:
            return (x + (s - t) * velocity) / _scale(s)
        kept = math.sqrt(1.0 - self.fresh_noise**2)
        noise = kept * (x + (1.0 - t) * velocity) + self.fresh_noise * fresh
        return ((1.0 - s) * (x - t * velocity) + s * noise) / _scale(s)


class LoraStack(nn.Module):
    """The LoRAs of several adapters for one layer, of which each row of a batch has its share.

    ``layers`` holds each adapter's, or None for one that leaves the layer alone.
    """

    owner: Tensor

    def __init__(self, layers: Sequence[Layer | None]) -> None:
        super().__init__()
        present = [(number, layer) for number, layer in enumerate(layers) if layer is not None]
        owner = torch.zeros(len(layers), sum(layer.down.shape[0] for _, layer in present))
        start = 0
        for number, layer in present:
            owner[number, start : start + layer.down.shape[0]] = 1.0
            start += layer.down.shape[0]
        self.register_buffer("owner", owner)
        self.down = nn.Parameter(torch.cat([layer.down.float() for _, layer in present]), requires_grad=False)
        up = torch.cat([layer.scale * layer.up.float() for _, layer in present], dim=1)
        self.up = nn.Parameter(up, requires_grad=False)

    def forward(self, layer: nn.Module, x: Tensor, adapter: Tensor) -> Tensor:
        """What the adapters add to a linear layer's or a convolution's output; ``adapter`` is ``(B, A)``."""
        share = adapter @ self.owner
        if isinstance(layer, nn.Conv2d):
            inner = F.conv2d(x, self.down.view(-1, *layer.weight.shape[1:]), None, layer.stride, layer.padding)
            return F.conv2d(inner * share[:, :, None, None], self.up.view(*self.up.shape[:2], 1, 1))
        inner = F.linear(x, self.down) * share.view(share.shape[0], *[1] * (x.dim() - 2), -1)
        return F.linear(inner, self.up)


@dataclass
class _Now:
    """What the layers' hooks read of the evaluation that is going on."""

    adapter: Tensor | None = None
    outline: Tensor | None = None


@dataclass
class _AddLora:
    """Adds a stack's output to its layer's; a class, because a closure would keep the stack of a copied network."""

    stack: LoraStack
    now: _Now

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        assert self.now.adapter is not None
        return output + self.stack(layer, inputs[0], self.now.adapter)


@dataclass
class _AddOutline:
    """Adds what the outline says to the UNet's first layer: further input channels, which begin with zero weights."""

    conv: nn.Conv2d
    now: _Now

    def __call__(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + self.conv(self.now.outline)


class StableDiffusionDenoiser(nn.Module):
    """A UNet for inpainting, called as the other denoisers are (`busigen.training.networks.inference.Velocity`).

    In place of classes it reads the share of each adapter, ``(B, A)``, one of which is 1 and the others 0. Classes,
    ``(B,)``, stand for the only adapter that there is.

    Args:
        unet: 9 input channels in diffusers' order: latents 4, region 1, latents of the image without the region 4.
        prompts: what the UNet attends to with each adapter, ``(A, 77, D)``.
        alphas: cumulative products of the noise schedule, ``(1000,)``.
        context_dim: length of context tokens, projected to ``D`` and attended to behind the prompt, as Wen et al. 2026
            do with their Vision Transformer's; None to leave them out.
        guidance: factor on what a prompt changes (Ho and Salimans 2022), evaluated in a doubled batch; None for none.
        unconditional: ``(1, 77, D)``, of the empty prompt; needed with ``guidance``.
        fresh_noise: see `DdimStep`.
    """

    prompts: Tensor
    times: Tensor
    unconditional: Tensor

    def __init__(
        self,
        unet: UNet2DConditionModel,
        prompts: Tensor,
        alphas: Tensor,
        *,
        context_dim: int | None = None,
        guidance: float | None = None,
        unconditional: Tensor | None = None,
        fresh_noise: float = 0.0,
    ) -> None:
        super().__init__()
        if guidance is not None and unconditional is None:
            raise ValueError("guidance needs the tokens of the empty prompt")
        adapters, _, width = prompts.shape
        self.unet, self.guidance, self._now = unet, guidance, _Now()
        self.register_buffer("prompts", prompts)
        self.register_buffer("times", times_of(alphas.double()).float())
        self._range = float(self.times[0]), float(self.times[-1])
        self.register_buffer("unconditional", torch.zeros_like(prompts[:1]) if unconditional is None else unconditional)
        first = unet.conv_in
        self.outline = nn.Conv2d(adapters * MASK_CHANNELS, first.out_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.outline.weight)
        first.register_forward_hook(_AddOutline(self.outline, self._now))
        self.context: nn.Linear | None = None
        if context_dim is not None:
            # One projection and one bias for each adapter, the bias as a further input that is always 1.
            self.context = nn.Linear(adapters * (context_dim + 1), width, bias=False)
            nn.init.normal_(self.context.weight, std=0.02)
        self.loras = nn.ModuleDict()
        self.spectrum = DdimStep(fresh_noise)

    def add_loras(self, adapters: Sequence[dict[str, Layer]]) -> None:
        """Attach the LoRAs of all adapters, in their order, by the UNet's layers' names."""
        modules = dict(self.unet.named_modules())
        for name in sorted(set().union(*adapters)):
            stack = LoraStack([layers.get(name) for layers in adapters])
            self.loras[name.replace(".", "/")] = stack
            modules[name].register_forward_hook(_AddLora(stack, self._now))

    def solver_steps(self, count: int) -> list[SolverStep]:
        """DDIM's steps; where noise is drawn anew, the last one ends without any."""
        steps = ddim_steps(self.times, count)
        return [*steps[:-1], SolverStep(steps[-1].t, 0.0)] if self.spectrum.fresh_noise else steps

    @staticmethod
    def state(x: Tensor, t: Tensor) -> Tensor:
        """A point of the straight path at times ``(B,)`` as Stable Diffusion's noisy latents."""
        return x / _scale(t)[:, None, None, None]

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Transformer2DModelOutput:
        """Predict the velocity of the straight path.

        ``sample`` holds noisy latents (`state`), known latents, the lesion's mask and the region, ``(B, 4 + 4 + 4 + 1,
        n, n)``; ``timestep`` a thousand times the straight path's, clamped to the noise schedule's; the rest are
        context tokens ``(B, N, context_dim)``, shares of the adapters ``(B, A)`` and which tokens to see ``(B, N)``.
        """
        x, known, outline, region = sample.split([PAINTED_CHANNELS, PAINTED_CHANNELS, MASK_CHANNELS, 1], dim=1)
        adapter = torch.ones_like(x[:, :1, 0, 0]) if class_labels.dim() == 1 else class_labels.to(x.dtype)
        t = (timestep / TIME_SCALE).clamp(*self._range)
        read, number = torch.cat((x, region, known), dim=1), self._number(t)
        outlines = (outline[:, None] * adapter[:, :, None, None, None]).flatten(1, 2)
        prompt = (adapter @ self.prompts.flatten(1)).view(adapter.shape[0], *self.prompts.shape[1:])
        tokens, keep = self._attended(prompt, encoder_hidden_states, adapter, encoder_attention_mask)
        if self.guidance is not None:
            blank = self.unconditional.expand(adapter.shape[0], -1, -1)
            without, _ = self._attended(blank, encoder_hidden_states, adapter, encoder_attention_mask)
            read, adapter, outlines = (torch.cat((part, part)) for part in (read, adapter, outlines))
            number = number[:1]  # The solver takes all rows at one time, which the UNet repeats.
            tokens, keep = torch.cat((without, tokens)), None if keep is None else torch.cat((keep, keep))
        self._now.adapter, self._now.outline = adapter, outlines
        noise = self.unet(read, number, tokens, encoder_attention_mask=keep).sample
        self._now.adapter = self._now.outline = None
        if self.guidance is not None:
            plain, prompted = noise[: x.shape[0]], noise[x.shape[0] :]
            noise = plain + self.guidance * (prompted - plain)
        wide = t[:, None, None, None]
        return Transformer2DModelOutput(sample=(noise - x * _scale(wide)) / (1.0 - wide))

    def _attended(self, prompt: Tensor, context: Tensor, adapter: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompt's tokens, with the projected context behind them, and which of them to see."""
        if self.context is None:
            return prompt, None
        given = torch.cat((context, torch.ones_like(context[:, :, :1])), dim=2)
        shared = (given[:, :, None] * adapter[:, None, :, None]).flatten(2)
        return torch.cat((prompt, self.context(shared)), dim=1), torch.cat((torch.ones_like(prompt[:, :, 0]), keep), 1)

    def _number(self, t: Tensor) -> Tensor:
        """The place of times ``(B,)`` in the noise schedule, between two of its steps where they lie between."""
        below = (self.times[None] <= t[:, None]).sum(dim=1).clamp(1, len(self.times) - 1) - 1
        low, high = self.times[below], self.times[below + 1]
        return below + (t - low) / (high - low)
