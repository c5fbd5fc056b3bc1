"""What is measured on every image, and where: names, units, meanings, what a difference from real images says."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import fft, ndimage

from busigen.data.geometry import around
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.physics import speckle
from busigen.files import atomic_file
from busigen.foreign import open_file, refuse_costly
from busigen.records import read_json
from busigen.runtime.storage.files import output_errors

Grey = NDArray[np.float32]
Mask = NDArray[np.bool_]

VERSION = 6  # Part of the cache's key: raise it whenever a feature's meaning changes
DEPTH_BANDS = 6  # Bands of equal depth in the depth-intensity profile
RING = (2.0, 12.0)  # Pixels from the outline between which the ring lies, the blurred margin left out

POSTERIOR_GAP, LATERAL_GAP = 4, 4
"""Rows below a lesion that leave its bright posterior margin out, columns beside it that leave out refraction."""

POSTERIOR_DEPTH = (16, 48)  # Least and greatest rows of the strips; between these as many as the lesion has
MIN_PIXELS = 64  # A region of fewer pixels is not measured: its moments would be mostly noise
CONTOUR_POINTS = 128  # Points at equal distances to which an outline is resampled
ROUGH_HARMONICS, RIPPLE_HARMONICS = (5, 24), (15, 50)
"""Fourier harmonics of an outline that are its roughness, above its broad lobes, and how a hand or a grid draws it."""

MARGIN = 3.0  # Pixels on both sides of the outline that a margin's sharpness is measured over
SEARCH = 10  # Pixels by which an outline is moved at most to find where it fits the image best
_NAN = float("nan")


@dataclass(frozen=True)
class Feature:
    """One measurement; ``more`` and ``less`` complete "The images ..." where it differs from real ones.

    ``name`` is its column in the table, ``region_measure``; ``source`` names the method's paper, if there is one.
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
    """What ``features.json`` holds; those of texture, which have a gap for the region, first and for each region."""
    rows = read_json(Path(__file__).with_name("features.json"))
    for region in ("background", "ring", "lesion"):
        for row in rows:
            if row["region"] == "{}":
                yield Feature(**{name: text.format(region) for name, text in row.items()})
    yield from (Feature(**row) for row in rows if row["region"] != "{}")


NAMES: dict[str, Feature] = {feature.name: feature for feature in _features()}  # In the order of the columns


CACHE = "cache"  # Folder of the report that keeps them
_KEPT = "radiomics-"


def is_cache(folder: Path) -> bool:
    """Whether a folder holds what `for_set` keeps, and nothing else but what begins with a dot."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    return all(path.name.startswith((_KEPT, ".")) for path in folder.iterdir())


def for_set(context: AuditContext, images: ImageSet) -> pl.DataFrame:
    """`features`, measured once per report folder and content: sections that need them share a file."""
    digest = hashlib.sha256(repr((VERSION, list(NAMES), len(images))).encode())
    for array in (images.images, images.masks, images.valid, images.overlays):
        digest.update(np.ascontiguousarray(array).data)
    path = context.out / CACHE / f"{_KEPT}{digest.hexdigest()[:32]}.parquet"
    try:
        refuse_costly(path, len(images))
        with open_file(path) as file:
            return _table(images, pl.read_parquet(file).select(list(NAMES)).to_numpy())
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


def features(images: ImageSet, track: Callable[[str, Iterable[int], int], Iterator[int]] | None = None) -> pl.DataFrame:
    """Measure every image of a set; ``track`` shows progress, such as ``AuditContext.track``.

    The table has a row per image: ``id``, ``class``, ``group``, and a float64 column for every name of `NAMES`, NaN
    where a feature is undefined (no lesion, a region of too few pixels).
    """
    rows: Iterable[int] = range(len(images))
    if track is not None:
        rows = track(f"measuring {images.name}", rows, len(images))
    parts = (images.images, images.masks, images.valid, images.overlays)
    values = [list(measure(*(part[k] for part in parts)).values()) for k in rows]
    return _table(images, np.array(values, dtype=np.float64).reshape(len(images), len(NAMES)))


def _table(images: ImageSet, values: NDArray[np.float64]) -> pl.DataFrame:
    columns = {name: pl.Series(values[:, k].astype(np.float64)) for k, name in enumerate(NAMES)}
    return images.table.select("id", "class", "group").with_columns(**columns)


def matrix(table: pl.DataFrame, reference: pl.DataFrame | None = None) -> NDArray[np.float64]:
    """The features without gaps, ``float64 (N, D)``, in their own units: standardise before mixing them.

    A NaN becomes the median of its column in ``reference`` (by default the table itself), 0 where that has none: give
    the *real* table when sets are compared.
    """
    values = table.select(list(NAMES)).to_numpy().astype(np.float64)
    usual = values if reference is None else reference.select(list(NAMES)).to_numpy().astype(np.float64)
    known = [column[~np.isnan(column)] for column in usual.T]
    medians = np.array([np.median(column) if len(column) else 0.0 for column in known])
    return np.asarray(np.where(np.isnan(values), medians, values))


def measure(image: NDArray[np.uint8], mask: Mask, valid: Mask, overlays: Mask) -> dict[str, float]:
    """A value for every name of `NAMES`, NaN where it is undefined.

    ``image`` is ``uint8 (H, W)``, the others ``bool (H, W)``: lesions, if any, the image without its bars, overlays.
    """
    regions = find_regions(mask, valid, overlays)
    grey = image.astype(np.float32)
    tissue = regions.tissue
    found = dict.fromkeys(NAMES, _NAN)
    found.update(_texture(grey, regions))
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
    if regions.lesions and regions.lesions[0].sum() >= MIN_PIXELS:
        names = {"area_fraction": "area", "height_width": "taller"}
        forms = [outline(lesion, valid) for lesion in regions.lesions]
        found.update({f"shape_{names.get(name, name)}": _mean(form[name] for form in forms) for name in forms[0]})
    return found


def _texture(grey: Grey, regions: Regions) -> dict[str, float]:
    residual = speckle.detrended(grey, regions.tissue)
    amplitude = speckle.envelope(grey)
    everywhere = (slice(None), slice(None))
    found = {}
    for name, region, window in (
        ("background", regions.background, everywhere),
        ("ring", regions.ring, regions.box or everywhere),
        ("lesion", regions.lesion, regions.box or everywhere),
    ):
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


@dataclass(frozen=True)
class Regions:
    """Where an image is measured. All masks are ``bool (H, W)`` and hold no overlays and no letterbox bars.

    ``strips`` are, for each lesion, below it, as wide and as deep as it (within ``POSTERIOR_DEPTH``), and the same rows
    on both sides, each half as wide. ``distance`` is ``float32 (H, W)``, in pixels to the outline, negative inside,
    ``inf`` beyond the ring, ``-inf`` where the lesion fills the frame and has no outline. ``lesions``, whose shape is
    measured, are the connected ones of at least ``MIN_PIXELS``, else the largest, overlays and all.
    """

    tissue: Mask  # All that may be measured: the image without its overlays
    lesion: Mask
    ring: Mask  # The band around lesions, ``RING`` px outside the outline
    background: Mask
    strips: tuple[tuple[Mask, Mask], ...]
    distance: NDArray[np.float32]
    lesions: tuple[Mask, ...]
    box: tuple[slice, slice] | None  # Rows and columns that hold lesions and ring; None without a lesion


def find_regions(mask: Mask, valid: Mask, overlays: Mask) -> Regions:
    """Divide one image; all but ``tissue`` and ``background`` are empty where there is no lesion."""
    tissue, mask = valid & ~overlays, mask & valid
    distance = np.full(mask.shape, np.inf, dtype=np.float32)
    if not mask.any():
        empty = np.zeros(mask.shape, dtype=np.bool_)
        return Regions(tissue, empty, empty, tissue, (), distance, (), None)
    box = around(mask, int(RING[1]) + 1)
    inside = mask[box]
    away = ndimage.distance_transform_edt(~inside)
    # Padded by its own edge, so that a lesion that the frame cuts off has no outline there.
    padded = np.pad(inside, 1, mode="edge")
    depth: Any = np.inf if padded.all() else ndimage.distance_transform_edt(padded)[1:-1, 1:-1]
    # The outline runs between pixels, half a pixel from the centres on both sides of it.
    near = np.where(inside, 0.5 - depth, away - 0.5).astype(np.float32)
    distance[box] = np.where(near <= RING[1], near, np.inf)
    lesions = parts(mask)
    # Not isinf: a lesion that fills the frame lies at minus infinity.
    beyond = np.isposinf(distance)
    return Regions(
        tissue=tissue,
        lesion=mask & tissue,
        ring=(distance > RING[0]) & ~beyond & tissue,
        background=beyond & tissue,
        strips=tuple(_strips(lesion, tissue & ~mask) for lesion in lesions),
        distance=distance,
        lesions=lesions,
        box=box,
    )


def bounds(mask: Mask) -> tuple[int, int, int, int]:
    """Top, left, bottom and right of a mask that is not empty; the last two are beyond it."""
    rows, columns = around(mask, 0)
    return rows.start, columns.start, rows.stop, columns.stop


def square(
    box: tuple[int, int, int, int], side: float, within: tuple[int, int, int, int]
) -> tuple[float, float, float]:
    """Top, left and side of the square about the middle of a box, moved and if need be shrunk to lie within another."""
    top, left, bottom, right = within
    side = min(side, bottom - top, right - left)
    y = float(np.clip((box[0] + box[2] - side) / 2, top, bottom - side))
    x = float(np.clip((box[1] + box[3] - side) / 2, left, right - side))
    return y, x, side


def largest_part(mask: Mask) -> Mask:
    """The largest 8-connected part of a mask that is not empty; its holes stay."""
    return parts(mask)[0]


def parts(mask: Mask) -> tuple[Mask, ...]:
    """The 8-connected parts of at least ``MIN_PIXELS`` of a mask that is not empty, and in any case the largest, first.

    Their holes stay.
    """
    box = around(mask, 0)
    labels, count = ndimage.label(mask[box], structure=np.ones((3, 3)))
    if count <= 1:
        return (mask,)
    sizes = np.bincount(labels.ravel())[1:]
    order = [label for label in np.argsort(-sizes, kind="stable") if sizes[label] >= MIN_PIXELS]
    found = []
    for label in order or [int(sizes.argmax())]:
        part = np.zeros_like(mask)
        part[box] = labels == label + 1
        found.append(part)
    return tuple(found)


def _mean(values: Iterable[float]) -> float:
    """Of those that are known."""
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else _NAN


def _strips(lesion: Mask, free: Mask) -> tuple[Mask, Mask]:
    """The strips below a lesion and below what is beside it, where pixels are ``free``."""
    top, left, bottom, right = bounds(lesion)
    depth = int(np.clip(bottom - top, *POSTERIOR_DEPTH))
    half = max((right - left + 1) // 2, 4)
    below, beside = np.zeros_like(free), np.zeros_like(free)
    rows = slice(bottom + POSTERIOR_GAP, bottom + POSTERIOR_GAP + depth)
    below[rows, left:right] = True
    beside[rows, max(left - LATERAL_GAP - half, 0) : max(left - LATERAL_GAP, 0)] = True
    beside[rows, right + LATERAL_GAP : right + LATERAL_GAP + half] = True
    return below & free, beside & free


def depth_profile(grey: Grey, tissue: Mask, bands: int) -> NDArray[np.float64]:
    """Mean grey of equal bands of depth over that of the image, ``(bands,)``, shallowest first; NaN without tissue."""
    count = tissue.sum(axis=1)
    rows = np.flatnonzero(count)
    if not len(rows):
        return np.full(bands, np.nan)
    inside = slice(rows[0], rows[-1] + 1)
    height = rows[-1] + 1 - rows[0]
    total = np.where(tissue, grey, 0.0).sum(axis=1, dtype=np.float64)
    band = (np.arange(height) * bands) // height
    counts, sums = (np.bincount(band, part[inside], minlength=bands) for part in (count, total))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(sums / counts / (total.sum() / count.sum()))


def outline(lesion: Mask, valid: Mask) -> dict[str, float]:
    """Size, place (``depth`` and ``lateral`` of the centroid, 0 to 1 across the image) and form of a connected lesion.

    Circularity is ``4 pi A / P^2`` with Crofton's perimeter, which does not grow with the staircase of pixels.
    Roughness and ripple are the root of the outline's power in the ``ROUGH_HARMONICS`` and ``RIPPLE_HARMONICS`` over
    that of its first harmonic (Fourier descriptors: Zahn and Roskies 1972).
    """
    from skimage.measure import perimeter_crofton, regionprops

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


def _roughness(part: Mask) -> list[float]:
    from skimage.measure import find_contours

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


def margin(grey: Grey, regions: Regions) -> dict[str, float]:
    """How grey levels, ``float32 (H, W)`` from 0 to 255, change across the outline and below the lesion.

    ``contrast`` (ring over lesion, dB), ``sharpness`` (``MARGIN`` px outside over inside, dB), ``step`` (mean absolute
    difference of neighbours across the outline over that of neighbours within ``MARGIN`` px of it), ``offset`` (pixels
    by which the outline would have to move for the greatest change across it) and ``posterior`` (below over beside, dB:
    negative is shadow; the mean of all lesions). NaN where a region has fewer than ``MIN_PIXELS`` px.
    """
    distance = regions.distance
    outer, inner = (distance > 0) & (distance <= MARGIN), (distance < 0) & (distance >= -MARGIN)

    def difference(first: Mask, second: Mask) -> float:
        few = min(int(first.sum()), int(second.sum())) < MIN_PIXELS
        return _NAN if few else float(grey[first].mean() - grey[second].mean()) * (speckle.DYNAMIC_RANGE / 255.0)

    return {
        "contrast": difference(regions.ring, regions.lesion),
        "sharpness": difference(outer & regions.tissue, inner & regions.tissue),
        "step": _step(grey, regions),
        "offset": _offset(grey, outer, inner, regions),
        "posterior": _mean(difference(below, beside) for below, beside in regions.strips),
    }


def _step(grey: Grey, regions: Regions) -> float:
    if regions.box is None:
        return _NAN
    pixels, distance, tissue = grey[regions.box], regions.distance[regions.box], regions.tissue[regions.box]
    near = np.abs(distance) <= MARGIN + 1
    across, beside = [], []
    for ahead, behind in ((np.s_[1:, :], np.s_[:-1, :]), (np.s_[:, 1:], np.s_[:, :-1])):
        step = np.abs(pixels[ahead] - pixels[behind])
        both = tissue[ahead] & tissue[behind]
        crosses = ((distance[ahead] < 0) != (distance[behind] < 0)) & both
        across.append(step[crosses])
        beside.append(step[near[ahead] & near[behind] & ~crosses & both])
    here, there = np.concatenate(across), np.concatenate(beside)
    if not len(here) or not len(there) or there.mean() < 1e-6:
        return _NAN
    return float(here.mean() / there.mean())


def _offset(grey: Grey, outer: Mask, inner: Mask, regions: Regions) -> float:
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
