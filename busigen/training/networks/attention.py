"""What the transformers' attention is told about dropped tokens."""

from __future__ import annotations

from torch import Tensor

MASKED = -1e4
"""Attention bias of a dropped token: far below any logit, yet finite in fp16."""


def keep_bias(keep: Tensor) -> Tensor:
    """``keep`` ``(B, N)``, 1 for tokens to see and 0 for dropped ones, as an attention bias ``(B, 1, N)``."""
    return ((1.0 - keep) * MASKED)[:, None, :]
