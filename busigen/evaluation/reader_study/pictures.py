"""The images of a reader study, made alike in all but what they show."""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from busigen.data.geometry import grow
from busigen.data.inpainting import without_overlays
from busigen.evaluation.context import ImageSet
from busigen.runtime.dataset.finalize import outline

LESION_MARGIN = 8  # Pixels around a lesion in which no decoy lies.

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]


def painted_over(images: ImageSet, row: int) -> Mask:
    """Where something was painted over that might have been the scanner's, ``bool (256, 256)``."""
    return np.asarray(images.without_overlays().images[row] != images.images[row])


def with_decoys(
    pixels: Pixels, valid: Mask, own: Mask, lesion: Mask, like: Mask, like_valid: Mask, side: int
) -> Pixels:
    """Paint over what in another image was painted over, so that the traces of it tell nothing.

    Almost every real image had text, calipers or a ruler, and few synthetic ones do. ``like`` is fitted from the extent
    of its image into that of this one, and spares the lesion; what this one has of its ``own`` is painted over as well.
    All are ``(256, 256)``, ``pixels`` are ``uint8``. ``side`` is the longest side of the other image's file in pixels:
    there it was painted over before it was shrunk, and so is this one.
    """
    box, from_box = _extent(valid), _extent(like_valid)
    height, width = pixels[box].shape
    decoys = np.asarray(Image.fromarray(like[from_box]).resize((width, height), Image.Resampling.NEAREST))
    decoys = own[box] | (decoys & ~grow(lesion, LESION_MARGIN)[box])
    scale = max(1.0, side / len(pixels))
    native = round(width * scale), round(height * scale)
    # Without the bars, which would be smeared into the image.
    large = np.asarray(Image.fromarray(pixels[box]).resize(native, Image.Resampling.BICUBIC))
    large = without_overlays(large, np.asarray(Image.fromarray(decoys).resize(native, Image.Resampling.NEAREST)))
    # The filter is that of `busigen.data.letterbox.letterbox`.
    painted = np.asarray(Image.fromarray(large).resize((width, height), Image.Resampling.HAMMING))
    result = pixels.copy()
    result[box] = np.where(decoys, painted, pixels[box])
    return result


def finished(pixels: Pixels, valid: Mask, lesion: Mask | None) -> bytes:
    """The PNG that is shown: bars black, the outline of ``lesion`` white where one is given.

    It is stored, not packed: packed, smooth images are smaller than grainy ones, and the sizes would tell them apart.
    """
    shown = np.where(valid, pixels, 0).astype(np.uint8)
    if lesion is not None:
        shown = outline(shown, lesion, (255, 255, 255))[..., 0]
    stream = io.BytesIO()
    Image.fromarray(shown).save(stream, "PNG", compress_level=0)
    return stream.getvalue()


def _extent(valid: Mask) -> tuple[slice, slice]:
    """Rows and columns that hold the image."""
    rows, columns = (np.flatnonzero(valid.any(axis=axis)) for axis in (1, 0))
    return slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
