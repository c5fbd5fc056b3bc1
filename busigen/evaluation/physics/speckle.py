"""Speckle and resolution: envelope statistics, autocovariance widths, power spectrum, JPEG's grid.

Images are ``float32 (H, W)`` grey levels from 0 to 255; regions and tissue are ``bool (H, W)``.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

Grey = NDArray[np.float32]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

DYNAMIC_RANGE = 60.0  # dB that grey levels 0 to 255 are taken to span, for both sets: the public ones do not say
BLOCK = 16  # Side in pixels of the blocks over which a region's speckle is measured: small enough to hold one tissue
DETREND = 17  # Side in pixels of the moving average that is subtracted before a width is measured: wider is anatomy
LAGS = 12  # Greatest lag of an autocovariance in pixels
TILE = 64  # Side in pixels of the tiles of the power spectrum; they overlap by half (Welch 1967)
SLOPE_BAND = (0.05, 0.40)  # Cycles per pixel of the slope's fit, above anatomy and below the resampling filter
HALF_NYQUIST = 0.25  # Cycles per pixel from which power counts as high-frequency
JPEG_GRID = 8  # Side in pixels of JPEG's blocks
FREQUENCIES = (np.arange(TILE // 2) + 0.5) / TILE  # Centres of the power spectrum's radial bins in cycles per pixel
_NAN = float("nan")


def envelope(grey: NDArray[np.generic]) -> Floats:
    """Relative amplitude without the log compression, ``10 ** (DYNAMIC_RANGE * grey / 255 / 20)``: 1 for black.

    Scanners do more that nothing undoes: it can be compared between sets, and is not that of radio-frequency data.
    """
    return np.asarray(10.0 ** (np.asarray(grey, dtype=np.float64) * (DYNAMIC_RANGE / 255.0 / 20.0)))


def moments(amplitude: Floats) -> Floats:
    """Contrast, kurtosis and Nakagami parameter along the last axis, ``(..., 3)``; NaN entries do not count.

    Contrast is standard deviation over mean, kurtosis the fourth standardised moment, the Nakagami parameter
    ``m = E[A^2]^2 / Var[A^2]`` (Shankar 2000, IEEE Trans. UFFC 47, eq. 6): 0.52, 3.25 and 1 for fully developed
    speckle. All are NaN where the amplitudes do not vary.
    """
    known = ~np.isnan(amplitude)
    count = np.maximum(known.sum(axis=-1), 1)

    def mean(values: Floats) -> Floats:
        return np.asarray(np.where(known, values, 0.0).sum(axis=-1) / count)

    centre = mean(amplitude)
    square = (amplitude - centre[..., None]) ** 2
    variance = mean(square)
    power = amplitude**2
    spread = mean(power**2) - mean(power) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = (np.sqrt(variance) / centre, mean(square**2) / variance**2, mean(power) ** 2 / spread)
    result = np.stack(parts, axis=-1)
    result[~(variance > 1e-9 * centre**2)] = np.nan
    return result


def local_moments(amplitude: Floats, region: Mask) -> Floats:
    """The medians of `moments`, ``(3,)``, over a grid's blocks that lie at least half in a region.

    Within a block amplitudes vary because of speckle, over a whole region because tissues do (Tsui and Chang 2007,
    Ultrasound Med. Biol. 33). A region without such a block counts as one block.
    """

    def blocks(values: NDArray[np.generic]) -> NDArray[np.generic]:
        height, width = (side - side % BLOCK for side in values.shape)
        parts = values[:height, :width].reshape(height // BLOCK, BLOCK, width // BLOCK, BLOCK)
        return np.asarray(parts.swapaxes(1, 2).reshape(-1, BLOCK * BLOCK))

    inside = blocks(region)
    chosen = inside.mean(axis=-1) >= 0.5
    found = moments(np.where(inside[chosen], blocks(amplitude)[chosen], np.nan))
    found = found[~np.isnan(found).any(axis=-1)]
    return np.asarray(np.median(found, axis=0)) if len(found) else moments(amplitude[region])


def detrended(grey: Grey, tissue: Mask) -> Grey:
    """Grey minus its moving average over ``DETREND`` px, both of tissue only; 0 elsewhere."""
    weight = tissue.astype(np.float32)
    total = ndimage.uniform_filter(grey * weight, DETREND, mode="constant")
    share = ndimage.uniform_filter(weight, DETREND, mode="constant")
    return np.asarray((grey - total / np.maximum(share, 1e-3)) * weight, dtype=np.float32)


def autocovariance_widths(residual: Grey, region: Mask) -> tuple[float, float]:
    """The speckle's size: full widths at half maximum of the autocovariance of `detrended` pixels inside a region.

    Axial (along columns) and lateral width in pixels (Wagner et al. 1983, IEEE Trans. Sonics Ultrasonics 30); NaN where
    the region is empty, does not vary or is too narrow; ``2 * LAGS`` where the autocovariance never falls to a half.
    """
    weight = region.astype(np.float32)
    values = residual * weight
    total = float(weight.sum())
    if total < 2 * LAGS:
        return _NAN, _NAN
    values = (values - values.sum() / total) * weight
    power = float((values * values).sum()) / total
    if power < 1e-6:
        return _NAN, _NAN
    return _half_width(values, weight, power), _half_width(values.T, weight.T, power)


def _half_width(values: Grey, weight: Grey, power: float) -> float:
    """The width down the columns."""
    before = 1.0
    for lag in range(1, min(LAGS, len(values) - 1) + 1):
        pairs = float((weight[lag:] * weight[:-lag]).sum())
        if pairs < 2 * LAGS:
            return _NAN
        now = float((values[lag:] * values[:-lag]).sum()) / pairs / power
        if now <= 0.5:
            return 2.0 * (lag - 1 + (before - 0.5) / (before - now))
        before = now
    return 2.0 * LAGS


def fine_share(grey: Grey, residual: Grey, region: Mask) -> float:
    """Share of a region's `detrended` variance that a 3 x 3 binomial filter removes; 0.86 for white noise.

    It stands for the high-frequency share where a region is too small for a spectrum. Only pixels count whose whole
    neighbourhood lies in the region. NaN where nothing varies, or the region has no such pixel.
    """
    region = ndimage.binary_erosion(region, np.ones((3, 3)), border_value=1)
    smooth = grey
    for axis in (0, 1):
        smooth = ndimage.correlate1d(smooth, np.array([0.25, 0.5, 0.25]), axis=axis)
    whole = float(residual[region].var()) if region.any() else 0.0
    return float((grey - smooth)[region].var()) / whole if whole > 1e-6 else _NAN


def radial_spectrum(grey: Grey, tissue: Mask) -> Floats:
    """Mean power per frequency of half-overlapping Hann-windowed tiles that are wholly tissue (Welch 1967).

    ``(TILE / 2,)`` power density in grey^2 at `FREQUENCIES`; NaN where there is no tile. Where overlays leave no tile
    whole, tiles of at least 90 % tissue count, their gaps filled with the tile's mean.
    """
    pixels, inside = _tiles(grey), _tiles(tissue)
    share = inside.mean(axis=(1, 2))
    chosen = share == 1.0 if (share == 1.0).any() else share >= 0.9
    if not chosen.any():
        return np.full(TILE // 2, np.nan)
    pixels, inside = pixels[chosen], inside[chosen]
    means = (pixels * inside).sum(axis=(1, 2), keepdims=True) / inside.sum(axis=(1, 2), keepdims=True)
    window, ring, count = _spectral_plan()
    power = np.abs(fft.rfft2((pixels - means) * inside * window)) ** 2
    radial = np.bincount(ring, power.mean(axis=0).ravel().astype(np.float64), minlength=TILE // 2 + 1)
    return np.asarray(radial[: TILE // 2] / count)


def _tiles(values: NDArray[np.generic]) -> NDArray[np.generic]:
    views = np.lib.stride_tricks.sliding_window_view(values, (TILE, TILE))[:: TILE // 2, :: TILE // 2]
    return views.reshape(-1, TILE, TILE)


@cache
def _spectral_plan() -> tuple[Grey, NDArray[np.int64], Floats]:
    """Hann's window, the radial bin of each frequency, and how many each bin has."""
    hann = np.hanning(TILE + 1)[:-1]
    window = np.outer(hann, hann)
    window /= np.sqrt((window**2).sum())
    radius = np.hypot(np.fft.fftfreq(TILE)[:, None], np.fft.rfftfreq(TILE)[None])
    ring = np.minimum((radius * TILE).astype(np.int64), TILE // 2).ravel()
    return window.astype(np.float32), ring, np.bincount(ring, minlength=TILE // 2 + 1)[: TILE // 2].astype(float)


def spectral_slope(spectrum: Floats) -> float:
    """Exponent of the power law through ``SLOPE_BAND``: 0 for white noise, -2 for power falling as 1/f^2."""
    low, high = SLOPE_BAND
    band = (low <= FREQUENCIES) & (high >= FREQUENCIES)
    if not (spectrum[band] > 0).all():
        return _NAN
    return float(np.polyfit(np.log(FREQUENCIES[band]), np.log(spectrum[band]), 1)[0])


def high_frequency_share(spectrum: Floats) -> float:
    """Share of the power above half the Nyquist frequency, without the lowest two bins, which hold the window."""
    power = spectrum * FREQUENCIES
    total = float(power[2:].sum())
    return float(power[FREQUENCIES >= HALF_NYQUIST].sum()) / total if total > 0 else _NAN


def blockiness(grey: Grey, tissue: Mask) -> float:
    """How far steps between neighbours on a grid of 8 px, of any phase, stand out from those beside them: JPEG.

    Excess of the strongest phase over its neighbours as a share of the mean absolute step, averaged over both axes, or
    NaN where nothing varies.
    """
    excess = []
    for pixels, inside in ((grey, tissue), (grey.T, tissue.T)):
        both = inside[:, 1:] & inside[:, :-1]
        count = both.sum(axis=0)
        lines = (np.abs(np.diff(pixels, axis=1)) * both).sum(axis=0) / np.maximum(count, 1)
        usable = np.minimum(np.minimum(count[1:-1], count[:-2]), count[2:]) >= JPEG_GRID
        stands_out = (lines[1:-1] - (lines[:-2] + lines[2:]) / 2) * usable
        phase = np.arange(usable.size) % JPEG_GRID
        mean = np.bincount(phase, stands_out) / np.maximum(np.bincount(phase, usable), 1)
        usual = float(lines[count > 0].mean()) if count.any() else 0.0
        excess.append(mean.max() / usual if usual > 0 else np.nan)
    return float(np.mean(excess))
