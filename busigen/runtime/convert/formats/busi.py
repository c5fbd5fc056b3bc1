"""BUSI's layout (Al-Dhabyani et al. 2020), which `busigen prepare` and many published loaders read."""

from __future__ import annotations

from typing import Any

from busigen.runtime.convert.base import Entries, Format, Pair, grey_mask


class Converter(Format):
    """``benign/benign (1).png`` with ``benign (1)_mask.png``, below a folder for each split; numbered by class."""

    def write(self, pair: Pair) -> Any:
        """Write the image as it is, and a mask for each lesion as 0 and 255, numbered from the second on."""
        place = f"{pair.split}/" if pair.split else ""
        stem = f"{place}{pair.label}/{pair.label} ({pair.class_number})"
        self.target.write(f"{stem}.png", pair.image_png)
        for number, mask in enumerate(pair.masks or (pair.mask,)):
            self.target.write(f"{stem}_mask{f'_{number}' if number else ''}.png", grey_mask(mask))
        return [f"{stem}.png", pair.name]

    def finish(self, entries: Entries) -> None:
        """Write ``keys.csv``, which says what pair of the dataset each file is."""
        with self.target.file("keys.csv") as file:
            file.write(b"file,key\n")
            for name, key in entries:
                file.write(f"{name},{key}\n".encode())
