from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from busigen.evaluation.physics import section as physics
from busigen.evaluation.physics.features import NAMES, features, for_set, matrix
from tests.harness.planted_defects import DEFECTS, audit_of, draw_set


@pytest.fixture(scope="module")
def pair():
    """Two sets drawn by the same rules."""
    return draw_set(70, seed=1), draw_set(70, seed=2)


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """One report's folder for the module, so that the real side is measured once."""
    return tmp_path_factory.mktemp("report")


def _flagged(result):
    return {figure.key for figure in result.figures if figure.flagged}


def _says(result, words):
    return any(words in finding.text for finding in result.findings if finding.level == "flag")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_two_sets_of_one_kind_raise_no_flag(pair, out, seed):
    synthetic, real = pair
    context = audit_of(synthetic, real, out)
    context.seed = seed
    result = physics.run(context)
    assert not result.flagged
    assert not _flagged(result)
    assert len(result.figures) > 200


@pytest.mark.parametrize(
    ("defect", "key", "words"),
    [
        ("blur", "physics.image.all.high.ks", "smoother than real"),
        ("upside-down", "physics.depth.all.6.ks", "upside-down"),
        ("white noise", "physics.background.all.lateral.ks", "no beam has shaped"),
        ("masks moved by 6 px", "physics.margin.all.offset.ks", "Masks do not lie on the lesions"),
        ("classes swapped", "physics.classes.swap", "Classes look exchanged"),
    ],
)
def test_planted_defects_are_named(pair, out, defect, key, words):
    synthetic, real = pair
    result = physics.run(audit_of(DEFECTS[defect](synthetic), real, out))
    assert key in _flagged(result)
    assert _says(result, words)


def test_figures_say_how_they_came_about(pair, out):
    synthetic, real = pair
    result = physics.run(audit_of(DEFECTS["blur"](synthetic), real, out))
    figure = result.figure("physics.image.all.slope.wasserstein")
    assert (figure.synthetic, figure.real) == (70, 70)
    assert figure.value.low <= figure.value.value <= figure.value.high
    assert figure.floor.high < figure.value.low
    assert 3 <= sum(figure.headline for figure in result.figures) <= 5
    assert 2 <= len(result.pictures) <= 6
    for picture in result.pictures:
        assert (out / "sections" / "physics" / picture.file).read_text(encoding="utf-8").lstrip().startswith("<?xml")
    assert physics.SectionResult.from_dict(result.to_dict()) == result


def test_classes_given_at_random_differ_less_than_real_ones(pair, out):
    synthetic, real = pair
    labels = np.random.default_rng(0).permutation(synthetic.classes)
    mixed = replace(synthetic, table=synthetic.table.with_columns(pl.Series("class", labels)))
    swap = physics.run(audit_of(mixed, real, out)).figure("physics.classes.swap")
    assert swap.flagged
    # Labels that say nothing lie half-way; 35 images a class leave them 0.15 to either side.
    assert swap.value.value == pytest.approx(0.5, abs=0.25)


def test_few_images_are_shown_but_not_flagged(pair, tmp_path):
    synthetic, real = pair
    few = DEFECTS["upside-down"](synthetic.take(np.arange(16)))
    result = physics.run(audit_of(few, real, tmp_path))
    assert result.figures
    assert not result.flagged
    assert any("Fewer than 20" in finding.text for finding in result.findings)


def test_a_class_that_one_side_lacks_is_left_out(pair, tmp_path):
    synthetic, real = pair
    result = physics.run(audit_of(synthetic.take(synthetic.classes == "benign"), real, tmp_path))
    assert {figure.key.split(".")[2] for figure in result.figures} == {"benign"}
    assert any("malignant" in finding.text for finding in result.findings if finding.level == "note")


def test_sets_of_normals_are_compared_without_lesions(pair, tmp_path):
    sets = []
    for part in pair:
        part = part.take(np.arange(24))
        table = part.table.with_columns(part.table["class"].replace(["benign", "malignant"], ["normal", "normal"]))
        sets.append(type(part)(part.name, part.images, np.zeros_like(part.masks), part.valid, part.overlays, table))
    result = physics.run(audit_of(*sets, tmp_path))
    assert not any(figure.key.startswith(("physics.shape", "physics.lesion")) for figure in result.figures)
    assert any(figure.key.startswith("physics.depth") for figure in result.figures)


def test_empty_sets_are_said_to_be_empty(pair, tmp_path):
    synthetic, real = pair
    result = physics.run(audit_of(synthetic.take(np.arange(0)), real, tmp_path))
    assert not result.figures
    assert "no images" in result.findings[0].text


def test_features_are_undefined_rather_than_wrong_without_a_lesion(pair):
    part = pair[0].take(np.arange(2))
    part.masks[0] = False  # ``take`` has copied them.
    table = features(part)
    lesion = [name for name in NAMES if name.startswith(("lesion", "ring", "margin", "shape", "posterior"))]
    assert table.select(lesion).row(0) == pytest.approx([np.nan] * len(lesion), nan_ok=True)
    assert not any(np.isnan(table.row(1)[3:]))
    filled = matrix(table)
    assert filled.shape == (2, len(NAMES))
    assert filled[0] == pytest.approx(np.where(np.isnan(table.row(0)[3:]), filled[1], table.row(0)[3:]))


def test_measurements_are_kept_and_belong_to_the_pixels(pair, tmp_path):
    part = pair[0].take(np.arange(3))
    context = audit_of(part, part, tmp_path)
    first = for_set(context, part)
    assert for_set(context, part).equals(first, null_equal=True)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    changed = DEFECTS["blur"](part)
    assert not for_set(context, changed).equals(first)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_measurements_are_made_again(pair, tmp_path):
    part = pair[0].take(np.arange(2))
    context = audit_of(part, part, tmp_path)
    first = for_set(context, part)
    next((tmp_path / "cache").iterdir()).write_bytes(b"damaged")
    assert for_set(context, part).equals(first)


def test_notes_say_why_there_is_no_floor_and_no_interval():
    blank = np.full((1, 1), np.nan)
    distances = physics.Distances(np.ones((1, 1)), *[blank] * 6)
    figure = physics._figure("a.b", "b", (distances, 0, 0), (9, 9), float("nan"), "", "meaning")
    assert figure.floor is None and figure.value.low is None
    assert "too few groups of real images have a value" in figure.note
    assert "no interval: most resamples hold no value" in figure.note
