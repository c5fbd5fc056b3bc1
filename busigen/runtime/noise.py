"""Noise as a pure function of (seed, index, attempt, stream): no state, no order, no batch.

Philox is counter-based (Salmon et al. 2011), and NumPy guarantees its raw stream across versions, which it does not for
``Generator.normal``; so the step from bits to normals (Box and Muller 1958) is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

STREAMS = ("healthy", "prior", "mask", "lesion", "blend", "speckle", "prior speckle", "asked", "frame")
"""Named streams of one draw. A stream's position is part of its key, so new ones are appended."""


def raw_bits(seed: int, index: int, attempt: int, stream: str, count: int) -> NDArray[np.uint64]:
    """``count`` random 64-bit words.

    Args:
        seed: 0 to 2^64 - 1.
        index: the sample's index.
        attempt: draws refused for this index before.
        stream: a name in ``STREAMS``.
        count: number of words.

    Raises:
        ValueError: the stream is unknown.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream is {stream!r}, must be one of: {', '.join(STREAMS)}")
    philox = np.random.Philox(
        key=np.array([seed, index], dtype=np.uint64),
        counter=np.array([0, 0, attempt, STREAMS.index(stream)], dtype=np.uint64),
    )
    bits: NDArray[np.uint64] = philox.random_raw(count)
    return bits


def uniform(seed: int, index: int, attempt: int, stream: str) -> float:
    """One number in [0, 1)."""
    return uniforms(seed, index, attempt, stream, 1)[0]


def uniforms(seed: int, index: int, attempt: int, stream: str, count: int) -> list[float]:
    """``count`` numbers in [0, 1); the first is that of :func:`uniform`."""
    return [float(word) * 2.0**-53 for word in raw_bits(seed, index, attempt, stream, count) >> np.uint64(11)]


def normal(seed: int, index: int, attempt: int, stream: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Standard normal noise of ``shape``, float32."""
    size = int(np.prod(shape))
    pairs = -(-size // 2)
    bits = raw_bits(seed, index, attempt, stream, 2 * pairs) >> np.uint64(11)
    # Half a step above zero, so that the logarithm below is finite.
    unit = (bits.astype(np.float64) + 0.5) * 2.0**-53
    radius, angle = np.sqrt(-2.0 * np.log(unit[:pairs])), 2.0 * np.pi * unit[pairs:]
    values = np.concatenate((radius * np.cos(angle), radius * np.sin(angle)))
    return values[:size].reshape(tuple(shape)).astype(np.float32)
