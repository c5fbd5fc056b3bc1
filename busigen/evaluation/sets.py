"""Reading labelled sets of any layout into the working frame."""

from __future__ import annotations

import numpy as np
import polars as pl

from busigen.data.letterbox import Letterbox
from busigen.data.prepared import Prepared
from busigen.evaluation.context import ImageSet


def from_prepared(prepared: Prepared, splits: tuple[str, ...], *, lesions_only: bool = False) -> ImageSet:
    """The images of some splits of a prepared folder.

    Args:
        prepared: The opened folder.
        splits: Names of ``registry.SPLITS``.
        lesions_only: Leave normals out.
    """
    table = prepared.table.filter(pl.col("split").is_in(splits))
    if lesions_only:
        table = table.filter(pl.col("lesions") > 0)
    rows = table["row"].to_numpy()
    boxes = zip(*(table[name] for name in ("scale", "left", "top", "inner_width", "inner_height")), strict=True)
    side = prepared.images.shape[1]
    valid = np.stack([Letterbox(*box).valid for box in boxes]) if len(rows) else np.zeros((0, side, side), np.bool_)
    columns = table.select(
        "id",
        "class",
        "group",
        pl.col("image_file").alias("file"),
        "sha256",
        "width",
        "height",
        pl.lit(None, pl.String).alias("mode"),
        pl.col("overlay_colour").alias("colour"),
        "lesions",
        pl.col("overlay_text").alias("text"),
        pl.col("overlay_calipers").alias("calipers"),
        pl.lit(None, pl.String).alias("background"),
    )
    return ImageSet(
        name=prepared.folder.name,
        images=np.asarray(prepared.images[rows]),
        masks=np.asarray(prepared.masks[rows]) > 0,
        valid=valid,
        overlays=np.asarray(prepared.overlays[rows]),
        table=columns,
    )
