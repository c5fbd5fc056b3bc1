"""YOLO: one line of class and outline a lesion, which both segmentation and detection are trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from busigen.errors import UsageError
from busigen.registry import LESION_CLASSES, RESOLUTION
from busigen.runtime.convert.base import Entries, Format, Pair
from busigen.runtime.convert.outlines import polygon
from busigen.text import shell_word


class Converter(Format):
    """``images/<split>/<name>.png``, ``labels/<split>/<name>.txt`` and ``data.yaml``."""

    default_splits: ClassVar[Mapping[str, float]] = {"train": 0.8, "val": 0.2}
    allowed_splits = ("train", "val", "test")

    def begin(self) -> None:
        """Refuse splits that YOLO does not train with."""
        if missing := [name for name in ("train", "val") if name not in self.job.splits]:
            fix = "Give both, such as --split train=0.8,val=0.2."
            raise UsageError(f"--split has no {missing[0]!r}, which YOLO needs.", fix=fix)

    def write(self, pair: Pair) -> Any:
        """Write the image as it is, and its label: corners as shares of width and height; empty without a lesion."""
        self.target.write(f"images/{pair.split}/{pair.name}.png", pair.image_png)
        lines = []
        for mask in pair.masks:
            corners = (f"{number / RESOLUTION:.10g}" for point in polygon(mask) for number in point)
            lines.append(f"{' '.join([str(pair.class_index), *corners])}\n")
        self.target.write(f"labels/{pair.split}/{pair.name}.txt", "".join(lines).encode())
        return pair.name

    def finish(self, entries: Entries) -> None:
        """Write ``data.yaml``, whose paths begin in its own folder."""
        lines = [f"{split}: images/{split}" for split in self.job.splits]
        lines += ["names:", *(f"  {number}: {name}" for number, name in enumerate(LESION_CLASSES))]
        self.target.write("data.yaml", "".join(f"{line}\n" for line in lines).encode())

    def lines(self, left_out: int) -> Iterator[str]:
        """How YOLO reads it."""
        data = shell_word(self.job.out / "data.yaml")
        yield f"train with: yolo segment train model=yolo11n-seg.yaml imgsz=256 data={data}"
