"""What is measured on every image: names, units, meanings, and what a difference from real images says."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import fft, ndimage
from skimage.measure import find_contours, perimeter_crofton, regionprops

from busigen.data.geometry import around
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.physics import speckle
from busigen.evaluation.physics.regions import MIN_PIXELS, Regions, find_regions
from busigen.files import atomic_file
from busigen.foreign import open_file, refuse_costly
from busigen.records import read_json
from busigen.runtime.storage.files import output_errors

DEPTH_BANDS = 6
"""Bands of equal depth in the depth-intensity profile."""


@dataclass(frozen=True)
class Feature:
    """One measurement.

    Attributes:
        name: Column of the table: ``region_measure``.
        region: ``image``, ``background``, ``ring``, ``lesion``, ``outline`` or ``posterior``.
        more: What it says about a set when it is greater than in real images; completes "The images ...".
        unit: ``px``, ``dB``, ... or empty.
        source: Where the method comes from; empty for our own.
    """

    name: str
    label: str
    region: str
    meaning: str
    more: str
    less: str
    unit: str = ""
    source: str = ""


def _features() -> Iterator[Feature]:
    """What ``features.json`` holds, with those of texture, which have a gap for the region, once for each region."""
    rows = [Feature(**row) for row in read_json(Path(__file__).with_name("features.json"))]
    for region in ("background", "ring", "lesion"):
        for row in rows:
            if row.region == "{}":
                yield Feature(**{name: text.format(region) for name, text in asdict(row).items()})
    yield from (row for row in rows if row.region != "{}")


NAMES: dict[str, Feature] = {feature.name: feature for feature in _features()}
"""Every feature, in the order of the table's columns."""

CONTOUR_POINTS = 128
"""Points at equal distances to which an outline is resampled."""

ROUGH_HARMONICS = (5, 24)
"""Fourier harmonics of an outline that count as roughness: below lie position, ellipse and broad lobes."""

RIPPLE_HARMONICS = (15, 50)
"""Those that count as ripple: how a hand, or a network's grid, draws a line."""

MARGIN = 3.0
"""Pixels on both sides of the outline that a margin's sharpness is measured over."""

SEARCH = 10
"""Pixels by which an outline is moved at most to find where it fits the image best."""

DB_PER_GREY = speckle.DYNAMIC_RANGE / 255.0

_NAN = float("nan")


def outline(lesion: NDArray[np.bool_], valid: NDArray[np.bool_]) -> dict[str, float]:
    """Size, place and form of one lesion.

    Circularity is ``4 pi A / P^2`` with Crofton's perimeter, which does not grow with the staircase of pixels.
    Roughness and ripple are the root of the outline's power in the ``ROUGH_HARMONICS`` and ``RIPPLE_HARMONICS`` over
    that of its first harmonic (Fourier descriptors: Zahn and Roskies 1972).

    Args:
        lesion: ``bool (H, W)``, one connected lesion.
        valid: ``bool (H, W)``, True on the image.

    Returns:
        ``area_fraction``, ``height_width``, ``circularity``, ``solidity``, ``roughness``, ``ripple``, ``depth`` and
        ``lateral`` (both of the centroid, 0 at the upper and left edge of the image, 1 at the other).
    """
    window = around(lesion, 0)
    height, width = lesion[window].shape
    part = np.pad(lesion[window], 2)
    properties = regionprops(part.astype(np.uint8))[0]
    rough, ripple = _roughness(part)
    perimeter = perimeter_crofton(part, directions=4)
    centre = [centroid + cut.start - 2 for centroid, cut in zip(properties.centroid, window, strict=True)]
    edges = [np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0)]
    place = [(at + 0.5 - line[0]) / len(line) for at, line in zip(centre, edges, strict=True)]
    return {
        "area_fraction": float(properties.area) / float(valid.sum()),
        "height_width": height / width,
        "circularity": float(4 * np.pi * properties.area / perimeter**2),
        "solidity": float(properties.solidity),
        "roughness": rough,
        "ripple": ripple,
        "depth": float(place[0]),
        "lateral": float(place[1]),
    }


def margin(grey: NDArray[np.float32], regions: Regions) -> dict[str, float]:
    """How grey levels change across the outline and below the lesion.

    ``grey``: ``float32 (H, W)``, 0 to 255.

    Returns:
        ``contrast`` (ring over lesion, dB), ``sharpness`` (``MARGIN`` px outside over inside, dB), ``step`` (mean
        absolute difference of neighbours across the outline over that of neighbours within ``MARGIN`` px of it),
        ``offset`` (pixels by which the outline would have to move for the greatest change across it) and ``posterior``
        (below over beside, dB: negative is shadow, positive enhancement). Letterbox bars and overlays count nowhere.
        NaN where a region has fewer than ``MIN_PIXELS`` px.
    """
    distance = regions.distance
    outer, inner = (distance > 0) & (distance <= MARGIN), (distance < 0) & (distance >= -MARGIN)
    return {
        "contrast": _difference(grey, regions.ring, regions.lesion),
        "sharpness": _difference(grey, outer & regions.tissue, inner & regions.tissue),
        "step": _step(grey, regions),
        "offset": _offset(grey, outer, inner, regions),
        "posterior": _difference(grey, regions.posterior, regions.lateral),
    }


def depth_profile(grey: NDArray[np.float32], tissue: NDArray[np.bool_], bands: int) -> NDArray[np.float64]:
    """Mean grey of equal bands of depth over that of the image, ``(bands,)``, the shallowest first.

    ``grey``: ``float32 (H, W)``. ``tissue``: ``bool (H, W)``: pixels that count.

    Returns:
        1 where a band is as bright as the image; NaN where it holds no pixel that counts.
    """
    count = tissue.sum(axis=1)
    rows = np.flatnonzero(count)
    if not len(rows):
        return np.full(bands, np.nan)
    total = np.where(tissue, grey, 0.0).sum(axis=1, dtype=np.float64)
    band = (np.arange(rows[-1] + 1 - rows[0]) * bands) // (rows[-1] + 1 - rows[0])
    inside = slice(rows[0], rows[-1] + 1)
    counts = np.bincount(band, count[inside], minlength=bands)
    sums = np.bincount(band, total[inside], minlength=bands)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums / counts / (total.sum() / count.sum()))


def _roughness(part: NDArray[np.bool_]) -> list[float]:
    contour = max(find_contours(part.astype(np.float32), 0.5), key=len)
    length = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(contour, axis=0).T))])
    at = np.linspace(0.0, length[-1], CONTOUR_POINTS, endpoint=False)
    points = np.interp(at, length, contour[:, 1]) + 1j * np.interp(at, length, contour[:, 0])
    power = np.abs(np.fft.fft(points)) ** 2
    bands = [
        power[low : high + 1].sum() + power[-high : -low + 1].sum() for low, high in (ROUGH_HARMONICS, RIPPLE_HARMONICS)
    ]
    # Which way round the outline was followed decides which of the two holds the first harmonic.
    return [float(np.sqrt(band / max(power[1], power[-1]))) for band in bands]


def _difference(grey: NDArray[np.float32], first: NDArray[np.bool_], second: NDArray[np.bool_]) -> float:
    if min(int(first.sum()), int(second.sum())) < MIN_PIXELS:
        return _NAN
    return float(grey[first].mean() - grey[second].mean()) * DB_PER_GREY


def _step(grey: NDArray[np.float32], regions: Regions) -> float:
    if regions.box is None:
        return _NAN
    pixels, distance = grey[regions.box], regions.distance[regions.box]
    tissue = regions.tissue[regions.box]
    across, around = [], []
    for axis in (0, 1):
        step = np.abs(np.diff(pixels, axis=axis))
        first, second = (range(k, distance.shape[axis] - 1 + k) for k in (1, 0))
        ahead, behind = (np.take(distance, at, axis=axis) for at in (first, second))
        both = np.take(tissue, first, axis=axis) & np.take(tissue, second, axis=axis)
        crosses = ((ahead < 0) != (behind < 0)) & both
        close = (np.abs(ahead) <= MARGIN + 1) & (np.abs(behind) <= MARGIN + 1) & ~crosses & both
        across.append(step[crosses])
        around.append(step[close])
    here, there = np.concatenate(across), np.concatenate(around)
    if not len(here) or not len(there) or there.mean() < 1e-6:
        return _NAN
    return float(here.mean() / there.mean())


def _offset(grey: NDArray[np.float32], outer: NDArray[np.bool_], inner: NDArray[np.bool_], regions: Regions) -> float:
    tissue = regions.tissue
    if regions.box is None or min(int((outer & tissue).sum()), int((inner & tissue).sum())) < MIN_PIXELS:
        return _NAN
    box = tuple(slice(max(cut.start - SEARCH, 0), cut.stop + SEARCH) for cut in regions.box)
    counted = tissue[box].astype(np.float32)
    # Both the blur and the means are over tissue alone: the edge of a bar or an overlay outshines any lesion's.
    share = ndimage.gaussian_filter(counted, 1.0, truncate=3.0)
    level = grey[tissue].mean()
    pixels = ndimage.gaussian_filter((grey[box] - level) * counted, 1.0, truncate=3.0)
    pixels = np.where(counted > 0, pixels / np.maximum(share, 1e-6), 0.0)
    shape = [fft.next_fast_len(side + SEARCH, real=True) for side in pixels.shape]
    shifts = np.arange(-SEARCH, SEARCH + 1)
    images = [fft.rfft2(part, shape) for part in (pixels, counted)]
    means, known = [], np.ones((len(shifts), len(shifts)), dtype=np.bool_)
    for band in (outer[box], inner[box]):
        template = np.conj(fft.rfft2(band.astype(np.float32), shape))
        total, count = (fft.irfft2(image * template, shape)[np.ix_(shifts, shifts)] for image in images)
        # Of a band that mostly lies outside the tissue, what is left says little of the outline.
        known &= 2 * count > count[SEARCH, SEARCH]
        means.append(total / np.maximum(count, 1.0))
    change = np.where(known, means[0] - means[1], -np.inf)
    down, across = np.unravel_index(int(change.argmax()), change.shape)
    return float(np.hypot(shifts[down], shifts[across]))


VERSION = 5
"""Part of the cache's key: raise it whenever a feature's meaning changes."""

Track = Callable[[str, Iterable[int], int], Iterator[int]]
"""``AuditContext.track``: iterates while showing progress."""


def measure(
    image: NDArray[np.uint8], mask: NDArray[np.bool_], valid: NDArray[np.bool_], overlays: NDArray[np.bool_]
) -> dict[str, float]:
    """All features of one image.

    Args:
        image: ``uint8 (H, W)``.
        mask: ``bool (H, W)``, True on lesions; may be empty.
        valid: ``bool (H, W)``, True on the image.
        overlays: ``bool (H, W)``, True on suspected overlays.

    Returns:
        A value for every name of `NAMES`; NaN where it is undefined.
    """
    regions = find_regions(mask, valid, overlays)
    grey = image.astype(np.float32)
    tissue = valid & ~overlays
    found = dict.fromkeys(NAMES, float("nan"))
    found.update(_texture(grey, tissue, regions))
    spectrum = speckle.radial_spectrum(grey, tissue)
    found["image_slope"] = speckle.spectral_slope(spectrum)
    found["image_high"] = speckle.high_frequency_share(spectrum)
    found["image_blocks"] = speckle.blockiness(grey, tissue)
    if regions.background.sum() >= MIN_PIXELS:
        outside = grey[regions.background]
        found["image_mean"], found["image_spread"] = float(outside.mean()), float(outside.std())
    profile = depth_profile(grey, tissue & ~mask, DEPTH_BANDS)
    found.update({f"depth_{band}": float(value) for band, value in enumerate(profile, start=1)})
    shallow, deep = depth_profile(grey, tissue & ~mask, 2)
    found["depth_tilt"] = float(deep - shallow)
    if regions.box is not None:
        across = margin(grey, regions)
        found["posterior_index"] = across.pop("posterior")
        found.update({f"margin_{name}": value for name, value in across.items()})
    if regions.largest.sum() >= MIN_PIXELS:
        names = {"area_fraction": "area", "height_width": "taller"}
        form = outline(regions.largest, valid)
        found.update({f"shape_{names.get(name, name)}": value for name, value in form.items()})
    return found


def features(images: ImageSet, track: Track | None = None) -> pl.DataFrame:
    """Measure every image of a set.

    ``track``: Shows progress, such as ``AuditContext.track``.

    Returns:
        One row per image: ``id``, ``class``, ``group``, and one float64 column for every name of `NAMES`, NaN where a
        feature is undefined (no lesion, a region of too few pixels).
    """
    rows: Iterable[int] = range(len(images))
    if track is not None:
        rows = track(f"measuring {images.name}", rows, len(images))
    values = [
        list(measure(images.images[k], images.masks[k], images.valid[k], images.overlays[k]).values()) for k in rows
    ]
    return _radiomics_table(images, np.array(values, dtype=np.float64).reshape(len(images), len(NAMES)))


def matrix(table: pl.DataFrame, reference: pl.DataFrame | None = None) -> NDArray[np.float64]:
    """The features as an array without gaps, for distances between images.

    A NaN becomes the median of its column in ``reference`` (by default the table itself), 0 where that has none. Give
    the *real* table as reference when sets are compared, so that both are filled with the same numbers.

    Args:
        table: From `features`.
        reference: From `features`, of the set that says what is usual.

    Returns:
        ``float64 (N, D)``, columns in the order of `NAMES`, in their own units: standardise before mixing them.
    """
    values = table.select(list(NAMES)).to_numpy().astype(np.float64)
    usual = values if reference is None else reference.select(list(NAMES)).to_numpy().astype(np.float64)
    known = [column[~np.isnan(column)] for column in usual.T]
    medians = np.array([np.median(column) if len(column) else 0.0 for column in known])
    return np.asarray(np.where(np.isnan(values), medians, values))


def for_set(context: AuditContext, images: ImageSet) -> pl.DataFrame:
    """`features`, measured once per report folder and content: sections that need them share a file.

    Returns:
        As `features`.
    """
    digest = hashlib.sha256(repr((VERSION, list(NAMES), len(images))).encode())
    for array in (images.images, images.masks, images.valid, images.overlays):
        digest.update(np.ascontiguousarray(array).data)
    path = context.out / "cache" / f"radiomics-{digest.hexdigest()[:32]}.parquet"
    try:
        refuse_costly(path, len(images))
        with open_file(path) as file:
            return _radiomics_table(images, pl.read_parquet(file).select(list(NAMES)).to_numpy())
    except (OSError, ValueError, pl.exceptions.PolarsError):
        # Absent, or damaged by someone else: either way it is measured again.
        table = features(images, context.track)
    content = io.BytesIO()
    table.select(list(NAMES)).write_parquet(content)
    with output_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as file:
            file.write(content.getbuffer())
    return table


def _texture(grey: NDArray[np.float32], tissue: NDArray[np.bool_], regions: Regions) -> dict[str, float]:
    residual = speckle.detrended(grey, tissue)
    amplitude = speckle.envelope(grey)
    found = {}
    for name in ("background", "ring", "lesion"):
        region, window = regions.named(name)
        if region.sum() < MIN_PIXELS:
            continue
        region = region[window]
        contrast, kurtosis, nakagami = speckle.local_moments(amplitude[window], region)
        axial, lateral = speckle.autocovariance_widths(residual[window], region)
        values = {
            "contrast": float(contrast),
            "kurtosis": float(kurtosis),
            "nakagami": float(np.log10(nakagami)),
            "axial": axial,
            "lateral": lateral,
            "anisotropy": lateral / axial,
            "fine": speckle.fine_share(grey[window], residual[window], region),
        }
        found.update({f"{name}_{measure}": value for measure, value in values.items()})
    return found


def _radiomics_table(images: ImageSet, values: NDArray[np.float64]) -> pl.DataFrame:
    columns = {name: values[:, k].astype(np.float64) for k, name in enumerate(NAMES)}
    return images.table.select("id", "class", "group").with_columns(**{k: pl.Series(v) for k, v in columns.items()})
