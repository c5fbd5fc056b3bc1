"""Grids under audit: equal backgrounds are proven, what was varied is what differs, and anything else is said."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from busigen.evaluation import grids
from busigen.evaluation.context import AuditContext, ImageSet, SectionResult
from busigen.evaluation.physics.features import features
from tests.harness.synthetic_sets import synthetic_set

GROUPS = 10
LEVELS = [(label, size) for label in ("benign", "malignant") for size in (0.03, 0.06)]
Y, X = np.mgrid[:256, :256]


def _grid(asked: dict[float, float] | None = None) -> ImageSet:
    """Discs of the asked share of the frame in the same speckle; those of malignant lesions are darker by half."""
    images, masks, rows = [], [], []
    for group in range(GROUPS):
        speckle = np.random.default_rng(group).rayleigh(40.0, (256, 256))
        for label, size in LEVELS:
            share = size if asked is None else asked[size]
            mask = np.hypot(Y - 100, X - 128) <= 256 * np.sqrt(share / np.pi)
            dark = {"benign": 0.5, "malignant": 0.25}[label]
            images.append(np.clip(np.where(mask, dark, 1.0) * speckle, 0, 255).astype(np.uint8))
            masks.append(mask)
            level = f"{label}, size {size}"
            rows.append({"id": f"{group} {level}", "class": label, "group": group, "mask_files": 1, "background": None})
            rows[-1] |= {"grid_group": f"part 0, group {group}", "grid_level": level}
    shown = np.stack(masks)
    table = pl.DataFrame(rows, schema_overrides={"background": pl.String})
    return ImageSet("grid", np.stack(images), shown, np.ones_like(shown), np.zeros_like(shown), table)


@pytest.fixture(scope="module")
def measured() -> tuple[ImageSet, pl.DataFrame]:
    """A grid and its features, measured once."""
    images = _grid()
    return images, features(images)


def _compared(images: ImageSet, found: pl.DataFrame, out: Path) -> SectionResult:
    result, real = SectionResult("physics"), synthetic_set(4, 1)
    grids.compare(AuditContext(images, real, None, out), found, features(real), result)
    return result


def _proven(images: ImageSet, out: Path) -> SectionResult:
    result = SectionResult("integrity")
    grids.prove(AuditContext(images, synthetic_set(4, 1), None, out), result)
    return result


def test_what_was_asked_for_is_what_masks_differ_by(measured: tuple[ImageSet, pl.DataFrame], tmp_path: Path) -> None:
    result = _compared(*measured, tmp_path)
    asked = result.figure("physics.grid.size.0.03-0.06.shape_area")
    # A disc of pixels is off by less than its rim.
    assert asked.value.value == pytest.approx(0.03, abs=2e-3)
    assert (asked.synthetic, asked.flagged) == (GROUPS, False)
    darker = result.figure("physics.grid.class.benign-malignant.margin_sharpness")
    assert darker.value.low is not None and darker.value.low > 0 and darker.p is not None and darker.p < 0.01
    named = [figure.key for figure in result.figures if figure.key.startswith("physics.grid.class")]
    assert not any("shape" in key for key in named), "discs of both classes are the same"


def test_sizes_that_do_not_come_out_are_flagged(tmp_path: Path) -> None:
    images = _grid({0.03: 0.03, 0.06: 0.035}).take(np.arange(5 * len(LEVELS)))
    result = _compared(images, features(images), tmp_path)
    (flag,) = (finding.text for finding in result.findings if finding.level == "flag")
    assert flag.startswith("size 0.03 to 0.06: asked for a difference of 0.03, and masks differ by 0.005")


def test_few_groups_are_said_and_a_set_that_is_no_grid_has_no_figures(
    measured: tuple[ImageSet, pl.DataFrame], tmp_path: Path
) -> None:
    images, found = measured
    rows = np.arange(2 * len(LEVELS))
    few = _compared(images.take(rows), found[rows], tmp_path)
    assert not few.figures and "Too few groups of the grid" in few.findings[0].text
    plain = synthetic_set(4, 2)
    none = _compared(plain, features(plain), tmp_path)
    assert not none.figures and not none.findings


def test_a_background_that_changes_is_found(tmp_path: Path) -> None:
    images = _grid()
    proven = _proven(images, tmp_path)
    assert proven.figure("integrity.grid.changed").value.value == 0.0
    assert f"All {GROUPS} groups" in proven.findings[0].text
    changed = images.images.copy()
    changed[5, 250, 3] ^= 1
    result = _proven(replace(images, images=changed), tmp_path)
    assert result.figure("integrity.grid.changed").value.value == pytest.approx(100 / GROUPS)
    assert "1 benign, size 0.06 differs in 1 pixels" in result.findings[0].text


@pytest.mark.parametrize("level", ["size ?", "size nan", "x, size 0.03", ", "])
def test_levels_that_make_no_sense_cost_no_section(
    level: str, measured: tuple[ImageSet, pl.DataFrame], tmp_path: Path
) -> None:
    images, found = measured
    said = pl.when(pl.int_range(pl.len()) % 2 == 0).then(pl.lit(level)).otherwise(pl.col("grid_level"))
    result = _compared(replace(images, table=images.table.with_columns(grid_level=said)), found, tmp_path)
    assert not any("asked for" in figure.note for figure in result.figures)
