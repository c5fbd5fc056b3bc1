"""COCO instances: one annotation a lesion, its mask as RLE in one file and as polygons in another, both exact."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime.convert.base import Entries, Format, Pair, write_stream
from busigen.runtime.convert.outlines import polygons
from busigen.runtime.dataset.shards import lesion_box

_FILES = {"rle": "instances", "polygons": "polygons"}  # Beginnings of the files' names.


class Converter(Format):
    """``images/<name>.png`` and ``annotations/instances.json``; of splits, ``images/<split>/`` and a file for each."""

    def write(self, pair: Pair) -> Any:
        """Write the image as it is."""
        place = f"images/{pair.split}" if pair.split else "images"
        self.target.write(f"{place}/{pair.name}.png", pair.image_png)
        lesions = [{"category": pair.class_index + 1, **_lesion(mask)} for mask in pair.masks]
        return {"split": pair.split, "id": pair.number + 1, "file": f"{pair.name}.png", "lesions": lesions}

    def finish(self, entries: Entries) -> None:
        """Write a file of RLE and one of polygons for each split."""
        for kind, name in _FILES.items():
            for split in self.job.splits or ("",):
                with self.target.file(f"annotations/{name}{f'_{split}' if split else ''}.json") as file:
                    write_stream(file, _instances(entries, split, kind))

    def lines(self, left_out: int) -> Iterator[str]:
        """Where the two files are."""
        yield "annotations/instances*.json hold masks as RLE, annotations/polygons*.json the same as polygons"


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
        {"id": entry["id"], "file_name": entry["file"], "width": RESOLUTION, "height": RESOLUTION}
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
