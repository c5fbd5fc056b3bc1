"""Fidelity is silent between halves of one set, and speaks where images, variety or classes differ."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import ndimage

from busigen.evaluation.context import AuditContext, ImageSet, SectionResult
from busigen.evaluation.fidelity import section as fidelity
from busigen.evaluation.statistics.grouped import halves
from tests.harness.planted_defects import shuffled
from tests.harness.synthetic_sets import synthetic_set

KEYS = ("frechet", "mmd", "precision", "recall", "density", "coverage")
COARSE = [f"fidelity.{space}.all.mmd.value" for space in ("coarse", "coarse_contrast_removed")]


@pytest.fixture(scope="module")
def real() -> ImageSet:
    return synthetic_set(60, seed=1)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared, so that an image is measured once."""
    return tmp_path_factory.mktemp("fidelity")


def _audit(synthetic: ImageSet, real: ImageSet, out: Path, seed: int = 0) -> SectionResult:
    return fidelity.run(AuditContext(synthetic, real, None, out, seed=seed))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_halves_of_one_set_are_alike(seed: int, out: Path) -> None:
    images = synthetic_set(120, seed=2)
    first, second = halves(images.groups, np.random.default_rng(seed))
    result = _audit(images.take(first), images.take(second), out, seed)
    assert not result.flagged, result.findings
    assert [f.key for f in result.figures] == [
        *(f"fidelity.radiomic.{scope}.{key}.value" for scope in ("all", "benign", "malignant") for key in KEYS),
        *COARSE,
    ]
    for figure in result.figures:
        assert figure.floor is not None
        for part in (figure.value, figure.floor):
            assert part.low is not None and part.high is not None
            assert part.low <= part.value <= part.high


def test_blurred_images_are_far_from_real_ones(real: ImageSet, out: Path) -> None:
    images = synthetic_set(60, seed=3)
    blurred = ndimage.gaussian_filter(images.images, (0, 1.5, 1.5))
    result = _audit(replace(images, images=blurred), real, out)
    for key in ("frechet", "mmd", "precision", "coverage"):
        assert result.figure(f"fidelity.radiomic.all.{key}.value").flagged, key


def test_anatomy_shuffled_in_blocks_is_found_in_the_coarse_structure(real: ImageSet, out: Path) -> None:
    result = _audit(shuffled(synthetic_set(60, seed=3)), real, out)
    assert all(result.figure(key).flagged for key in COARSE)


def test_gain_is_coarse_structure_but_none_once_contrast_is_removed(real: ImageSet, out: Path) -> None:
    images = synthetic_set(60, seed=3)
    result = _audit(replace(images, images=images.images // 2), real, out)
    assert [result.figure(key).flagged for key in COARSE] == [True, False]


def test_one_image_repeated_loses_the_variety(real: ImageSet, out: Path) -> None:
    images = synthetic_set(60, seed=3)
    repeated = images.take(np.arange(4).repeat(10))
    # Where the reader sees the repeats they are one group, and a test cannot tell: here each passes for a patient.
    alone = replace(repeated, table=repeated.table.with_columns(pl.Series("group", np.arange(40))))
    result = _audit(alone, real, out)
    recall, precision = (result.figure(f"fidelity.radiomic.all.{key}.value") for key in ("recall", "precision"))
    assert recall.flagged
    assert not precision.flagged


@pytest.mark.slow
def test_shares_of_classes_are_no_difference_but_swapped_classes_are(out: Path) -> None:
    real, images = synthetic_set(100, seed=4), synthetic_set(140, seed=5)
    malignant = np.flatnonzero(images.classes == "malignant")
    fewer = np.setdiff1d(np.arange(len(images)), malignant[20:])
    result = _audit(images.take(fewer), real, out)
    assert not result.flagged, result.findings
    # Thinned to the real set's equal shares.
    assert result.figure("fidelity.radiomic.all.frechet.value").synthetic == 40
    swapped = images.table.with_columns(pl.col("class").replace({"benign": "malignant", "malignant": "benign"}))
    result = _audit(replace(images, table=swapped), real, out)
    assert result.figure("fidelity.radiomic.benign.frechet.value").flagged
    assert not result.figure("fidelity.radiomic.all.frechet.value").flagged


def test_the_bias_of_a_frechet_distance_is_explained_in_figures(real: ImageSet, out: Path) -> None:
    result = _audit(synthetic_set(60, seed=3), real, out)
    bias = result.details["frechet_bias"]
    # First order only, and with fewer images than features far from exact; but not another order of magnitude.
    assert bias["simulated"] == pytest.approx(bias["closed_form"], rel=0.5)
    assert bias["size"] == 30
    text = next(finding.text for finding in result.findings if "never 0" in finding.text)
    assert "rank 599" in text
    assert f"{bias['inception_share_flat']:.0%}" in text


def test_a_missing_class_and_too_few_images_are_said(real: ImageSet, out: Path) -> None:
    images = synthetic_set(60, seed=3)
    result = _audit(images.take(images.classes == "benign"), real, out)
    assert any("holds none: malignant" in finding.text for finding in result.findings)
    assert {figure.key.split(".")[2] for figure in result.figures} == {"all"}
    result = _audit(images.take(np.arange(8)), real, out)
    assert not result.figures
    assert any("Too few images to compare (all: 8" in finding.text for finding in result.findings)
    small = _audit(replace(images, images=np.zeros_like(images.images)).take(np.arange(16)), real, out)
    assert small.figures
    assert not small.flagged


def test_a_set_without_class_names_is_compared_as_a_whole(real: ImageSet, out: Path) -> None:
    images = synthetic_set(60, seed=3)
    unknown = replace(images, table=images.table.with_columns(pl.lit("unknown").alias("class")))
    result = _audit(unknown, real, out)
    assert {figure.key.split(".")[2] for figure in result.figures} == {"all"}
    assert any("no class in common" in finding.text for finding in result.findings)


def test_without_inception_the_section_says_how_to_bring_it(
    real: ImageSet, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(out))
    result = _audit(real.take(np.arange(20)), synthetic_set(20, seed=3), out)
    assert any("--inception PATH" in finding.text for finding in result.findings)


def _grouped(images: ImageSet, sizes: list[int]) -> ImageSet:
    groups = np.arange(len(sizes)).repeat(sizes)
    return replace(images, table=images.table.with_columns(pl.Series("group", groups)))


@pytest.mark.parametrize("sizes", [[20], [17, 1, 1, 1]])
def test_too_few_groups_are_said_and_not_compared(sizes: list[int], out: Path) -> None:
    images = synthetic_set(20, seed=6, classes=("benign",))
    result = _audit(synthetic_set(20, seed=7, classes=("benign",)), _grouped(images, sizes), out)
    assert not result.figures
    assert any("Too few independent images to compare (all: 20" in finding.text for finding in result.findings)


def test_one_large_group_among_many_is_dealt_around(out: Path) -> None:
    images = synthetic_set(24, seed=6, classes=("benign",))
    result = _audit(synthetic_set(24, seed=7, classes=("benign",)), _grouped(images, [10, *[1] * 14]), out)
    assert len(result.figures) == len(KEYS) + len(COARSE)


def _classes(images: ImageSet, names: list[str]) -> ImageSet:
    return replace(images, table=images.table.with_columns(pl.Series("class", names)))


def test_a_rare_class_does_not_thin_the_others(out: Path) -> None:
    real = _classes(synthetic_set(60, seed=1), ["benign"] * 24 + ["malignant"] * 20 + ["normal"] * 16)
    images = _classes(synthetic_set(60, seed=3), ["benign"] * 30 + ["malignant"] * 28 + ["normal"] * 2)
    result = _audit(images, real, out)
    figure = result.figure("fidelity.radiomic.all.frechet.value")
    assert (figure.synthetic, figure.real) == (55, 44)
    texts = [finding.text for finding in result.findings]
    assert any("normal, of which there are only 2" in text for text in texts)
    assert any("55 of 60 synthetic and 44 of 60 real images" in text for text in texts)
