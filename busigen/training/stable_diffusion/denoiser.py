"""Stable Diffusion's UNet as the velocity network that stages 2 and 3 are sampled with.

Stable Diffusion noises latents as ``alpha x_0 + sigma noise`` with ``alpha^2 + sigma^2 = 1`` and predicts the noise
(Ho et al. 2020). Divided by ``alpha + sigma`` these are points of the straight path ``(1 - t) x_0 + t noise`` at
``t = sigma / (alpha + sigma)``, with ``noise - x_0`` as the velocity. Euler's step is DDIM's (Song et al. 2021).
"""

from __future__ import annotations

from itertools import pairwise

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn

from busigen.registry import BUCKETS, LATENT_FACTOR, MASK_CHANNELS
from busigen.solver import TIME_SCALE, SolverStep
from busigen.training.networks.variance import Wavelets
from busigen.training.stable_diffusion.base_model import LATENT_CHANNELS


def times_of(alphas: Tensor) -> Tensor:
    """The straight path's time of each step of a noise schedule, ``(1000,)``, rising, from its cumulative products."""
    signal, noise = alphas.sqrt(), (1.0 - alphas).sqrt()
    return noise / (signal + noise)


def ddim_steps(alphas: Tensor, count: int, *, offset: int = 1) -> list[SolverStep]:
    """DDIM's ``count`` steps with ``timestep_spacing="leading"``, ``steps_offset`` and ``set_alpha_to_one=False``."""
    times = times_of(alphas.double())
    numbers = [k * (len(times) // count) + offset for k in reversed(range(count))]
    return [SolverStep(t, s) for t, s in pairwise([*times[numbers].tolist(), float(times[0])])]


class WidenedConv(nn.Module):
    """A convolution that reads further channels, with weights of zero to begin with."""

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.conv = conv
        self.more = nn.Conv2d(channels, conv.out_channels, 3, padding=1, bias=False)
        nn.init.zeros_(self.more.weight)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C + channels, s, s)`` to ``(B, C', s, s)``."""
        first, more = x.split([self.conv.in_channels, self.more.in_channels], dim=1)
        return self.conv(first) + self.more(more)


class StableDiffusionDenoiser(nn.Module):
    """A UNet for inpainting, called as the other denoisers are (`busigen.training.networks.inference.Velocity`).

    Args:
        unet: 9 input channels in diffusers' order: latents 4, region 1, latents of the image without the region 4.
        prompts: what the UNet attends to for each class, ``(classes, 77, D)``.
        alphas: cumulative products of the noise schedule, ``(1000,)``.
        context_dim: length of context tokens, projected to ``D`` and attended to behind the prompt, as Wen et al. 2026
            do with their Vision Transformer's; None to leave them out.
        guidance: factor on what a prompt changes (Ho and Salimans 2022), evaluated in a doubled batch; None for none.
        unconditional: ``(1, 77, D)``, of the empty prompt; needed with ``guidance``.
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
    ) -> None:
        super().__init__()
        if guidance is not None and unconditional is None:
            raise ValueError("guidance needs the tokens of the empty prompt")
        if not isinstance(unet.conv_in, WidenedConv):
            unet.conv_in = WidenedConv(unet.conv_in, MASK_CHANNELS)
        self.unet, self.guidance = unet, guidance
        self.register_buffer("prompts", prompts)
        self.register_buffer("times", times_of(alphas).float())
        self.register_buffer("unconditional", torch.zeros_like(prompts[:1]) if unconditional is None else unconditional)
        self.context = None if context_dim is None else nn.Linear(context_dim, prompts.shape[2])
        self.spectrum = Wavelets(LATENT_CHANNELS, [side // LATENT_FACTOR for side in BUCKETS])
        self.spectrum.assume(0.0)

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Transformer2DModelOutput:
        """Predict the velocity.

        ``sample`` holds noisy and known latents, the lesion's mask and the region, ``(B, 4 + 4 + 4 + 1, s, s)``;
        ``timestep`` a thousand times the straight path's, clamped to the noise schedule's; the rest are context tokens
        ``(B, N, context_dim)``, classes ``(B,)`` and which tokens to see ``(B, N)``.
        """
        x, known, outline, region = sample.split([LATENT_CHANNELS, LATENT_CHANNELS, MASK_CHANNELS, 1], dim=1)
        t = (timestep / TIME_SCALE).clamp(float(self.times[0]), float(self.times[-1]))
        scale = (1.0 / torch.sqrt((1.0 - t) ** 2 + t**2))[:, None, None, None]
        read = torch.cat((x * scale, region, known, outline), dim=1)
        number = self._number(t)
        tokens, keep = self._attended(self.prompts[class_labels], encoder_hidden_states, encoder_attention_mask)
        if self.guidance is None:
            noise = self.unet(read, number, tokens, encoder_attention_mask=keep).sample
        else:
            blank = self.unconditional.expand(x.shape[0], -1, -1)
            without, _ = self._attended(blank, encoder_hidden_states, encoder_attention_mask)
            both = self.unet(
                torch.cat((read, read)),
                torch.cat((number, number)),
                torch.cat((without, tokens)),
                encoder_attention_mask=None if keep is None else torch.cat((keep, keep)),
            ).sample
            plain, prompted = both.chunk(2)
            noise = plain + self.guidance * (prompted - plain)
        return Transformer2DModelOutput(sample=(noise - x) / (1.0 - t)[:, None, None, None])

    def _attended(self, prompt: Tensor, context: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """The prompt's tokens, with the projected context behind them, and which of them to see."""
        if self.context is None:
            return prompt, None
        tokens = torch.cat((prompt, self.context(context)), dim=1)
        return tokens, torch.cat((torch.ones_like(prompt[:, :, 0]), keep), dim=1)

    def _number(self, t: Tensor) -> Tensor:
        """The place of times ``(B,)`` in the noise schedule, between two of its steps where they lie between."""
        below = (self.times[None] <= t[:, None]).sum(dim=1).clamp(1, len(self.times) - 1) - 1
        low, high = self.times[below], self.times[below + 1]
        return below + (t - low) / (high - low)
