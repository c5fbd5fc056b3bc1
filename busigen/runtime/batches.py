"""How many rows an engine call has: what the sampler asks for is what engines are built for."""

from __future__ import annotations

from busigen.registry import BUCKETS

MIN_BATCH = 2
"""Rows that every engine call has at least: ONNX Runtime adds up a batch of one in another order than a larger one's
rows, and the bytes of a sample must not depend on the batch size."""


DEFAULT_BATCH = 16
"""Images per engine call where nobody says otherwise."""


def rows_per_call(side: int, batch_size: int) -> int:
    """Rows of a full call on windows of ``side`` pixels: ``batch_size`` at the smallest, fewer of the larger ones."""
    return max(MIN_BATCH, batch_size * BUCKETS[0] ** 2 // side**2)
