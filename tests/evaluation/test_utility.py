from dataclasses import replace

import numpy as np
import pytest

from busigen.evaluation.context import AuditContext, SectionResult
from busigen.evaluation.utility.section import flagged, grouped_wilcoxon, probe_figures, run
from busigen.evaluation.utility.training import RECIPES, Outcome, Split
from tests.harness.synthetic_sets import synthetic_set

TINY = replace(RECIPES["quick"], side=32, channels=(4, 8, 8), steps=4, batch=4)


@pytest.fixture
def tiny(monkeypatch):
    """Trainings of a second: what they learn is not the point here."""
    for effort in ("quick", "full"):
        monkeypatch.setitem(RECIPES, effort, TINY)


def _context(out, **others):
    sets = {
        "synthetic": synthetic_set(12, 2),
        "real": synthetic_set(12, 1, ("benign", "malignant", "normal")),
        "train": None,
    }
    return AuditContext(out=out, **{**sets, **others})


def _trainings(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "sections" / "utility" / "trainings").glob("*.json")}


def test_every_arm_is_tested_on_all_held_out_images(tiny, tmp_path):
    result = run(_context(tmp_path, train=synthetic_set(10, 3), external=synthetic_set(6, 4)))
    for arm in ("real", "classic", "synthetic_1", "synthetic_only"):
        for measure in ("dice", "f1", "benign.dice", "malignant.dice", "small_lesions.dice", "large_lesions.dice"):
            figure = result.figure(f"utility.{arm}.{measure}")
            assert 0 <= figure.value.low <= figure.value.value <= figure.value.high <= 1
        assert result.figure(f"utility.{arm}.dice").real == 8
        assert result.figure(f"utility.{arm}.normals.false_positives").real == 4
        assert result.figure(f"utility.external.{arm}.dice").real == 6
    gain = result.figure("utility.synthetic_only.gain_over_real")
    difference = (
        result.figure("utility.synthetic_only.dice").value.value - result.figure("utility.real.dice").value.value
    )
    assert gain.value.value == pytest.approx(difference)
    assert gain.synthetic == 10  # one synthetic image for each real one
    assert gain.floor.low <= 0 <= gain.floor.high
    assert not result.flagged  # fewer than 20 lesions, and four steps teach nothing
    assert any("did not learn" in finding.text for finding in result.findings)


def test_full_effort_has_all_arms_that_the_set_is_large_enough_for(tiny, tmp_path):
    result = run(_context(tmp_path, train=synthetic_set(6, 3), effort="full"))
    keys = {figure.key for figure in result.figures}
    assert {"utility.paste.dice", "utility.synthetic_half.dice", "utility.synthetic_2.dice"} <= keys
    assert "utility.synthetic_4.dice" not in keys
    assert any("takes 24 synthetic images, and there are 12" in finding.text for finding in result.findings)
    assert len([name for name in _trainings(tmp_path) if name.startswith("paste-")]) == 3


def test_a_second_run_trains_nothing_and_says_the_same(tiny, tmp_path):
    first = run(_context(tmp_path))
    before = _trainings(tmp_path)
    second = run(_context(tmp_path))
    assert _trainings(tmp_path) == before
    assert first.figures == second.figures
    assert any("group folds" in finding.text for finding in first.findings)


def test_a_torn_file_or_another_pixel_is_trained_again(tiny, tmp_path):
    first = run(_context(tmp_path))
    names = set(_trainings(tmp_path))
    torn = next((tmp_path / "sections" / "utility" / "trainings").glob("synthetic_only-*.json"))
    torn.write_text(torn.read_text()[:40])
    assert run(_context(tmp_path)).figures == first.figures
    other = synthetic_set(12, 2)
    other.images[:, 100:140] = 0
    run(_context(tmp_path, synthetic=other))
    assert len(set(_trainings(tmp_path)) - names) == len(names)


def test_sets_without_lesions_are_said(tmp_path):
    result = run(_context(tmp_path, synthetic=synthetic_set(6, 2, ("normal",))))
    assert not result.figures
    assert "Not run" in result.findings[0].text


@pytest.fixture(scope="module")
def pair():
    return synthetic_set(60, 1), synthetic_set(60, 2)


def _probed(pair, real_dice, synthetic_dice, offset=(0.0, 0.0), seed=0):
    """The probe's figures where a network has these mean Dices, and this offset from synthetic masks."""
    rng = np.random.default_rng(seed)
    real, synthetic = pair

    def counts(mean):
        true = rng.normal(mean, 0.05, 60).clip(0, 1)
        return np.stack([1000 * true, 1000 * (1 - true), 1000 * (1 - true)], axis=1).astype(np.int64)

    def moved(by):
        return rng.normal(by, 2.0, (60, 2))

    nothing = np.zeros((0, 3), np.int64)
    parts = counts(real_dice), moved((0.0, 0.0)), counts(synthetic_dice), moved(offset)
    outcome = Outcome("real", 0, "held_out", *parts, nothing)
    context = AuditContext(synthetic=synthetic, real=real, train=None, out=None)
    result = SectionResult("utility")
    flagged(probe_figures(context, [outcome], [Split("held_out", real, np.arange(60))]), result)
    return {figure.key.removeprefix("utility.masks."): figure for figure in result.figures}


def test_masks_that_do_not_fit_are_flagged(pair):
    figures = _probed(pair, 0.8, 0.6)
    assert figures["dice"].flagged
    assert figures["dice"].value.value == pytest.approx(0.6, abs=0.03)  # 60 draws of sigma 0.05
    assert not figures["offset_x"].flagged


def test_displaced_masks_are_flagged_in_their_direction(pair):
    figures = _probed(pair, 0.8, 0.8, offset=(0.0, -6.0))
    assert [figures[name].flagged for name in ("dice", "offset_y", "offset_x")] == [False, False, True]
    assert figures["offset_x"].value.value == pytest.approx(-6, abs=1)  # median of 60 draws of sigma 2


@pytest.mark.parametrize("seed", range(5))
def test_masks_as_good_as_real_ones_are_not(pair, seed):
    assert not any(figure.flagged for figure in _probed(pair, 0.8, 0.8, seed=seed).values())


def test_patients_and_not_images_count_for_wilcoxon():
    rng = np.random.default_rng(0)
    patients = rng.normal(0.05, 0.1, 12)
    assert grouped_wilcoxon(np.repeat(patients, 20), np.repeat(np.arange(12), 20)) == pytest.approx(
        grouped_wilcoxon(patients, np.arange(12))
    )
    assert grouped_wilcoxon(np.zeros(8), np.arange(8)) == 1.0
