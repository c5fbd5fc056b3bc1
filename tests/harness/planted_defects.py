"""Defects planted into image sets, and drawn sets to plant them in."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from busigen.data.letterbox import letterbox, letterbox_mask
from busigen.evaluation.context import AuditContext, ImageSet
from busigen.evaluation.statistics.grouped import halves
from tests.harness.synthetic_datasets import draw_frame

Pixels = NDArray[np.float64]


def draw_set(count: int, seed: int = 0) -> ImageSet:
    """``count`` drawn lesion images, alternately benign and malignant, a group each."""
    rng = np.random.default_rng(seed)
    rows, parts = [], []
    for number in range(count):
        label = ("benign", "malignant")[number % 2]
        frame = draw_frame(rng, (256, int(rng.integers(200, 240))), label)
        image, box = letterbox(frame.pixels)
        parts.append((image, letterbox_mask(frame.lesions[0], box), box.valid))
        rows.append({"id": f"drawn-{seed}-{number}", "class": label, "group": number})
    images, masks, valid = (np.stack(part) for part in zip(*parts, strict=True))
    return ImageSet("drawn", images, masks, valid, np.zeros_like(masks), pl.DataFrame(rows))


def halved(images: ImageSet, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Two group-disjoint halves of a set, both with their text and calipers: defects are planted into those images."""
    images = replace(images, clean=None)
    first, second = halves(images.groups, np.random.default_rng(seed))
    return images.take(first), images.take(second)


def audit_of(synthetic: ImageSet, real: ImageSet, out: Path) -> AuditContext:
    """The context in which one set is judged against the other."""
    return AuditContext(synthetic=synthetic, real=real, train=None, out=out)


def _painted_anew(change: Callable[[Pixels, int], Pixels]) -> Callable[[ImageSet], ImageSet]:
    def defect(images: ImageSet) -> ImageSet:
        pixels = np.stack([change(image.astype(np.float64), k) for k, image in enumerate(images.images)])
        return replace(images, images=np.where(images.valid, np.clip(np.rint(pixels), 0, 255), 0).astype(np.uint8))

    return defect


def _jpeg(pixels: Pixels, _: int) -> Pixels:
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=30)
    return np.asarray(Image.open(stream), dtype=np.float64)


def _white(pixels: Pixels, number: int) -> Pixels:
    """Speckle replaced by white noise of the same local variance."""
    smooth = ndimage.gaussian_filter(pixels, 3.0)
    spread = np.sqrt(ndimage.gaussian_filter((pixels - smooth) ** 2, 3.0))
    return smooth + spread * np.random.default_rng(number).normal(size=pixels.shape)


def _upside_down(images: ImageSet) -> ImageSet:
    arrays = {name: getattr(images, name)[:, ::-1] for name in ("images", "masks", "valid", "overlays")}
    return replace(images, **arrays)


def _squashed(images: ImageSet) -> ImageSet:
    rows = 180
    top = (256 - rows) // 2

    def squash(values: NDArray[np.generic], order: int) -> NDArray[np.generic]:
        small = ndimage.zoom(values.astype(np.float64), (rows / 256, 1), order=order, mode="nearest", grid_mode=True)
        return np.pad(small > 0.5 if values.dtype == np.bool_ else np.rint(small), ((top, 256 - rows - top), (0, 0)))

    arrays = {
        name: np.stack([squash(part, order) for part in getattr(images, name)]).astype(getattr(images, name).dtype)
        for name, order in (("images", 1), ("masks", 1), ("valid", 0), ("overlays", 0))
    }
    return replace(images, **arrays)


def _moved_masks(images: ImageSet) -> ImageSet:
    return replace(images, masks=np.roll(images.masks, 6, axis=2) & images.valid)


def _flipped_masks(images: ImageSet) -> ImageSet:
    return replace(images, masks=images.masks[:, ::-1] & images.valid)


def _swapped(images: ImageSet) -> ImageSet:
    other = {"benign": "malignant", "malignant": "benign"}
    return replace(images, table=images.table.with_columns(pl.col("class").replace(other)))


def _pasted(images: ImageSet) -> ImageSet:
    """Every lesion is another image's, pasted at the old one's centre without blending."""
    pixels, masks = images.images.copy(), images.masks.copy()
    for k in range(len(images)):
        other = (k + 2) % len(images)
        here, there = (ndimage.center_of_mass(images.masks[row]) for row in (k, other))
        step = tuple(round(a - b) for a, b in zip(here, there, strict=True))
        masks[k] = np.roll(images.masks[other], step, (0, 1)) & images.valid[k]
        pixels[k][masks[k]] = np.roll(images.images[other], step, (0, 1))[masks[k]]
    return replace(images, images=pixels, masks=masks)


def _round_masks(images: ImageSet) -> ImageSet:
    smooth = [ndimage.gaussian_filter(mask.astype(np.float32), 4.0) > 0.5 for mask in images.masks]
    return replace(images, masks=np.stack(smooth))


def shuffled(images: ImageSet, side: int = 32) -> ImageSet:
    """Square blocks of tissue that touch no lesion change places within their image: speckle stays, layers do not."""
    pixels, rng = images.images.copy(), np.random.default_rng(0)
    for image, mask, valid in zip(pixels, images.masks, images.valid, strict=True):
        free = valid & ~mask
        places = [np.s_[y : y + side, x : x + side] for y in range(0, 256, side) for x in range(0, 256, side)]
        places = [place for place in places if free[place].all()]
        blocks = [image[place].copy() for place in places]
        for place, other in zip(places, rng.permutation(len(places)), strict=True):
            image[place] = blocks[other]
    return replace(images, images=pixels)


def with_calipers(images: ImageSet) -> ImageSet:
    pixels = images.images.copy()
    for image, mask in zip(pixels, images.masks, strict=True):
        rows, columns = np.nonzero(mask)
        for row, column in ((rows[0], columns[0]), (rows[-1], columns[-1])):
            row, column = int(np.clip(row, 6, 249)), int(np.clip(column, 6, 249))
            image[row - 6 : row + 7, column - 6 : column + 7] //= 2
            image[row - 5 : row + 6, column] = 250
            image[row, column - 5 : column + 6] = 250
    return replace(images, images=pixels)


def repeated(images: ImageSet) -> ImageSet:
    rows = np.arange(len(images))
    rows[::3] = 0
    return images.take(rows)


def with_copies(images: ImageSet, source: ImageSet, share: float, seed: int) -> ImageSet:
    """A share of the images replaced by mirrored copies from ``source``, shifted by up to 12 pixels.

    What a shift would bring in from the other side is cut off: a seam across the image is another defect.
    """
    rng = np.random.default_rng(seed)
    pixels, masks, valid = images.images.copy(), images.masks.copy(), images.valid.copy()
    rows = rng.permutation(len(images))[: round(share * len(images))]
    for row, origin in zip(rows, rng.permutation(len(source)), strict=False):
        move = tuple(rng.integers(-12, 13, 2).tolist())
        moved = [np.roll(part[origin][:, ::-1], move, (0, 1)) for part in (source.images, source.masks, source.valid)]
        stayed = ndimage.shift(np.ones((256, 256)), move, order=0) > 0
        valid[row] = moved[2] & stayed
        pixels[row], masks[row] = np.where(valid[row], moved[0], 0), moved[1] & valid[row]
    return replace(images, images=pixels, masks=masks, valid=valid).with_lesions()


DEFECTS: dict[str, Callable[[ImageSet], ImageSet]] = {
    "blur": _painted_anew(lambda pixels, _: ndimage.gaussian_filter(pixels, 1.0)),
    "jpeg": _painted_anew(_jpeg),
    "white noise": _painted_anew(_white),
    "upside-down": _upside_down,
    "squashed": _squashed,
    "anatomy shuffled in blocks": shuffled,
    "masks moved by 6 px": _moved_masks,
    "masks flipped": _flipped_masks,
    "classes swapped": _swapped,
    "hard seam": _pasted,
    "smooth outlines": _round_masks,
    "calipers added": with_calipers,
    "one image a third of the time": repeated,
}
