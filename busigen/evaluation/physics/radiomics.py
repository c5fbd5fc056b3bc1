"""One vector of weight-free measurements per image: what physics, fidelity and privacy compare sets by."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from busigen.data.parquetfile import refuse_costly
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.physics import shape, speckle
from busigen.evaluation.physics.feature_table import DEPTH_BANDS, NAMES, Feature
from busigen.evaluation.physics.regions import MIN_PIXELS, Regions, find_regions
from busigen.foreign import open_file
from busigen.runtime.atomic import atomic_file, output_errors

__all__ = ["DEPTH_BANDS", "NAMES", "Feature", "features", "for_set", "matrix", "measure"]

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
    profile = shape.depth_profile(grey, tissue & ~mask, DEPTH_BANDS)
    found.update({f"depth_{band}": float(value) for band, value in enumerate(profile, start=1)})
    shallow, deep = shape.depth_profile(grey, tissue & ~mask, 2)
    found["depth_tilt"] = float(deep - shallow)
    if regions.box is not None:
        across = shape.margin(grey, regions)
        found["posterior_index"] = across.pop("posterior")
        found.update({f"margin_{name}": value for name, value in across.items()})
    if regions.largest.sum() >= MIN_PIXELS:
        names = {"area_fraction": "area", "height_width": "taller"}
        form = shape.outline(regions.largest, valid)
        found.update({f"shape_{names.get(name, name)}": value for name, value in form.items()})
    return found


def features(images: ImageSet, track: Track | None = None) -> pl.DataFrame:
    """Measure every image of a set.

    Args:
        images: The set.
        track: Shows progress, such as ``AuditContext.track``.

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
    return _table(images, np.array(values, dtype=np.float64).reshape(len(images), len(NAMES)))


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

    Args:
        context: The audit.
        images: Any set.

    Returns:
        As `features`.

    Raises:
        OutputError: The report's folder cannot be written.
    """
    digest = hashlib.sha256(repr((VERSION, list(NAMES), len(images))).encode())
    for array in (images.images, images.masks, images.valid, images.overlays):
        digest.update(np.ascontiguousarray(array).data)
    path = context.out / "cache" / f"radiomics-{digest.hexdigest()[:32]}.parquet"
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


def _table(images: ImageSet, values: NDArray[np.float64]) -> pl.DataFrame:
    columns = {name: values[:, k].astype(np.float64) for k, name in enumerate(NAMES)}
    return images.table.select("id", "class", "group").with_columns(**{k: pl.Series(v) for k, v in columns.items()})
