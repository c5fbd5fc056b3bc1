"""Stage 1: the transformer that denoises outline codes (:mod:`busigen.training.outline_space`).

Diffusion in so few numbers trains in minutes, and its outlines hang together.
"""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor, nn
from torch.nn import functional as F

from busigen.registry import ASKED_LENGTH, CLASSES, Preset
from busigen.solver import TIME_SCALE
from busigen.training.attention import keep_bias
from busigen.training.outline_space import COUNT, OutlineSpace
from busigen.training.outline_spread import OutlineSpread

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
        self.write = nn.ModuleList(_silent(nn.Linear(dim, size)) for size in self.sizes)
        self.position = nn.Parameter(torch.randn(1, len(self.sizes), dim) * 0.02)
        self.context_position = nn.Parameter(torch.randn(1, CONTEXT_SIDE**2, cross_attention_dim) * 0.02)
        self.time = Timesteps(dim, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(dim, dim)
        self.class_embedding = nn.Embedding(len(CLASSES), dim)
        self.asked = nn.Linear(ASKED_LENGTH, dim)
        self.shifts = nn.ModuleList(nn.Linear(dim, dim) for _ in range(layers))
        self.blocks = nn.ModuleList(
            BasicTransformerBlock(
                dim,
                heads,
                dim // heads,
                dropout=DROPOUT,
                cross_attention_dim=cross_attention_dim,
                activation_fn="gelu",
                attention_bias=True,
            )
            for _ in range(layers)
        )
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


def _silent(layer: nn.Linear) -> nn.Linear:
    """A layer that says nothing until it is trained."""
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


def outline_transformer(preset: Preset) -> OutlineTransformer:
    """Stage 1 with fresh weights and an unfitted basis."""
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
