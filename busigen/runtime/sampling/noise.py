"""Noise as a pure function of (seed, index, attempt, stream): no state, no order, no batch.

Philox is counter-based (Salmon et al. 2011). NumPy guarantees its raw stream across versions, but not
``Generator.normal``; so the step from bits to normals (Box and Muller 1958) is ours.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

# A stream's position is part of its key, so new ones are appended.
STREAMS = (
    *("healthy", "prior", "mask", "lesion", "blend", "speckle", "prior speckle", "asked"),
    *("frame", "style", "transfer", "lesion fresh", "blend fresh", "jitter", "phantom", "phantom noise", "normals"),
    "scanner",
)

_PIECE = 1 << 12  # pairs of numbers that are computed at a time


def raw_bits(seed: int, index: int, attempt: int, stream: str, count: int, part: int = 0) -> NDArray[np.uint64]:
    """``count`` random 64-bit words of a seed (0 to 2^64 - 1), a sample's index and attempt, and one of ``STREAMS``.

    ``part`` parts what is drawn several times for one attempt: the outlines of a sample with several lesions.
    """
    if stream not in STREAMS:
        raise ValueError(f"stream is {stream!r}, must be one of: {', '.join(STREAMS)}")
    philox = np.random.Philox(
        key=np.array([seed, index], dtype=np.uint64),
        # The first word counts; the second would, after 2^64 steps of it.
        counter=np.array([0, part, attempt, STREAMS.index(stream)], dtype=np.uint64),
    )
    bits: NDArray[np.uint64] = philox.random_raw(count)
    return bits


def uniform(seed: int, index: int, attempt: int, stream: str) -> float:
    """One number in [0, 1)."""
    return uniforms(seed, index, attempt, stream, 1)[0]


def uniforms(seed: int, index: int, attempt: int, stream: str, count: int, part: int = 0) -> list[float]:
    """``count`` numbers in [0, 1); the first is that of :func:`uniform`."""
    return [float(word) * 2.0**-53 for word in raw_bits(seed, index, attempt, stream, count, part) >> np.uint64(11)]


def normal(
    seed: int, index: int, attempt: int, stream: str, shape: Sequence[int], part: int = 0
) -> NDArray[np.float32]:
    """Standard normal noise of ``shape``, float32."""
    size = int(np.prod(shape))
    pairs = -(-size // 2)
    bits = raw_bits(seed, index, attempt, stream, 2 * pairs, part)
    values = np.empty(2 * pairs, dtype=np.float32)
    # Pieces that fit in the processor's cache, worked on in place, take two thirds of the time.
    for first in range(0, pairs, _PIECE):
        piece = slice(first, min(first + _PIECE, pairs))
        radius, angle = _unit(bits[:pairs][piece]), _unit(bits[pairs:][piece])
        np.log(radius, out=radius)
        radius *= -2.0
        np.sqrt(radius, out=radius)
        angle *= 2.0 * np.pi
        values[:pairs][piece] = radius * np.cos(angle)
        values[pairs:][piece] = radius * np.sin(angle)
    return values[:size].reshape(tuple(shape))


def sums(seed: int, index: int, attempt: int, stream: str, shape: Sequence[int]) -> NDArray[np.float32]:
    """Numbers ``shape`` of mean 0 and variance 1, float32, each the sum of two uniform ones of 16 bits.

    Where many are added up, as in textures and speckle, they do for normal ones, and take a fifth of the time.
    """
    size = int(np.prod(shape))
    halves = raw_bits(seed, index, attempt, stream, -(-size // 2)).astype("<u8", copy=False).view("<u2")
    found = halves[0::2].astype(np.float32)
    found += halves[1::2]
    found -= 65535.0
    found /= np.float32(((2.0**32 - 1.0) / 6.0) ** 0.5)
    return found[:size].reshape(tuple(shape))


def _unit(words: NDArray[np.uint64]) -> NDArray[np.float64]:
    unit = (words >> np.uint64(11)).astype(np.float64)
    # Half a step above zero, so that the logarithm is finite.
    unit += 0.5
    unit *= 2.0**-53
    return unit
