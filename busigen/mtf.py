"""How sharp an image is as a whole, along its depth and across: what scanners, settings and zoom differ by.

A decoder draws speckle of about one width, and real sets hold images of many scanners, at many zooms. What a scanner
does to detail is to first order an axial and a lateral filter (Wagner et al. 1983, IEEE Trans. Sonics Ultrasonics 30).
So each pair on a synthetic background passes through one of its own last, drawn from how real images' detail is
distributed and drawn images' is not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

from busigen.data.geometry import Mask, around
from busigen.noise_styles import LIMIT
from busigen.registry import SCANNERS
from busigen.text import printable

REFERENCE = 0.03  # Cycles per pixel up to which filters change nothing: anatomy.
KNOTS = (0.08, 0.13, 0.18, 0.24, 0.31, 0.39, 0.46)  # Cycles per pixel between which a filter's gain is interpolated.
RADIUS = 10  # Pixels that a filter reaches to either side.
TILE = 32  # Side in pixels of the tiles whose spectra are measured; they overlap by half (Welch 1967).
FLOOR = 0.02  # Added to a band's power in grey levels squared; rounding to grey levels leaves a twelfth.
FEWEST_TILES = 4  # On which an image's detail is measured.
LARGEST_GAIN = 3.0  # Greatest magnitude of a number in a bundle's ``transfer``: 26 dB.

Floats = NDArray[Any]
# Taps along columns (axial) and along rows (lateral), ``(2 * RADIUS + 1,)`` each; they add up to 1.
Kernels = tuple[NDArray[np.float64], NDArray[np.float64]]


@dataclass(frozen=True)
class Transfer:
    """How images' filters are distributed: logarithms of gains at the axial ``KNOTS``, then at the lateral ones.

    To the mean is added what ``factor``, ``(2 * len(KNOTS), K)``, makes of ``K`` independent normals. ``scanners`` are
    the filters of single scanners, by name.
    """

    mean: Floats
    factor: Floats
    scanners: Mapping[str, Transfer] = field(default_factory=dict)

    def of(self, scanner: str | None) -> Transfer:
        """Those of a scanner, or of any if it has none of its own."""
        return self if scanner is None else self.scanners.get(scanner, self)

    def kernels(self, normals: Floats) -> Kernels:
        """The filter of an image, from its ``(K,)`` standard normals."""
        return kernels(self.mean + self.factor @ np.clip(normals, -LIMIT, LIMIT))

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``busigen.json`` and ``bundle.json``."""
        rounded = [np.round(part, 4).tolist() for part in (self.mean, self.factor)]
        single = {"scanners": {name: one.to_json() for name, one in self.scanners.items()}} if self.scanners else {}
        return {**dict(zip(("mean", "factor"), rounded, strict=True)), **single}

    @classmethod
    def from_json(cls, found: Any) -> Self:
        """Read what :meth:`to_json` gave; a ValueError for all else and for numbers beyond ``LARGEST_GAIN``."""
        single = found.get("scanners", {}) if isinstance(found, dict) else None
        if not isinstance(single, dict) or len(single) > SCANNERS:
            raise ValueError("no mapping of 'mean' and 'factor'")
        whole = _gains({key: part for key, part in found.items() if key != "scanners"})
        return cls(*whole, {name: cls(*_gains(one)) for name, one in single.items()})


def _gains(found: Any) -> tuple[Floats, Floats]:
    """Mean and factor of what stands in a bundle; a ValueError for all else."""
    if not isinstance(found, dict) or found.keys() != {"mean", "factor"} or not isinstance(found["factor"], list):
        raise ValueError("no mapping of 'mean' and 'factor'")
    rows = [found["mean"], *found["factor"]]
    if not all(isinstance(row, list) for row in rows):
        raise ValueError("'mean' or a row of 'factor' is no list")
    for value in (value for row in rows for value in row):
        if type(value) not in (int, float) or not abs(value) <= LARGEST_GAIN:
            raise ValueError(f"{printable(str(value))[:20]} is no number from {-LARGEST_GAIN} to {LARGEST_GAIN}")
    length = 2 * len(KNOTS)
    widths = {len(row) for row in rows[1:]}
    if len(rows[0]) != length or len(rows) != length + 1 or len(widths) != 1 or not 1 <= min(widths) <= length:
        raise ValueError(f"not {length} means and as many rows of up to {length} factors")
    return np.array(rows[0], np.float64), np.array(rows[1:], np.float64)


def kernels(gains: Floats) -> Kernels:
    """Zero-phase filters from logarithms of gains ``(2 * len(KNOTS),)``; brightness is kept."""
    found = []
    for part in np.split(np.asarray(gains, np.float64), 2):
        response = np.exp(np.interp(np.linspace(0.0, 0.5, 2 * TILE + 1), (REFERENCE, *KNOTS), (0.0, *part)))
        taps = np.roll(np.fft.irfft(response), RADIUS)[: 2 * RADIUS + 1]
        taps *= np.hanning(2 * RADIUS + 3)[1:-1]
        found.append(taps / taps.sum())
    return found[0], found[1]


def passed(image: NDArray[np.uint8], filters: Kernels) -> NDArray[np.uint8]:
    """An image ``(H, W)`` after its filters, mirrored at its borders."""
    result = image.astype(np.float32)
    for axis, taps in enumerate(filters):
        result = ndimage.correlate1d(result, taps, axis=axis, mode="reflect")
    return np.clip(np.rint(result), 0, 255).astype(np.uint8)


def apply_to_pair(
    image: NDArray[np.uint8], background: NDArray[np.uint8], edit: Mask, valid: Mask, filters: Kernels
) -> NDArray[np.uint8]:
    """A pair's image after its filters; outside the edit region it equals the filtered ``background``.

    All are ``(256, 256)``; ``valid`` pixels are no letterbox bars, and ``edit`` says where image and background differ,
    nowhere where there is no lesion.
    """
    frame = around(valid, 0)
    result = background.copy()
    result[frame] = passed(background[frame], filters)
    if not edit.any():
        return result
    rows, columns = (
        slice(max(part.start, whole.start), min(part.stop, whole.stop))
        for part, whole in zip(around(edit, RADIUS), frame, strict=True)
    )
    result[rows, columns] = np.where(edit[rows, columns], passed(image[rows, columns], filters), result[rows, columns])
    return result


def detail(image: NDArray[np.uint8], usable: Mask) -> Floats | None:
    """Half the logarithm of an image's power at the axial ``KNOTS``, then at the lateral ones, over ``REFERENCE``'s.

    Logarithms are averaged over all frequencies of the other axis. ``usable`` says which pixels ``(H, W)`` count; with
    fewer than ``FEWEST_TILES`` wholly usable tiles, None.
    """
    tiles = _tiles(image)[_tiles(usable).all(axis=(1, 2))].astype(np.float64)
    tiles = tiles[tiles.std(axis=(1, 2)) > 1.0]
    if len(tiles) < FEWEST_TILES:
        return None
    window = np.hanning(TILE + 1)[:-1]
    tapered = (tiles - tiles.mean(axis=(1, 2), keepdims=True)) * np.outer(window, window)
    power = (np.abs(fft.rfft2(tapered)) ** 2).mean(axis=0) / np.square(window).sum() ** 2
    axial, lateral = (_weights(np.abs(parts)) for parts in (fft.fftfreq(TILE), fft.rfftfreq(TILE)))
    bands = axial.T @ power @ lateral / np.outer(axial.sum(axis=0), lateral.sum(axis=0))
    logarithms = 0.5 * np.log(bands + FLOOR)
    return np.concatenate([part[1:] - part[0] for part in (logarithms.mean(axis=1), logarithms.mean(axis=0))])


def _tiles(values: NDArray[Any]) -> NDArray[Any]:
    views = np.lib.stride_tricks.sliding_window_view(values, (TILE, TILE))[:: TILE // 2, :: TILE // 2]
    return views.reshape(-1, TILE, TILE)


def _weights(frequencies: Floats) -> Floats:
    """The weight of each frequency for ``REFERENCE`` and each of ``KNOTS``, as in linear interpolation."""
    knots = (REFERENCE, *KNOTS)
    return np.stack([np.interp(frequencies, knots, row) for row in np.eye(len(knots))], axis=1)
