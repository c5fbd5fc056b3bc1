"""Every network, built from a preset. All are diffusers ``ModelMixin``s, so each saves as config.json + safetensors."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.registry import (
    ASKED_LENGTH,
    BUCKETS,
    CLASSES,
    LATENT_FACTOR,
    MASK_CHANNELS,
    PLACE_CHANNELS,
    RESOLUTION,
    SOLVER_SPREAD,
    Preset,
)
from busigen.solver import TIME_SCALE
from busigen.training.networks.autoencoder import Autoencoder
from busigen.training.networks.outline import COUNT, OutlineSpace, OutlineSpread
from busigen.training.networks.variance import Spectrum, Wavelets

MASKED = -1e4
"""Attention bias of a dropped token: far below any logit, yet finite in fp16."""


def keep_bias(keep: Tensor) -> Tensor:
    """``keep`` ``(B, N)``, 1 for tokens to see and 0 for dropped ones, as an attention bias ``(B, 1, N)``."""
    return ((1.0 - keep) * MASKED)[:, None, :]


class ContextEncoder(ModelMixin, ConfigMixin):
    """Vision Transformer over the whole image, with patches that can be dropped.

    Dropping works as an attention bias rather than by gathering, so that the exported graph keeps static shapes.
    """

    @register_to_config
    def __init__(self, resolution: int, patch: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (resolution // patch) ** 2, dim) * 0.02)
        self.blocks = _transformer(dim, layers, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, keep: Tensor) -> Tensor:
        """Encode images into tokens.

        Args:
            image: ``(B, 1, 256, 256)`` float in [-1, 1].
            keep: ``(B, N)`` float, 1 for patches to see and 0 for dropped ones.

        Returns:
            ``(B, N, D)`` tokens; those of dropped patches hold nothing of their pixels; readers mask them.
        """
        tokens = self.embed(image).flatten(2).transpose(1, 2) * keep[..., None] + self.position
        bias = keep_bias(keep)
        for block in self.blocks:
            tokens = block(tokens, attention_mask=bias)
        return self.norm(tokens)


class MaskedAutoencoder(nn.Module):
    """The context encoder with the light decoder that pre-trains it (He et al. 2022, MAE) and is thrown away."""

    def __init__(self, encoder: ContextEncoder) -> None:
        super().__init__()
        config = encoder.config
        self.encoder = encoder
        self.patch = config.patch
        self.hole = nn.Parameter(torch.zeros(1, 1, config.dim))
        self.position = nn.Parameter(torch.randn(1, (config.resolution // config.patch) ** 2, config.dim) * 0.02)
        self.blocks = _transformer(config.dim, 1, config.heads)
        self.head = nn.Linear(config.dim, config.patch**2)

    def forward(self, image: Tensor, keep: Tensor) -> Tensor:
        """Predict all patches' pixels, ``(B, N, patch * patch)``, from the kept ones."""
        seen = keep[..., None]
        tokens = self.encoder(image, keep) * seen + self.hole * (1.0 - seen) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens)


CONTEXT_SIDE = 8
"""Side of the grid of context tokens that stage 1 looks at; finer tokens are averaged to it, because where a lesion
goes is not decided by single patches, and reading 256 tokens would cost more than all the rest."""


DROPOUT = 0.1
"""In training only. A thousand outlines are few: without it, held-out loss rises after a thousand steps."""


class OutlineTransformer(ModelMixin, ConfigMixin):
    """Denoises codes: tokens of the code attend to each other and to the image's context tokens.

    Called as diffusers' UNets are. The code's attributes are one token and its components one per ``group``.
    """

    @register_to_config
    def __init__(
        self,
        coefficients: int,
        grid: int,
        group: int,
        dim: int,
        layers: int,
        heads: int,
        cross_attention_dim: int,
    ) -> None:
        super().__init__()
        self.space = OutlineSpace(coefficients, grid)
        self.spectrum = OutlineSpread(self.length)
        self.sizes = [COUNT, *(min(group, coefficients - k) for k in range(0, coefficients, group))]
        self.read = nn.ModuleList(nn.Linear(size, dim) for size in self.sizes)
        self.write = nn.ModuleList(_zeroed(nn.Linear(dim, size)) for size in self.sizes)
        self.position = nn.Parameter(torch.randn(1, len(self.sizes), dim) * 0.02)
        self.context_position = nn.Parameter(torch.randn(1, CONTEXT_SIDE**2, cross_attention_dim) * 0.02)
        self.time = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.class_embedding = nn.Embedding(len(CLASSES), dim)
        self.asked = nn.Linear(ASKED_LENGTH, dim)
        self.shifts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.blocks = _transformer(dim, layers, heads, dropout=DROPOUT, cross_attention_dim=cross_attention_dim)
        self.norm = nn.LayerNorm(dim)

    @property
    def length(self) -> int:
        """Numbers in a code."""
        return COUNT + self.space.coefficients

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        class_labels: Tensor,
        encoder_attention_mask: Tensor,
    ) -> Transformer2DModelOutput:
        """Predict the velocity.

        Args:
            sample: ``(B, length + ASKED_LENGTH)``: the noisy code and :meth:`OutlineSpace.condition`'s output.
            timestep: ``(B,)`` in [0, 1000].
            encoder_hidden_states: context tokens ``(B, N, cross_attention_dim)`` of a square grid of patches.
            class_labels: ``(B,)`` int64.
            encoder_attention_mask: ``(B, N)``, 1 for tokens to see.
        """
        code, asked = sample.split([self.length, ASKED_LENGTH], dim=1)
        tokens, keep = _pooled(encoder_hidden_states, encoder_attention_mask)
        tokens = tokens + self.context_position
        bias = keep_bias(keep)
        time = self.time_embedding(self.time(timestep).to(code.dtype))
        state = F.silu(time + self.class_embedding(class_labels) + self.asked(asked))
        parts = code.split(self.sizes, dim=1)
        hidden = torch.stack([read(part) for read, part in zip(self.read, parts, strict=True)], dim=1) + self.position
        for shift, block in zip(self.shifts, self.blocks, strict=True):
            hidden = hidden + shift(state)[:, None]
            hidden = block(hidden, encoder_hidden_states=tokens, encoder_attention_mask=bias)
        hidden = self.norm(hidden)
        output = [write(part[:, 0]) for write, part in zip(self.write, hidden.split(1, dim=1), strict=True)]
        # Standardised codes are nearly normal, and for normal ones the best velocity is known: the network adds to it
        # what makes them lesions (preconditioning, Karras et al. 2022, section 5).
        t = timestep[:, None].to(code.dtype) / TIME_SCALE
        normal = (2.0 * t - 1.0) / ((1.0 - t) ** 2 + t**2)
        return Transformer2DModelOutput(sample=normal * code + torch.cat(output, dim=1))


def _zeroed(layer: nn.Linear) -> nn.Linear:
    """A layer whose output is zero until it is trained."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _pooled(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Average a square grid of tokens to ``CONTEXT_SIDE`` a side, over the kept ones alone."""
    side = round(tokens.shape[1] ** 0.5)
    factor = side // CONTEXT_SIDE
    if factor == 1:
        return tokens, keep
    seen = F.avg_pool2d(keep.view(-1, 1, side, side), factor)
    grid = (tokens * keep[..., None]).transpose(1, 2).reshape(-1, tokens.shape[2], side, side)
    mean = F.avg_pool2d(grid, factor) / seen.clamp(min=1e-6)
    return mean.flatten(2).transpose(1, 2), (seen > 0).to(keep).flatten(1)


class PriorUNet(UNet2DConditionModel):
    """The healthy prior's denoiser, which knows how much images differ in each spatial frequency."""

    # With the parent's signature, from which diffusers reads what a configuration may hold.
    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spectrum = Spectrum(self.config.out_channels, self.config.sample_size)


class WindowUNet(UNet2DConditionModel):
    """The denoiser of stage 2 or 3, which knows how much of each size of detail it leaves open."""

    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sizes = [side // LATENT_FACTOR for side in BUCKETS]
        self.spectrum = Wavelets(self.config.out_channels, sizes)


def _transformer(dim: int, layers: int, heads: int, **options: Any) -> nn.ModuleList:
    return nn.ModuleList(
        BasicTransformerBlock(dim, heads, dim // heads, activation_fn="gelu", attention_bias=True, **options)
        for _ in range(layers)
    )


def _autoencoder(preset: Preset) -> Autoencoder:
    return Autoencoder(
        latent_channels=preset.latent_channels,
        encoder_channels=preset.encoder_channels,
        encoder_layers=preset.encoder_layers,
        decoder_channels=preset.decoder_channels,
        decoder_layers=preset.decoder_layers,
    )


def _context(preset: Preset) -> ContextEncoder:
    return ContextEncoder(
        resolution=RESOLUTION,
        patch=preset.patch,
        dim=preset.context_dim,
        layers=preset.context_layers,
        heads=preset.context_heads,
    )


def _outline(preset: Preset) -> OutlineTransformer:
    shape = preset.outline
    return OutlineTransformer(
        coefficients=shape.coefficients,
        grid=shape.grid,
        group=shape.group,
        dim=shape.dim,
        layers=shape.layers,
        heads=shape.heads,
        cross_attention_dim=preset.context_dim,
    )


def denoiser_channels(name: str, latent_channels: int) -> tuple[int, int]:
    """Input and output channels of a denoiser.

    Stages 2 and 3 read the noisy latents, the known latents, the lesion mask (2 x 2 grid points per cell) and the
    region to paint; the prior reads its noisy sample and where each cell lies.
    """
    if name == "prior":
        return latent_channels + PLACE_CHANNELS, latent_channels
    return 2 * latent_channels + MASK_CHANNELS + 1, latent_channels


def _denoiser(name: str, preset: Preset) -> UNet2DConditionModel:
    shape = preset.denoisers[name]
    channels_in, channels_out = denoiser_channels(name, preset.latent_channels)
    model = model_class(name)(
        sample_size=RESOLUTION // LATENT_FACTOR,
        in_channels=channels_in,
        out_channels=channels_out,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if used else "DownBlock2D" for used in shape.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if used else "UpBlock2D" for used in reversed(shape.attention)),
        cross_attention_dim=preset.context_dim,
        # Diffusers takes the number of heads under this name (huggingface/diffusers issue 2011).
        attention_head_dim=tuple(max(1, channels // shape.head_dim) for channels in shape.channels),
        norm_num_groups=shape.groups,
        num_class_embeds=len(CLASSES),
    )
    model.spectrum.assume(SOLVER_SPREAD[name])
    return model


def build(component: str, preset: Preset) -> ModelMixin:
    """Build a component with fresh weights: ``autoencoder``, ``context`` or a denoiser of the preset.

    Raises:
        KeyError: the preset has no such component.
    """
    special = {"autoencoder": _autoencoder, "context": _context, "mask": _outline}
    return special[component](preset) if component in special else _denoiser(component, preset)


def model_class(component: str) -> type[ModelMixin]:
    """The class to load a saved component with."""
    special = {"autoencoder": Autoencoder, "context": ContextEncoder, "mask": OutlineTransformer, "prior": PriorUNet}
    return special.get(component, WindowUNet)


def mask_condition(mask: Tensor) -> Tensor:
    """Window masks ``(B, 1, S, S)`` in [0, 1] as ``(B, 4, S/8, S/8)``: area shares, 2 x 2 grid points a cell."""
    return F.pixel_unshuffle(F.avg_pool2d(mask, LATENT_FACTOR // 2), 2)


def place_condition(latents: Tensor, frame: Tensor) -> Tensor:
    """Row and column of each cell within its image's frame, ``(B, 2, s, s)``: -1 at top and left, 1 at the other end.

    Skin lies on top and sound fades with depth, which convolutions alone would have to count cells to know
    (CoordConv, Liu et al. 2018). Depth counts from the top of the frame to its end, wherever the bars begin: images
    darken towards their own end, and cells beyond it are left out.

    Args:
        latents: ``(B, C, s, s)``, of whole images.
        frame: ``(B, 4)``, each image's top, left, height and width in pixels of the working image.
    """
    centres = (torch.arange(latents.shape[-1], device=latents.device) + 0.5) * LATENT_FACTOR
    rows, columns = (2.0 * (centres - frame[:, axis, None]) / frame[:, axis + 2, None] - 1.0 for axis in (0, 1))
    # Built on the input, because a constant would have a fixed batch in the exported graph.
    zero = latents[:, :1] * 0.0
    return torch.cat((zero + rows[:, None, :, None], zero + columns[:, None, None, :]), dim=1)


def region_condition(region: Tensor) -> Tensor:
    """Window regions ``(B, 1, S, S)`` as ``(B, 1, S/8, S/8)``: 1 where any pixel of the cell may be painted."""
    return F.max_pool2d(region, LATENT_FACTOR)
