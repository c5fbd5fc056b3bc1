"""One draw between stages, and the conversions from arrays to engine inputs and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from busigen.data.geometry import Mask, Window
from busigen.registry import ATTRIBUTES, LATENT_FACTOR, SYNTHETIC
from busigen.runtime.dataset.sample import Sample
from busigen.runtime.sampling import quality_gates
from busigen.runtime.sampling.conditions import measured
from busigen.runtime.sampling.healthy_images import Healthy

Floats = NDArray[np.float32]
BEGIN, OUTLINE, PAINT = range(3)


class Kind(NamedTuple):
    """The kind of a draw, by which batches form: its next stage, and its class and window side where they matter."""

    stage: int
    label: str = ""
    side: int = 0


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """A draw that was not begun yet. ``position`` counts the samples in the order in which they were requested."""

    index: int
    attempt: int
    position: int = 0

    @property
    def kind(self) -> Kind:
        """With which draws this one may share a batch."""
        return Kind(BEGIN)


@dataclass(frozen=True, kw_only=True)
class Draft(DrawRequest):
    """A draw that was begun; the stages fill its later fields one after the other."""

    label: str
    healthy: Healthy
    wanted: Mapping[str, float] = field(default_factory=dict)
    mask: Mask | None = None
    edit: Mask | None = None
    window: Window | None = None

    @property
    def kind(self) -> Kind:
        """With which draws this one may share a batch."""
        return Kind(PAINT, self.label, self.window.side) if self.window else Kind(OUTLINE, self.label)


def background_reason(draft: Draft) -> str | None:
    """Reason to refuse a synthetic background, or None; a user's images were judged when their folder was read."""
    if draft.healthy.row["background"] != SYNTHETIC:
        return None
    return quality_gates.background_reason(draft.healthy.pixels)


def mask_reason(draft: Draft, raw: Mask, mask: Mask) -> str | None:
    """Reason to refuse an outline, or None; see :mod:`busigen.runtime.sampling.quality_gates`."""
    valid = draft.healthy.valid
    return quality_gates.mask_reason(raw, mask, valid) or quality_gates.asked_reason(
        measured(mask, valid), draft.wanted
    )


def sample_of(draft: Draft, image: NDArray[np.uint8], birads: str | None) -> Sample:
    """The accepted sample of a draft that went through all stages."""
    assert draft.mask is not None and draft.edit is not None and draft.window is not None
    found = measured(draft.mask, draft.healthy.valid)
    row = {
        **draft.healthy.row,
        "window_top": draft.window.top,
        "window_left": draft.window.left,
        "window_side": draft.window.side,
        "edit_pixels": int(draft.edit.sum()),
        "area_share": found.pop("size"),
        **found,
        **{f"asked_{name}": draft.wanted.get(name) for name in ATTRIBUTES},
        "asked_birads": birads,
    }
    return Sample(draft.index, draft.attempt, draft.label, image, draft.mask, row)


def to_unit(pixels: NDArray[np.uint8]) -> Floats:
    """Grey levels to [-1, 1]."""
    return (pixels.astype(np.float32) / np.float32(127.5) - np.float32(1.0)).astype(np.float32)


def to_grey(pixels: Floats) -> NDArray[np.uint8]:
    """[-1, 1] to grey levels."""
    grey: NDArray[np.uint8] = np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8)
    return grey


def cells_of(region: Floats) -> NDArray[np.bool_]:
    """Latent cells that a region of windows ``(B, 1, S, S)`` touches, ``(B, 1, S/8, S/8)``."""
    batch, _, side, _ = region.shape
    cells = side // LATENT_FACTOR
    tiles = region.reshape(batch, 1, cells, LATENT_FACTOR, cells, LATENT_FACTOR)
    return np.asarray((tiles > 0).any(axis=(3, 5)))


def cut(arrays: Sequence[NDArray[Any]], windows: Sequence[Window]) -> Floats:
    """Windows of whole images as a batch, ``(B, 1, S, S)`` float32."""
    cuts = [array[window.slices] for array, window in zip(arrays, windows, strict=True)]
    return np.stack(cuts)[:, None].astype(np.float32)


def pictures(batch: Sequence[Draft]) -> Floats:
    """The drafts' healthy images as the context encoder reads them, ``(B, 1, 256, 256)`` from -1 to 1."""
    return np.stack([to_unit(draft.healthy.pixels)[None] for draft in batch])


def padded_to(array: NDArray[Any], size: int) -> NDArray[Any]:
    """An array with its last row repeated until it has ``size`` rows."""
    return np.concatenate((array, np.repeat(array[-1:], size - len(array), axis=0)))
