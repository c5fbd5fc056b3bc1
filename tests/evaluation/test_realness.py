from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from PIL import Image
from scipy import ndimage

from busigen.evaluation.context import AuditContext, fingerprint
from busigen.evaluation.realness.classifiers import VIEWS, Task, auc, folds, resnet_scores
from busigen.evaluation.realness.section import run
from tests.harness.synthetic_sets import synthetic_set

COUNT = 32


@pytest.fixture(scope="module")
def real():
    return synthetic_set(COUNT, 1)


@pytest.fixture(scope="module")
def others():
    return synthetic_set(COUNT, 2)


def _audit(synthetic, real, out, **others):
    return run(AuditContext(synthetic=synthetic, real=real, train=None, out=out, **others))


def _blurred(images):
    return replace(images, images=np.stack([ndimage.gaussian_filter(image, 1.0) for image in images.images]))


def test_two_draws_of_one_kind_are_not_told_apart(real, others, tmp_path):
    result = _audit(others, real, tmp_path)
    assert not result.flagged
    for name in VIEWS:
        figure = result.figure(f"realness.{name}.auc")
        assert (figure.synthetic, figure.real) == (COUNT, COUNT)
        assert figure.floor is not None
        # Chance that noise leaves it, with 16 groups a side, is about five percent per view; the seeds are fixed.
        assert result.details[figure.key]["null_low"] < figure.value.value < result.details[figure.key]["null_high"]


def test_synthetic_backgrounds_do_not_make_one_group_of_all_images(real, others, tmp_path):
    described = replace(others, table=others.table.with_columns(background=pl.lit("synthetic")))
    result = _audit(described, real, tmp_path)
    assert [figure.synthetic for figure in result.figures] == [COUNT] * 4


def test_blur_is_told_in_every_view_and_shown(real, others, tmp_path):
    result = _audit(_blurred(others), real, tmp_path)
    # Where speckle is averaged away, blurring it is too.
    assert [figure.key for figure in result.figures if not figure.flagged] == ["realness.coarse.auc"]
    folder = tmp_path / "sections" / "realness"
    assert {"auc.svg", "obvious.png", "convincing.png"} == {picture.file for picture in result.pictures}
    assert Image.open(folder / "obvious.png").size == (5 * 128, 3 * 128)


def test_a_seam_is_told_by_the_ring(real, others, tmp_path):
    seam = others.masks & ~ndimage.binary_erosion(others.masks, np.ones((1, 3, 3)), iterations=2)
    lined = replace(others, images=np.where(seam, 128, others.images).astype(np.uint8))
    assert _audit(lined, real, tmp_path).figure("realness.ring.auc").flagged


@pytest.mark.slow
def test_calipers_that_are_painted_over_give_nothing_away(real, others, tmp_path):
    marked = real.images.copy()
    marked[:, 118:139, 127:130] = marked[:, 127:130, 118:139] = 255
    assert _audit(others, replace(real, images=marked), tmp_path / "seen").figure("realness.whole.auc").flagged
    hidden = _audit(others, replace(real, images=marked, clean=real.images), tmp_path / "hidden")
    assert hidden.figures == _audit(others, real, tmp_path / "without").figures


def test_the_same_seed_gives_the_same_figures_and_pictures(real, others, tmp_path):
    small, few = real.take(np.arange(16)), others.take(np.arange(16))
    first, second = (_audit(few, small, tmp_path / name, seed=4) for name in "ab")
    assert first.figures == second.figures
    assert all("never flagged" in figure.note for figure in first.figures)
    one, other = (tmp_path / name / "sections" / "realness" for name in "ab")
    assert all((one / at.file).read_bytes() == (other / at.file).read_bytes() for at in first.pictures)


def test_crop_and_ring_are_the_headline_where_backgrounds_are_real(real, others, tmp_path):
    small, few = real.take(np.arange(12)), others.take(np.arange(12))
    result = _audit(few, small, tmp_path, backgrounds="real")
    assert {figure.key for figure in result.figures if figure.headline} == {"realness.lesion.auc", "realness.ring.auc"}
    assert any("painted into real images" in finding.text for finding in result.findings)


def test_a_class_on_one_side_is_left_out_and_said(real, others, tmp_path):
    benign = others.take(others.classes == "benign")
    result = _audit(benign, real.take(np.arange(24)), tmp_path)
    assert result.figure("realness.lesion.auc").real == 12
    assert any("malignant" in finding.text for finding in result.findings)


def test_images_of_one_background_are_one_group_and_too_few_groups_are_said(real, others, tmp_path):
    table = others.table.with_columns(pl.lit("healthy").alias("background"))
    result = _audit(replace(others, table=table), real, tmp_path)
    assert not result.figures
    assert any("1 groups" in finding.text for finding in result.findings)


@pytest.mark.slow
def test_the_resnet_learns_what_is_plain(others):
    rng = np.random.default_rng(0)
    task = Task(np.repeat([0, 1], 48), np.arange(96) % 2, np.arange(96))
    fine = rng.integers(0, 255, (96, 64, 64)).astype(np.uint8)
    fine[48:] = ndimage.gaussian_filter(fine[48:], (0, 2, 2))
    fold = folds(task, 2, 0)
    scores = resnet_scores(fine, task, fold, seed=0, epochs=12)
    assert auc(scores, task, fold) > 0.9  # noise against blurred noise: any working network is near 1


def test_a_kept_section_does_not_outlive_another_cleaning(real):
    other = replace(real, clean=np.where(real.overlays, 0, real.images // 2).astype(np.uint8))
    assert fingerprint(other) != fingerprint(real)
    assert fingerprint(replace(real, clean=real.images)) == fingerprint(real)
