"""All networks, built from a preset as diffusers ``ModelMixin``s, which are saved as config.json and safetensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
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

from busigen import registry
from busigen.registry import Preset
from busigen.solver import TIME_SCALE
from busigen.training.networks.autoencoder import Autoencoder, SpeckleDecoder
from busigen.training.networks.outline import COUNT, OutlineSpace, OutlineSpread
from busigen.training.networks.variance import Spectrum, Wavelets

MASKED = -1e4  # Attention bias of a dropped token: far below any logit, and finite in fp16.


def keep_bias(keep: Tensor) -> Tensor:
    """``keep`` ``(B, N)``, 0 for dropped tokens and else 1, as an attention bias ``(B, 1, N)``."""
    return ((1.0 - keep) * MASKED)[:, None, :]


class ContextEncoder(ModelMixin, ConfigMixin):
    """Vision Transformer over the whole image; a bias drops patches, so that graphs have static shapes."""

    @register_to_config
    def __init__(self, resolution: int, patch: int, dim: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, dim, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, (resolution // patch) ** 2, dim) * 0.02)
        self.blocks = _transformer(dim, layers, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, image: Tensor, keep: Tensor) -> Tensor:
        """Encode images ``(B, 1, 256, 256)`` in [-1, 1] to tokens ``(B, N, D)``.

        ``keep`` is ``(B, N)``, 0 for dropped patches, whose tokens hold nothing of their pixels, and else 1.
        """
        tokens = self.embed(image).flatten(2).transpose(1, 2) * keep[..., None] + self.position
        bias = keep_bias(keep)
        for block in self.blocks:
            tokens = block(tokens, attention_mask=bias)
        return self.norm(tokens)


class MaskedAutoencoder(nn.Module):
    """The context encoder with a light decoder that serves to pre-train it (He et al. 2022, MAE)."""

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
        """The pixels of all patches, ``(B, N, patch * patch)``, predicted from the kept ones."""
        seen = keep[..., None]
        tokens = self.encoder(image, keep) * seen + self.hole * (1.0 - seen) + self.position
        for block in self.blocks:
            tokens = block(tokens)
        return self.head(tokens)


CONTEXT_SIDE = 8  # Side of the grid to which stage 1's context is averaged: 256 tokens would cost more than the rest.
DROPOUT = 0.1  # In training only. A thousand outlines are few: without it, held-out loss rises after a thousand steps.


class OutlineTransformer(ModelMixin, ConfigMixin):
    """Stage 1's denoiser: tokens of a code attend to each other and to the image's context tokens.

    It is called as diffusers' UNets are. A code's attributes are one token, its components one for each ``group``.
    """

    @register_to_config
    def __init__(
        self, coefficients: int, grid: int, group: int, dim: int, layers: int, heads: int, cross_attention_dim: int
    ) -> None:
        super().__init__()
        self.space = OutlineSpace(coefficients, grid)
        self.spectrum = OutlineSpread(self.length)
        self.sizes = [COUNT, *(min(group, coefficients - k) for k in range(0, coefficients, group))]
        self.read = nn.ModuleList(nn.Linear(size, dim) for size in self.sizes)
        self.write = nn.ModuleList(nn.Linear(dim, size) for size in self.sizes)
        for parameter in self.write.parameters():
            nn.init.zeros_(parameter)
        self.position = nn.Parameter(torch.randn(1, len(self.sizes), dim) * 0.02)
        self.context_position = nn.Parameter(torch.randn(1, CONTEXT_SIDE**2, cross_attention_dim) * 0.02)
        self.time = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.class_embedding = nn.Embedding(len(registry.CLASSES), dim)
        self.asked = nn.Linear(registry.ASKED_LENGTH, dim)
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
        """The velocity of noisy codes, which are joined to :meth:`OutlineSpace.condition` in ``sample``.

        ``timestep`` ``(B,)`` lies in [0, 1000]; the context tokens ``(B, N, cross_attention_dim)`` form a square grid;
        the mask ``(B, N)`` is 0 for dropped ones and else 1.
        """
        code, asked = sample.split([self.length, registry.ASKED_LENGTH], dim=1)
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
        # Standardised codes are nearly normal, and the best velocity of normal ones is known: the network learns the
        # difference (preconditioning, Karras et al. 2022, section 5).
        t = timestep[:, None].to(code.dtype) / TIME_SCALE
        normal = (2.0 * t - 1.0) / ((1.0 - t) ** 2 + t**2)
        return Transformer2DModelOutput(sample=normal * code + torch.cat(output, dim=1))


def _pooled(tokens: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """A square grid of tokens, averaged to ``CONTEXT_SIDE`` a side over the kept ones."""
    side = round(tokens.shape[1] ** 0.5)
    factor = side // CONTEXT_SIDE
    if factor == 1:
        return tokens, keep
    seen = F.avg_pool2d(keep.view(-1, 1, side, side), factor)
    grid = (tokens * keep[..., None]).transpose(1, 2).reshape(-1, tokens.shape[2], side, side)
    mean = F.avg_pool2d(grid, factor) / seen.clamp(min=1e-6)
    return mean.flatten(2).transpose(1, 2), (seen > 0).to(keep).flatten(1)


class PriorUNet(UNet2DConditionModel):
    """The healthy prior's denoiser, with the spread of each spatial frequency."""

    # diffusers reads from the parent's signature what a configuration may hold.
    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spectrum = Spectrum(self.config.out_channels, self.config.sample_size)


class WindowUNet(UNet2DConditionModel):
    """The denoiser of stage 2 or 3, with the spread of each scale of detail."""

    @wraps(UNet2DConditionModel.__init__)  # type: ignore[misc]
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        cells = [side // registry.LATENT_FACTOR for side in registry.BUCKETS]
        self.spectrum = Wavelets(self.config.out_channels, cells)


def _transformer(dim: int, layers: int, heads: int, **options: Any) -> nn.ModuleList:
    return nn.ModuleList(
        BasicTransformerBlock(dim, heads, dim // heads, activation_fn="gelu", attention_bias=True, **options)
        for _ in range(layers)
    )


def build(component: str, preset: Preset) -> ModelMixin:
    """Build a component with fresh weights, by name; a KeyError for an unknown one.

    ``decoder`` is that of Stable Diffusion's latents; that of the preset's own is in ``autoencoder``.
    """
    if component == "autoencoder":
        return Autoencoder(
            latent_channels=preset.latent_channels,
            encoder_channels=preset.encoder_channels,
            encoder_layers=preset.encoder_layers,
            decoder_channels=preset.decoder_channels,
            decoder_layers=preset.decoder_layers,
        )
    if component == "decoder":
        return SpeckleDecoder(registry.PAINTED_CHANNELS, preset.decoder_channels, preset.decoder_layers)
    if component == "context":
        layers, heads = preset.context_layers, preset.context_heads
        return ContextEncoder(registry.RESOLUTION, preset.patch, preset.context_dim, layers, heads)
    if component == "mask":
        return OutlineTransformer(**asdict(preset.outline), cross_attention_dim=preset.context_dim)
    shape, latents = preset.denoisers[component], preset.latent_channels
    model = model_class(component)(
        sample_size=registry.RESOLUTION // registry.LATENT_FACTOR,
        in_channels=latents + registry.SCANNERS + _own_channels(component, latents),
        out_channels=latents,
        block_out_channels=shape.channels,
        layers_per_block=shape.layers,
        down_block_types=tuple("CrossAttnDownBlock2D" if used else "DownBlock2D" for used in shape.attention),
        up_block_types=tuple("CrossAttnUpBlock2D" if used else "UpBlock2D" for used in reversed(shape.attention)),
        cross_attention_dim=preset.context_dim,
        # Diffusers takes the number of heads under this name (huggingface/diffusers issue 2011).
        attention_head_dim=tuple(max(1, channels // shape.head_dim) for channels in shape.channels),
        norm_num_groups=shape.groups,
        num_class_embeds=len(registry.CLASSES),
    )
    model.spectrum.assume(registry.SOLVER_SPREAD[component])
    return model


def model_class(component: str) -> type[ModelMixin]:
    """The class to load a saved component with."""
    special = {
        "autoencoder": Autoencoder,
        "decoder": SpeckleDecoder,
        "context": ContextEncoder,
        "mask": OutlineTransformer,
        "prior": PriorUNet,
    }
    return special.get(component, WindowUNet)


def mask_condition(mask: Tensor) -> Tensor:
    """Masks ``(B, 1, S, S)`` in [0, 1] as area shares of 2 x 2 grid points a cell, ``(B, 4, S/8, S/8)``."""
    return F.pixel_unshuffle(F.avg_pool2d(mask, registry.LATENT_FACTOR // 2), 2)


def _own_channels(component: str, latents: int) -> int:
    """Channels that a denoiser of pixels reads beside noisy latents and the scanner.

    Stages 2 and 3 read known latents, the mask and the region to paint; the prior each cell's place.
    """
    return registry.PLACE_CHANNELS if component == "prior" else latents + registry.MASK_CHANNELS + 1


def lacks_scanners(component: str, config: Mapping[str, Any]) -> bool:
    """Whether a denoiser of that configuration is of an earlier version, which reads no scanner."""
    latents = config.get("out_channels")
    if component not in ("prior", "lesion", "blend") or not isinstance(latents, int):
        return False
    return config.get("in_channels") == latents + _own_channels(component, latents)


def widened(weight: Tensor, latents: int) -> Tensor:
    """The first weight of a denoiser that :func:`lacks_scanners`, with zeros for these."""
    none = weight.new_zeros(weight.shape[0], registry.SCANNERS, *weight.shape[2:])
    return torch.cat((weight[:, :latents], none, weight[:, latents:]), dim=1)


def tell_scanners(model: Any) -> None:
    """Let a denoiser that :func:`lacks_scanners` read them, with no effect yet."""
    before, latents = model.conv_in, model.config.out_channels
    channels = before.in_channels + registry.SCANNERS
    model.conv_in = nn.Conv2d(channels, before.out_channels, before.kernel_size, padding=before.padding)
    model.conv_in.load_state_dict({"weight": widened(before.weight.detach(), latents), "bias": before.bias.detach()})
    model.register_to_config(in_channels=channels)


def scanner_condition(latents: Tensor, scanner: Tensor) -> Tensor:
    """Scanners ``(B, SCANNERS)``, 1 for the image's own, for each cell of latents ``(B, C, s, s)``."""
    return latents[:, :1] * 0.0 + scanner[:, :, None, None]  # A constant would have a fixed size in the exported graph.


def place_condition(latents: Tensor, frame: Tensor) -> Tensor:
    """Row and column of each cell of latents ``(B, C, s, s)`` in its image's frame, ``(B, 2, s, s)``, from -1 to 1.

    Skin lies on top and sound fades with depth, which convolutions would have to count cells to know (CoordConv, Liu et
    al. 2018). ``frame`` is ``(B, 4)``: top, left, height and width in pixels; depth ends with it, as images darken.
    """
    centres = (torch.arange(latents.shape[-1], device=latents.device) + 0.5) * registry.LATENT_FACTOR
    rows, columns = (2.0 * (centres - frame[:, axis, None]) / frame[:, axis + 2, None] - 1.0 for axis in (0, 1))
    # A constant would have a fixed batch in the exported graph.
    zero = latents[:, :1] * 0.0
    return torch.cat((zero + rows[:, None, :, None], zero + columns[:, None, None, :]), dim=1)


def region_condition(region: Tensor) -> Tensor:
    """Regions ``(B, 1, S, S)`` by cell, ``(B, 1, S/8, S/8)``: 1 if any pixel of the cell may be painted."""
    return F.max_pool2d(region, registry.LATENT_FACTOR)
