"""COCO instances: one annotation a lesion, its mask as RLE in one file and as polygons in another, both exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime.convert.base import Entries, Format, Pair, write_stream
from busigen.runtime.convert.outlines import polygons
from busigen.runtime.dataset.shards import lesion_box

# What of a manifest's row, where it has it, readers that know `attributes` (Datumaro, CVAT) show as texts and numbers.
_OF_IMAGE = ("class", "lesions", "asked_birads", "grid_group", "grid_level", "scanner", "background", "healthy_file")
_OF_LESION = ("area_share", "across", "depth", "height_width")
_FILES = {"rle": "instances", "polygons": "polygons"}  # Beginnings of the files' names.


class Converter(Format):
    """``images/<name>.png`` and ``annotations/instances.json``; of splits, ``images/<split>/`` and a file for each."""

    def write(self, pair: Pair) -> Any:
        """Write the image as it is."""
        place = f"images/{pair.split}" if pair.split else "images"
        self.target.write(f"{place}/{pair.name}.png", pair.image_png)
        lesions = [
            {
                "category": pair.class_index + 1,
                "attributes": _held(pair.row, ("asked_birads", "grid_level"))
                | _held(pair.row, _OF_LESION, f"lesion_{number}_" if "lesions" in pair.row else ""),
                **_lesion(mask),
            }
            for number, mask in enumerate(pair.masks, start=1)
        ]
        file, attributes = f"{pair.name}.png", _held(pair.row, _OF_IMAGE)
        return {"split": pair.split, "id": pair.number + 1, "file": file, "attributes": attributes, "lesions": lesions}

    def finish(self, entries: Entries) -> None:
        """Write a file of RLE and one of polygons for each split."""
        for kind, name in _FILES.items():
            for split in self.job.splits or ("",):
                with self.target.file(f"annotations/{name}{f'_{split}' if split else ''}.json") as file:
                    write_stream(file, _instances(entries, split, kind))

    def lines(self, left_out: int) -> Iterator[str]:
        """Where the two files are."""
        yield "annotations/instances*.json hold masks as RLE, annotations/polygons*.json the same as polygons"


def _held(row: Mapping[str, Any], names: Iterable[str], prefix: str = "") -> dict[str, Any]:
    """Those of the columns that hold something, by their names without the prefix."""
    found = {name: row.get(f"{prefix}{name}") for name in names}
    return {name: value for name, value in found.items() if value is not None}


def _lesion(mask: NDArray[np.bool_]) -> dict[str, Any]:
    left, top, right, bottom = lesion_box(mask) or (0, 0, 0, 0)
    return {
        "area": int(mask.sum()),
        "box": [left, top, right - left, bottom - top],
        "rle": {"size": list(mask.shape), "counts": run_lengths(mask)},
        "polygons": [[number for point in part for number in point] for part in polygons(mask)],
    }


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed RLE: lengths of runs down the columns, beginning with one outside, which may be 0."""
    changes = np.flatnonzero(np.diff(mask.ravel(order="F"), prepend=False))
    return [int(length) for length in np.diff([0, *changes, mask.size])]


def _instances(entries: Entries, split: str, kind: str) -> dict[str, Any]:
    images = (
        {
            "id": entry["id"],
            "file_name": entry["file"],
            "width": RESOLUTION,
            "height": RESOLUTION,
            "attributes": entry["attributes"],
        }
        for entry in entries
        if entry["split"] == split
    )
    numbers = count(1)
    annotations = (
        {
            "id": number,
            "image_id": entry["id"],
            "category_id": lesion["category"],
            "area": lesion["area"],
            "bbox": lesion["box"],
            "iscrowd": 0,
            "segmentation": lesion[kind],
            "attributes": lesion["attributes"],
        }
        for entry in entries
        if entry["split"] == split
        for lesion, number in zip(entry["lesions"], numbers, strict=False)
    )
    categories = [
        {"id": number, "name": name, "supercategory": "lesion"} for number, name in enumerate(LESION_CLASSES, start=1)
    ]
    info = {"description": "Synthetic breast ultrasound, made by busigen. For research; not for diagnosis."}
    return {"info": info, "images": images, "annotations": annotations, "categories": categories}
