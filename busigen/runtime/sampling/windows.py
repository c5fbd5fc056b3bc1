"""Images and windows of them as graphs read and give them: scaled, cut, shown, padded to a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Window

Floats = NDArray[np.float32]


def to_unit(pixels: NDArray[np.uint8]) -> Floats:
    """Grey levels to [-1, 1]."""
    return (pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)).astype(np.float32)


def to_grey(pixels: Floats) -> NDArray[np.uint8]:
    """[-1, 1] to grey levels."""
    grey: NDArray[np.uint8] = np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return grey


def cells_of(region: Floats, factor: int) -> NDArray[np.bool_]:
    """Latent cells, ``factor`` pixels wide, that a region ``(B, 1, S, S)`` touches, ``(B, 1, S/factor, S/factor)``."""
    batch, _, side, _ = region.shape
    cells = side // factor
    tiles = region.reshape(batch, 1, cells, factor, cells, factor)
    return np.asarray((tiles > 0).any(axis=(3, 5)))


def cut(arrays: Sequence[NDArray[Any]], windows: Sequence[Window]) -> Floats:
    """Windows of whole images as a batch, ``(B, 1, S, S)`` float32."""
    cuts = [array[window.slices] for array, window in zip(arrays, windows, strict=True)]
    return np.stack(cuts)[:, None].astype(np.float32)


def shown_at(side: int, windows: Floats) -> Floats:
    """Windows ``(B, 1, S, S)`` at a side that is a multiple of theirs, by repeated pixels."""
    times = side // windows.shape[-1]
    return windows.repeat(times, axis=2).repeat(times, axis=3)


def padded_to(array: NDArray[Any], size: int) -> NDArray[Any]:
    """An array with its last row repeated until it has ``size`` rows."""
    return np.concatenate((array, np.repeat(array[-1:], size - len(array), axis=0)))
