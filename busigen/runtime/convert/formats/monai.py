"""MONAI: images, label maps and the datalist (Medical Segmentation Decathlon's) that its loaders read."""

from __future__ import annotations

from typing import Any

from busigen.runtime.convert.base import Entries, Format, Pair, label_map, write_stream

_LISTS = {"": "training", "train": "training", "val": "validation", "test": "testing"}  # The datalist's by split.


class Converter(Format):
    """``images/<name>.png``, ``labels/<name>.png`` (0, 1 benign, 2 malignant) and ``datalist.json`` with folds."""

    allowed_splits = tuple(_LISTS)[1:]

    def write(self, pair: Pair) -> Any:
        """Write the image as it is, and the label map."""
        names = {"image": f"images/{pair.name}.png", "label": f"labels/{pair.name}.png"}
        self.target.write(names["image"], pair.image_png)
        self.target.write(names["label"], label_map(pair))
        return [_LISTS[pair.split], {**names, "class": pair.label, "fold": pair.fold}]

    def finish(self, entries: Entries) -> None:
        """Write the datalist; only training cases have folds, and none where there is a validation list."""
        used = [name for split, name in _LISTS.items() if split in (self.job.splits or ("",))]
        folds = used in (["training"], ["training", "testing"])

        def cases(name: str) -> Any:
            for place, case in entries:
                if place == name:
                    yield case if folds and name == "training" else {k: v for k, v in case.items() if k != "fold"}

        with self.target.file("datalist.json") as file:
            write_stream(file, {name: cases(name) for name in used})
