"""How a task's arithmetic is done on a device: half precision where it is faster, and the attention that suits it."""

from __future__ import annotations

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import nn


def half_is_faster(device: torch.device) -> bool:
    """Whether bf16 pays: on a card, and on processors that multiply in it, by matrix tiles (AMX) or vectors.

    Elsewhere it is emulated and slower.
    """
    if device.type == "cuda":
        return True
    return device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def mixed_precision(device: torch.device) -> torch.autocast:
    """The context that a loss is computed in: bf16 where that is faster, the weights staying fp32."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=half_is_faster(device))


def suit_attention(module: nn.Module, device: torch.device) -> None:
    """Let attention be plain matrix products where bf16 runs on a processor.

    The backward pass of PyTorch's fused attention does not use the tiles there: a step of stage 2 took 0.41 s with it
    and 0.31 s without (one core, batch of 32 windows). What is computed is the same.
    """
    if device.type == "cpu" and half_is_faster(device):
        for part in module.modules():
            if isinstance(part, Attention):
                part.set_processor(AttnProcessor())
