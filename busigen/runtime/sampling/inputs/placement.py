"""Where a user's mask lies in the working frame: letterboxed like an image, or moved, scaled and mirrored then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from busigen.data.geometry import Mask
from busigen.data.letterbox import HALF, coverage, fit
from busigen.registry import RESOLUTION

_MAX_SCALE = 16.0  # Of a record that can be believed: the smallest images, of 32 pixels, grow by 8 and half as much.


@dataclass(frozen=True)
class Placement:
    """A native mask in the working frame: scaled, perhaps mirrored, its corner ``left`` and ``top`` pixels in."""

    scale: float
    left: int
    top: int
    mirrored: bool = False

    @classmethod
    def letterboxed(cls, shape: tuple[int, int]) -> Placement:
        """That of a mask ``(H, W)`` that is letterboxed like an image, and no more."""
        box = fit(width=shape[1], height=shape[0])
        return cls(box.scale, box.left, box.top)

    @classmethod
    def recorded(cls, row: Mapping[str, Any]) -> Placement | None:
        """That which a manifest's row names; None where it names none that can be."""
        values: list[Any] = [row.get(f"given_mask_{name}") for name in ("scale", "left", "top", "mirrored")]
        if [type(value) for value in values] != [float, int, int, bool]:
            return None
        scale, left, top, _ = values
        # Beyond that, a mask would lie outside of the frame, or take gigabytes.
        inside = 0 < scale <= _MAX_SCALE and max(abs(left), abs(top)) <= _MAX_SCALE * RESOLUTION
        return cls(*values) if inside else None

    def shape(self, native: Mask) -> Mask:
        """The scaled mask, without its place: a pixel is lesion where at least half of it is."""
        height, width = (max(1, round(length * self.scale)) for length in native.shape)
        turned = native[:, ::-1] if self.mirrored else native
        return np.asarray(coverage(turned, width=width, height=height).astype(np.float32) >= HALF)

    def apply(self, native: Mask) -> Mask:
        """The mask in the frame, ``(256, 256)`` bool; what lies beyond the frame is cut off."""
        frame, shape = np.zeros((RESOLUTION, RESOLUTION), np.bool_), self.shape(native)
        top, left = max(0, self.top), max(0, self.left)
        seen = shape[top - self.top : RESOLUTION - self.top, left - self.left : RESOLUTION - self.left]
        frame[top : top + seen.shape[0], left : left + seen.shape[1]] = seen
        return frame


def place(native: Mask, jitter: float = 0.0, draws: Sequence[float] = (0.5, 0.5, 0.5, 1.0)) -> Placement:
    """Where a mask is to lie: where letterboxing puts it, or moved, scaled and mirrored from there.

    ``jitter`` moves it by up to that share of its own image's width and height, scales it about its middle by up to
    that share, and mirrors half of all; ``draws`` are four numbers in [0, 1) that say how far: across, down, larger,
    mirrored.
    """
    found = Placement.letterboxed(native.shape)
    if not jitter:
        return found
    box = fit(width=native.shape[1], height=native.shape[0])
    across, down, larger, turned = draws
    middle = _middle(found.shape(native))
    mirrored = turned < 0.5
    if mirrored:
        middle = middle[0], box.width - middle[1]
    scaled = Placement(box.scale * (1.0 + jitter * (2.0 * larger - 1.0)), 0, 0, mirrored)
    after = _middle(scaled.shape(native))
    top = box.top + middle[0] - after[0] + jitter * (2.0 * down - 1.0) * box.height
    left = box.left + middle[1] - after[1] + jitter * (2.0 * across - 1.0) * box.width
    return Placement(scaled.scale, round(left), round(top), mirrored)


def moved_inside(at: Placement, native: Mask, valid: Mask) -> Placement:
    """A placement, moved by as few pixels as bring all of the mask into an image: ``valid`` pixels are no bars.

    A mask that is larger than the image begins where the image does, and stays cut.
    """
    shape = at.shape(native)
    top = _start_inside(at.top, _extent(shape, 1), _extent(valid, 1))
    left = _start_inside(at.left, _extent(shape, 0), _extent(valid, 0))
    return replace(at, top=top, left=left)


def _extent(mask: Mask, axis: int) -> tuple[int, int]:
    """First line with a marked pixel, and the one after the last; of nothing, two zeros."""
    lines = np.flatnonzero(mask.any(axis=axis))
    return (int(lines[0]), int(lines[-1]) + 1) if lines.size else (0, 0)


def _middle(mask: Mask) -> tuple[float, float]:
    """Middle row and column of the marked pixels' bounding box."""
    rows, columns = _extent(mask, 1), _extent(mask, 0)
    return sum(rows) / 2.0, sum(columns) / 2.0


def _start_inside(start: int, line: tuple[int, int], room: tuple[int, int]) -> int:
    """A start from which a line, counted from there, lies within a room; one that is longer begins where it does."""
    return min(max(start, room[0] - line[0]), max(room[1] - line[1], room[0] - line[0]))
