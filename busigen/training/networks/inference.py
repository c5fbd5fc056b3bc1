"""The trained networks behind one interface: their inputs, normalised latents and each stage's sampler.

Exported graphs must reproduce it (:mod:`busigen.export.parity`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.registry import (
    CLASSES,
    LATENT_FACTOR,
    LESION_CLASSES,
    PAINTING,
    SCANNERS,
    SOLVER_STEPS,
    SPECKLE_GAIN,
    STARTED_STEPS,
    Preset,
)
from busigen.solver import TIME_SCALE, SolverStep, solver_steps
from busigen.training.networks.build import (
    mask_condition,
    place_condition,
    region_condition,
    scanner_condition,
)

ADAPTERS = tuple(f"{stage}-{label}" for stage, label in product(PAINTING, LESION_CLASSES))
"""What one Stable Diffusion has a LoRA for, in the order in which it is told which to use."""


class _Half(nn.Module):
    """An encoder or decoder, with the mean and deviation of every latent channel.

    ``shown_at`` is the side in pixels at which the network sees windows of any size; None for their own.
    """

    latents_mean: Tensor
    latents_std: Tensor

    def __init__(self, network: nn.Module, mean: Tensor, std: Tensor, shown_at: int | None = None) -> None:
        super().__init__()
        self.network, self.shown_at = network, shown_at
        self.register_buffer("latents_mean", mean.view(1, -1, 1, 1))
        self.register_buffer("latents_std", std.view(1, -1, 1, 1))


class Encoder(_Half):
    """Pixels to normalised latents."""

    def forward(self, pixels: Tensor) -> Tensor:
        """Encode ``(B, 1, S, S)`` in [-1, 1] to ``(B, C, S/8, S/8)`` of zero mean and unit variance."""
        if self.shown_at not in (None, pixels.shape[-1]):
            size = (self.shown_at, self.shown_at)
            pixels = F.interpolate(pixels, size=size, mode="bilinear", align_corners=False)
        return (self.network(pixels) - self.latents_mean) / self.latents_std


class Decoder(_Half):
    """Normalised latents, the speckle's white noise and a mask to pixels in [-1, 1]."""

    def forward(
        self, latents: Tensor, noise: Tensor, mask: Tensor | None = None, scanner: Tensor | None = None
    ) -> Tensor:
        """Decode ``(B, C, S/8, S/8)`` latents with standard normal noise and the lesion's mask, ``(B, 1, S, S)``.

        ``scanner`` ``(B, SCANNERS)`` is 1 for the image's own; without, it is any.
        """
        return self.drawn(latents, noise, mask, scanner, SPECKLE_GAIN).clamp(-1.0, 1.0)

    def drawn(
        self,
        latents: Tensor,
        noise: Tensor,
        mask: Tensor | None = None,
        scanner: Tensor | None = None,
        gain: float = 1.0,
    ) -> Tensor:
        """What the network draws of a window or a crop of one, as in training: the noise times a ``gain``, unclipped.

        Where the latents show it larger than the ``noise`` is, every pixel's noise and mask are repeated, and the mean
        over its repetitions is the pixel.
        """
        raw, noise = latents * self.latents_std + self.latents_mean, gain * noise
        factor = LATENT_FACTOR * latents.shape[-1] // noise.shape[-1]
        told = () if scanner is None else (scanner,)
        if factor == 1:
            return self.network(raw, noise, mask, *told)
        mask = None if mask is None else F.interpolate(mask, scale_factor=factor)
        return F.avg_pool2d(self.network(raw, F.interpolate(noise, scale_factor=factor), mask, *told), factor)


class Velocity(nn.Module):
    """A denoiser as a function of ``(x, t, label, tokens, keep, *condition)``, whose value is shaped like ``x``."""

    unet: Any  # A module; its own attributes are not typed.

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    @property
    def is_stable_diffusion(self) -> bool:
        """Whether ``x`` is scaled as Stable Diffusion's, and steps and adapters are its own."""
        return hasattr(self.unet, "solver_steps")

    @property
    def times(self) -> tuple[float, float]:
        """The least and the greatest time that the denoiser knows."""
        known = self.unet.times if self.is_stable_diffusion else (0.0, 1.0)
        return float(known[0]), float(known[-1])

    def steps(self, name: str, count: int, start: float = 1.0) -> list[SolverStep]:
        """The solver's ``count`` steps for the denoiser of that stage; ``start`` is not for Stable Diffusion."""
        return self.unet.solver_steps(count) if self.is_stable_diffusion else solver_steps(name, count, start)

    def state(self, x: Tensor, t: Tensor) -> Tensor:
        """Points of the straight path at times ``(B,)``, as the denoiser reads them."""
        return self.unet.state(x, t) if self.is_stable_diffusion else x

    def forward(self, x: Tensor, t: Tensor, label: Tensor, tokens: Tensor, keep: Tensor, *condition: Tensor) -> Tensor:
        """The velocity; ``t`` is ``(B,)`` in [0, 1], ``condition`` adds channels.

        ``label`` is ``(B,)`` int64, or the share of each of Stable Diffusion's adapters, ``(B, A)``.
        """
        sample = torch.cat((x, *condition), dim=1) if condition else x
        return self.unet(sample, t * TIME_SCALE, tokens, class_labels=label, encoder_attention_mask=keep).sample

    def follow(
        self, x: Tensor, velocity: Tensor, step: SolverStep, *condition: Tensor, fresh: Tensor | None = None
    ) -> Tensor:
        """Take one solver step with the denoiser's spread, or Stable Diffusion's with ``fresh`` noise."""
        t, s = (torch.full((1,), time, dtype=x.dtype, device=x.device) for time in (step.t, step.s))
        further = (fresh,) if self.is_stable_diffusion else condition
        return self.unet.spectrum(x, velocity, t, s, *further)


def window_condition(known: Tensor, mask: Tensor, region: Tensor, scanner: Tensor | None = None) -> tuple[Tensor, ...]:
    """The condition of stages 2 and 3, of latents ``(B, C, s, s)``, and mask and region ``(B, 1, S, S)``.

    It begins with that of the ``scanner`` ``(B, SCANNERS)``, which Stable Diffusion does not read.
    """
    side = known.shape[-1] * LATENT_FACTOR
    told = () if scanner is None else (scanner_condition(known, scanner),)
    return *told, known, mask_condition(shown(mask, side)), region_condition(shown(region, side))


def shown(region: Tensor, side: int) -> Tensor:
    """Regions ``(B, 1, S, S)`` at the side at which their windows are shown, a multiple of theirs."""
    return region if region.shape[-1] == side else F.interpolate(region, scale_factor=side // region.shape[-1])


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
    fresh: Tensor | None = None,
) -> Tensor:
    """Run the few-step solver from ``noise``, exactly as exported graphs do; ``fresh`` is ``(B, K, ...)``."""
    x = noise
    for number, step in enumerate(steps):
        t = torch.full((x.shape[0],), step.t, dtype=x.dtype, device=x.device)
        drawn = None if fresh is None else fresh[:, number]
        x = velocity.follow(x, velocity(x, t, label, tokens, keep, *condition), step, *condition, fresh=drawn)
    return x


@dataclass
class Networks:
    """The networks of a checkpoint, in evaluation mode, with each stage's sampler.

    ``denoisers`` go by stage, or by ``<stage>-<class>`` with merged adapters; Stable Diffusion stands under all of
    `ADAPTERS`. ``steps`` are evaluations per stage; ``shown_at`` is `_Half`'s; ``prior_decoder`` draws backgrounds,
    where the prior's latents are others than the stages'. With ``prior_start``, the prior starts at that
    time, from phantoms. ``scanners`` are those that they know by name, in the order of their condition.
    """

    preset: Preset
    autoencoder: Any  # Modules, whose own attributes are not typed.
    latents_mean: Tensor
    latents_std: Tensor
    context: nn.Module | None = None
    denoisers: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=lambda: dict(SOLVER_STEPS))
    shown_at: int | None = None
    prior_decoder: Decoder | None = None
    prior_start: float | None = None
    scanners: Sequence[str] = ()

    def __post_init__(self) -> None:
        """Wrap encoder and decoder."""
        statistics = (self.latents_mean, self.latents_std, self.shown_at)
        self.encoder = Encoder(self.autoencoder.encoder, *statistics).eval()
        self.decoder = Decoder(self.autoencoder.decoder, *statistics).eval()

    def start_prior(self, time: float) -> None:
        """Let the prior start at a time from phantoms, with fewer evaluations."""
        self.prior_start, self.steps["prior"] = time, STARTED_STEPS

    @property
    def channels(self) -> int:
        """Channels of the windows' latents."""
        return len(self.latents_mean)

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
        self,
        name: str,
        noise: Tensor,
        label: str,
        tokens: Tensor,
        keep: Tensor,
        *condition: Tensor,
        steps: int = 0,
        fresh: Tensor | None = None,
    ) -> Tensor:
        """Sample a denoiser for one class, in ``steps`` or ``self.steps``; a KeyError if there is none."""
        velocity = Velocity(self.denoiser(name, label)).eval()
        labels = torch.full((noise.shape[0],), CLASSES.index(label), device=noise.device)
        if velocity.is_stable_diffusion:
            labels = F.one_hot(torch.full_like(labels, ADAPTERS.index(f"{name}-{label}")), len(ADAPTERS))
        start = self.prior_start if name == "prior" and self.prior_start is not None else 1.0
        table = velocity.steps(name, steps or self.steps[name], start)
        return integrate(velocity, noise, labels, tokens, keep, table, *condition, fresh=fresh)

    def denoiser(self, name: str, label: str) -> Any:
        """The class's own denoiser of a stage, or the base's; a KeyError if there is neither."""
        own = f"{name}-{label}"
        return self.denoisers[own if own in self.denoisers else name]

    @torch.no_grad()
    def outline(self, noise: Tensor, label: str, tokens: Tensor, keep: Tensor, asked: Tensor) -> Tensor:
        """Sample stage 1 from ``noise`` ``(B, D)``: :meth:`busigen.training.networks.outline.OutlineSpace.distance`."""
        space = self.denoiser("mask", label).space
        code = self.sample("mask", noise, label, tokens, keep, space.condition(asked))
        return space.distance(code, asked)

    def background(
        self, noise: Tensor, frame: Tensor, start: Tensor | None = None, scanner: Tensor | None = None
    ) -> Tensor:
        """Sample the healthy prior from ``noise`` ``(B, C, s, s)``; ``frame`` is as for :func:`place_condition`.

        ``start`` are the latents, shaped alike, that become images with ``prior_start``; ``scanner`` ``(B, SCANNERS)``
        is 1 for the image's own, and without, it is any.
        """
        if self.prior_start is not None:
            assert start is not None
            noise = self.prior_start * noise + (1.0 - self.prior_start) * start
        scanner = self.any_scanner(len(noise)) if scanner is None else scanner
        condition = scanner_condition(noise, scanner), place_condition(noise, frame)
        return self.sample("prior", noise, "normal", *self.no_context(len(noise)), *condition)

    def window_condition(
        self, known: Tensor, mask: Tensor, region: Tensor, scanner: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """:func:`window_condition` as these networks read it; without a ``scanner``, that is any."""
        if self.shown_at is not None:
            return window_condition(known, mask, region)
        return window_condition(known, mask, region, self.any_scanner(len(known)) if scanner is None else scanner)

    def any_scanner(self, batch: int) -> Tensor:
        """The condition of images of any scanner."""
        return torch.zeros(batch, SCANNERS, device=self.device)

    def no_context(self, batch: int) -> tuple[Tensor, Tensor]:
        """The empty token that the prior attends to, and its ``keep``."""
        tokens = torch.zeros(batch, 1, self.preset.context_dim, device=self.device)
        return tokens, torch.ones(batch, 1, device=self.device)
