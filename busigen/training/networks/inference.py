"""The trained networks behind one interface: their inputs, normalised latents and each stage's sampler.

Exported graphs must reproduce it (:mod:`busigen.export.parity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin
from torch import Tensor, nn

from busigen.registry import CLASSES, SOLVER_STEPS, SPECKLE_GAIN, Preset
from busigen.solver import TIME_SCALE, SolverStep, solver_steps
from busigen.training.networks.build import mask_condition, place_condition, region_condition


class _Half(nn.Module):
    """An encoder or decoder, with the mean and deviation of every latent channel."""

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("latents_mean", mean.view(1, -1, 1, 1))
        self.register_buffer("latents_std", std.view(1, -1, 1, 1))


class Encoder(_Half):
    """Pixels to normalised latents."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode ``(B, 1, S, S)`` in [-1, 1] to ``(B, C, S/8, S/8)`` of zero mean and unit variance."""
        return (self.network(pixels) - self.latents_mean) / self.latents_std


class Decoder(_Half):
    """Normalised latents, the speckle's white noise and a mask to pixels in [-1, 1]."""

    def forward(self, latents: Tensor, noise: Tensor, mask: Tensor | None = None) -> Tensor:
        """Decode ``(B, C, S/8, S/8)`` latents with standard normal noise and the lesion's mask, ``(B, 1, S, S)``."""
        raw = latents * self.latents_std + self.latents_mean
        return self.network(raw, SPECKLE_GAIN * noise, mask).clamp(-1.0, 1.0)


class Velocity(nn.Module):
    """A denoiser as a function of ``(x, t, label, tokens, keep, *condition)``, whose value is shaped like ``x``."""

    def __init__(self, unet: ModelMixin) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, label: Tensor, tokens: Tensor, keep: Tensor, *condition: Tensor) -> Tensor:
        """The velocity; ``t`` is ``(B,)`` in [0, 1], ``label`` ``(B,)`` int64, ``condition`` adds channels."""
        sample = torch.cat((x, *condition), dim=1) if condition else x
        return self.unet(sample, t * TIME_SCALE, tokens, class_labels=label, encoder_attention_mask=keep).sample

    def follow(self, x: Tensor, velocity: Tensor, step: SolverStep, *condition: Tensor) -> Tensor:
        """Take one solver step with the denoiser's spread."""
        t, s = (torch.full((1,), time, dtype=x.dtype, device=x.device) for time in (step.t, step.s))
        moved: Tensor = self.unet.spectrum(x, velocity, t, s, *condition)
        return moved


def window_condition(known: Tensor, mask: Tensor, region: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The condition of stages 2 and 3, of latents ``(B, C, s, s)``, and mask and region ``(B, 1, S, S)``."""
    return known, mask_condition(mask), region_condition(region)


def blend_input(known: Tensor, painted: Tensor, edit: Tensor, ring: Tensor) -> Tensor:
    """Stage 3's known latents: painted ones in the edit region, the image's outside, and zero in the ring."""
    return (known * (1.0 - edit) + painted * edit) * (1.0 - ring)


@torch.no_grad()
def integrate(
    velocity: Velocity,
    noise: Tensor,
    label: Tensor,
    tokens: Tensor,
    keep: Tensor,
    steps: Sequence[SolverStep],
    *condition: Tensor,
) -> Tensor:
    """Run the few-step solver from ``noise``, exactly as exported graphs do."""
    x = noise
    for step in steps:
        t = torch.full((x.shape[0],), step.t, dtype=x.dtype, device=x.device)
        x = velocity.follow(x, velocity(x, t, label, tokens, keep, *condition), step, *condition)
    return x


@dataclass
class Networks:
    """The networks of a checkpoint, in evaluation mode, with each stage's sampler.

    ``denoisers`` go by stage, or by ``<stage>-<class>`` with merged adapters; ``steps`` are evaluations per stage.
    """

    preset: Preset
    autoencoder: ModelMixin
    latents_mean: Tensor
    latents_std: Tensor
    context: ModelMixin | None = None
    denoisers: dict[str, ModelMixin] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=lambda: dict(SOLVER_STEPS))

    def __post_init__(self) -> None:
        """Wrap encoder and decoder."""
        self.encoder = Encoder(self.autoencoder.encoder, self.latents_mean, self.latents_std).eval()
        self.decoder = Decoder(self.autoencoder.decoder, self.latents_mean, self.latents_std).eval()

    @property
    def device(self) -> torch.device:
        """The device of all networks."""
        return self.latents_mean.device

    @torch.no_grad()
    def tokens(self, image: Tensor, keep: Tensor) -> Tensor:
        """Context tokens of images ``(B, 1, 256, 256)``."""
        assert self.context is not None
        return self.context.eval()(image, keep)

    def sample(
        self, name: str, noise: Tensor, label: str, tokens: Tensor, keep: Tensor, *condition: Tensor, steps: int = 0
    ) -> Tensor:
        """Sample a denoiser for one class, in ``steps`` or ``self.steps``; a KeyError if there is none."""
        labels = torch.full((noise.shape[0],), CLASSES.index(label), device=noise.device)
        velocity = Velocity(self.denoiser(name, label)).eval()
        table = solver_steps(name, steps or self.steps[name])
        return integrate(velocity, noise, labels, tokens, keep, table, *condition)

    def denoiser(self, name: str, label: str) -> ModelMixin:
        """The class's own denoiser of a stage, or the base's; a KeyError if there is neither."""
        own = f"{name}-{label}"
        return self.denoisers[own if own in self.denoisers else name]

    @torch.no_grad()
    def outline(self, noise: Tensor, label: str, tokens: Tensor, keep: Tensor, asked: Tensor) -> Tensor:
        """Sample stage 1 from ``noise`` ``(B, D)``: :meth:`busigen.training.networks.outline.OutlineSpace.distance`."""
        space = self.denoiser("mask", label).space
        code = self.sample("mask", noise, label, tokens, keep, space.condition(asked))
        return space.distance(code, asked)

    def background(self, noise: Tensor, frame: Tensor) -> Tensor:
        """Sample the healthy prior from ``noise`` ``(B, C, s, s)``; ``frame`` is as for :func:`place_condition`."""
        return self.sample("prior", noise, "normal", *self.no_context(len(noise)), place_condition(noise, frame))

    def no_context(self, batch: int) -> tuple[Tensor, Tensor]:
        """The empty token that the prior attends to, and its ``keep``."""
        tokens = torch.zeros(batch, 1, self.preset.context_dim, device=self.device)
        return tokens, torch.ones(batch, 1, device=self.device)
