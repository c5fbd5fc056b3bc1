"""Copies of training images are found, and nothing else is called a copy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from busigen.evaluation.context import AuditContext, Backgrounds, ImageSet, SectionResult
from busigen.evaluation.privacy import nearest
from busigen.evaluation.privacy import section as privacy
from busigen.evaluation.reading.sets import from_prepared
from busigen.evaluation.statistics.grouped import halves
from busigen.runtime.progress import Progress
from tests.harness.planted_defects import with_copies
from tests.harness.synthetic_sets import synthetic_set


def _audit(
    synthetic: ImageSet, real: ImageSet, train: ImageSet | None, out: Path, backgrounds: Backgrounds = "unknown"
) -> SectionResult:
    return privacy.run(AuditContext(synthetic, real, train, out, backgrounds=backgrounds))


class Passes(Progress):
    """Remembers what was counted."""

    def __init__(self) -> None:
        super().__init__()
        self.described: list[str] = []

    def start(self, what, total, done=0, **more):
        self.described.append(what)
        super().start(what, total, done, **more)


@pytest.fixture(scope="module")
def train() -> ImageSet:
    return synthetic_set(80, seed=1)


@pytest.fixture(scope="module")
def held() -> ImageSet:
    return synthetic_set(50, seed=2)


@pytest.fixture(scope="module")
def fresh() -> ImageSet:
    return synthetic_set(50, seed=3)


@pytest.fixture(scope="module")
def copied(train: ImageSet, held: ImageSet, fresh: ImageSet, tmp_path_factory: pytest.TempPathFactory) -> SectionResult:
    return _audit(with_copies(fresh, train, 0.3, 0), held, train, tmp_path_factory.mktemp("copied"))


def test_copies_of_training_images_are_found_and_counted(copied: SectionResult) -> None:
    for region in ("crop", "whole"):
        figure = copied.figure(f"privacy.{region}.all.copies.value")
        assert figure.flagged
        # 30 % were planted; two of fifty may fall below the threshold, or above it by chance.
        assert figure.value.value == pytest.approx(0.30, abs=0.04)
        assert figure.floor is not None and figure.floor.high is not None and figure.floor.high < 0.1
        assert copied.details[region]["nearest"][0]["mirrored"]
    assert copied.flagged


def test_the_nearest_pairs_are_shown_in_small_pictures(
    train: ImageSet, held: ImageSet, fresh: ImageSet, tmp_path: Path
) -> None:
    passes = Passes()
    context = AuditContext(fresh, held, train, tmp_path, progress=passes)
    result = privacy.run(context)
    compared = [what for what in passes.described if what.startswith("comparing")]
    assert len(compared) == len(set(compared)) == 6, "each pass over the images says what it compares"
    assert [picture.file for picture in result.pictures] == ["nearest-crop.png", "nearest-whole.png"]
    for picture in result.pictures:
        path = context.folder("privacy") / picture.file
        assert path.stat().st_size < 400_000
        with Image.open(path) as sheet:
            assert sheet.mode == "L"
            assert sheet.width > sheet.height > 280
    assert SectionResult.from_dict(result.to_dict()) == result


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_images_of_other_patients_are_no_copies(train: ImageSet, seed: int, tmp_path: Path) -> None:
    first, second = halves(synthetic_set(100, seed=4).groups, np.random.default_rng(seed))
    real = synthetic_set(100, seed=4)
    result = _audit(real.take(first), real.take(second), train, tmp_path)
    assert not result.flagged, result.findings
    assert len(result.figures) == 15


def test_an_image_that_the_set_repeats_is_no_breach_of_privacy(
    train: ImageSet, held: ImageSet, fresh: ImageSet, tmp_path: Path
) -> None:
    result = _audit(fresh.take(np.r_[0:30, np.full(20, 7)]), held, train, tmp_path)
    assert not result.flagged, result.findings


def test_without_training_images_copies_of_real_ones_are_found_and_the_rest_left_open(
    held: ImageSet, fresh: ImageSet, tmp_path: Path
) -> None:
    clean = _audit(fresh, held, None, tmp_path)
    assert not clean.flagged
    assert any("none of that can be concluded" in finding.text for finding in clean.findings)
    assert [figure.key.split(".")[3] for figure in clean.figures] == ["copies", "copies"]
    copies = _audit(with_copies(fresh, held, 0.3, 0), held, None, tmp_path)
    assert copies.figure("privacy.crop.all.copies.value").flagged
    assert copies.figure("privacy.whole.all.copies.value").flagged


def test_whole_images_painted_into_real_ones_are_not_blamed_but_lesions_are(
    train: ImageSet, held: ImageSet, fresh: ImageSet, tmp_path: Path
) -> None:
    result = _audit(with_copies(fresh, train, 0.3, 0), held, train, tmp_path, "real")
    assert "not private" in result.findings[0].text
    assert not result.figure("privacy.whole.all.copies.value").flagged
    assert result.figure("privacy.crop.all.copies.value").flagged


@pytest.mark.parametrize("count", [1, 6, 16])
def test_few_images_give_notes_but_no_flags(train: ImageSet, held: ImageSet, count: int, tmp_path: Path) -> None:
    result = _audit(train.take(np.arange(count)), held, train, tmp_path)
    assert not result.flagged
    assert bool(result.figures) == (count >= 8)
    assert result.figures or any("Too few independent images" in finding.text for finding in result.findings)
    # Every one of them is a copy, which the pictures show; a note says so only where there are enough to judge.
    assert len(result.pictures) == 2
    noted = any(f"{count} of {count} whole images correlate" in finding.text for finding in result.findings)
    assert noted == ("threshold" in result.details["whole"]) == bool(result.figures)


def test_without_figures_no_threshold_is_drawn(train: ImageSet, held: ImageSet, tmp_path: Path) -> None:
    result = _audit(train.take(np.arange(16)), held.take(np.arange(2)), None, tmp_path)
    assert not result.figures
    assert set(result.details["crop"]) == {"nearest"}
    assert not any("correlate above" in finding.text for finding in result.findings)


def test_training_images_of_unknown_class_are_compared(
    train: ImageSet, held: ImageSet, fresh: ImageSet, tmp_path: Path
) -> None:
    unknown = replace(train, table=train.table.with_columns(pl.lit("unknown").alias("class")))
    result = _audit(with_copies(fresh, train, 0.3, 0), held, unknown, tmp_path)
    assert result.figure("privacy.crop.all.copies.value").flagged
    texts = [finding.text for finding in result.findings]
    assert any("share no class" in text for text in texts)
    assert not any("no lesions to compare" in text for text in texts)


def test_normals_without_lesions_are_compared_as_whole_images_only(tmp_path: Path) -> None:
    def normals(seed: int) -> ImageSet:
        return synthetic_set(24, seed, classes=("normal",))

    result = _audit(normals(5), normals(6), normals(7), tmp_path)
    assert {figure.key.split(".")[1] for figure in result.figures} == {"whole"}
    assert any("no lesions to compare" in finding.text for finding in result.findings)


def test_a_stray_duplicate_among_the_held_out_does_not_hide_copies() -> None:
    rng = np.random.default_rng(0)
    usual = rng.normal(0.35, 0.05, 300)
    threshold = nearest.copy_threshold(usual)
    assert nearest.copy_threshold(np.append(usual, [0.999, 0.98])) == pytest.approx(threshold, abs=0.01)
    assert usual.max() < threshold < 0.8


def test_the_attacker_finds_members_by_chance_alone_where_nothing_leaks() -> None:
    rng = np.random.default_rng(1)
    members, others = rng.normal(size=2000), rng.normal(size=1000)
    # Four standard errors: sqrt((1/n + 1/m) / 12) = 0.011.
    assert nearest.auc(members, others) == pytest.approx(0.5, abs=0.045)
    assert nearest.auc(members + 100, others) == 1
    leaking = np.append(members, np.full(500, 9.0))
    # A fifth leaks, and 1 % of the rest lie above the threshold by chance.
    assert nearest.detected(leaking, others) == pytest.approx(0.2 + 0.8 * 0.01, abs=0.02)


def test_authenticity_asks_whether_another_patients_training_image_is_as_near() -> None:
    places, groups = np.array([0.0, 1.0, 1.1, 5.0]), np.array([0, 1, 1, 2])
    within = -np.abs(places[:, None] - places[None, :])
    queries = np.array([0.9, 0.2, -1.5, 3.0, 9.5])
    found = nearest.authentic(-np.abs(queries[:, None] - places[None, :]), within, groups)
    # Distance to the nearest training image against that image's to another patient's:
    # 0.1 < 1, 0.2 < 1, 1.5 > 1, 1.9 > 1.1, 4.5 > 3.9.
    assert found.tolist() == [False, False, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_real_images(real_data: Path | None, seed: int, tmp_path: Path) -> None:
    if real_data is None:
        train, real = synthetic_set(300, seed=10), synthetic_set(200, seed=11)
    else:
        prepare([real_data / "Dataset_BUSI_with_GT", real_data / "BUSBRA"], tmp_path / "prepared")
        prepared = Prepared.open(tmp_path / "prepared")
        train = from_prepared(prepared, ("train",), lesions_only=True)
        real = from_prepared(prepared, ("val", "test"), lesions_only=True)
    first, second = halves(real.groups, np.random.default_rng(seed))
    clean = _audit(real.take(first), real.take(second), train, tmp_path)
    assert not clean.flagged, clean.findings
    copied = _audit(with_copies(real.take(first), train, 0.3, seed), real.take(second), train, tmp_path)
    for region in ("crop", "whole"):
        figure = copied.figure(f"privacy.{region}.all.copies.value")
        assert figure.flagged
        # A copy whose lesion was shifted out of the image may not be found as a crop.
        assert figure.value.value == pytest.approx(0.30, abs=0.03)
