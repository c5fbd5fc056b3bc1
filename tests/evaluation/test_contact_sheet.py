from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.errors import InputError
from busigen.evaluation.context import ImageSet
from busigen.evaluation.report.page import contact_sheet
from tests.harness.synthetic_datasets import Frame, draw_frame


@cache
def frames_of(image_class: str) -> list[Frame]:
    rng = np.random.default_rng([7, *image_class.encode()])
    return [draw_frame(rng, (256, 256), image_class) for _ in range(6)]


def a_set(count: int = 40, classes: tuple[str, ...] = ("benign", "malignant")) -> ImageSet:
    labels = [classes[k % len(classes)] for k in range(count)]
    frames = [frames_of(label)[k % 6] for k, label in enumerate(labels)]
    nothing = np.zeros((count, 256, 256), np.bool_)
    masks = nothing.copy()
    for k, frame in enumerate(frames):
        masks[k] = frame.lesions[0] if frame.lesions else False
    return ImageSet(
        name="drawn",
        images=np.array([frame.pixels for frame in frames], np.uint8).reshape(count, 256, 256),
        masks=masks,
        valid=~nothing,
        overlays=nothing,
        table=pl.DataFrame({"class": labels}, schema={"class": pl.String}),
    )


def test_the_contact_sheet_shows_both_sets_and_stays_small(tmp_path: Path) -> None:
    dark = a_set()
    path = contact_sheet(dark, a_set(24), tmp_path / "sheet.jpg")
    assert path.stat().st_size < 700_000
    with Image.open(path) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    half = pixels.shape[1] // 2
    for side in (pixels[:, :half], pixels[:, half:]):
        saturation = side.max(axis=-1) - side.min(axis=-1)
        # Contours and class names are the only colours; 16 outlines of drawn lesions make thousands of pixels.
        assert (saturation > 60).sum() > 1500
    again = contact_sheet(dark, a_set(24), tmp_path / "again.jpg")
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("classes", [("benign",), ("normal",), ("unknown", "malignant")])
def test_a_contact_sheet_of_whatever_classes_there_are(tmp_path: Path, classes: tuple[str, ...]) -> None:
    few = contact_sheet(a_set(3, classes), a_set(20), tmp_path / "few.jpg")
    many = contact_sheet(a_set(20, classes), a_set(20), tmp_path / "many.jpg")
    with Image.open(few) as small, Image.open(many) as large:
        assert small.size == large.size
        # One row of images on the left of the first, four on the left of the second.
        below = (slice(300, None), slice(0, 600))
        assert np.asarray(small)[below].std() < 5 < np.asarray(large)[below].std()


def test_an_empty_set_has_no_contact_sheet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no image"):
        contact_sheet(a_set(0), a_set(4), tmp_path / "sheet.jpg")
