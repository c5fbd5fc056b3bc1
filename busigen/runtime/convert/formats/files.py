"""Plain folders of images and masks, a folder a class, as `busigen prepare` and many loaders read them."""

from __future__ import annotations

from typing import Any

from busigen.runtime.convert.base import Format, Pair, grey_mask


class Converter(Format):
    """``images/<class>/<name>.png`` and ``masks/<class>/<name>.png``, below a folder for each split."""

    def write(self, pair: Pair) -> Any:
        """Write the image as it is, and the mask as 0 and 255."""
        place = f"{pair.split}/" if pair.split else ""
        name = f"{pair.label}/{pair.name}.png"
        self.target.write(f"{place}images/{name}", pair.image_png)
        self.target.write(f"{place}masks/{name}", grey_mask(pair.mask))
        return pair.name
