"""Several lesions an image: dealt, painted one after the other, apart from one another, and the same in any batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from busigen.api.functions import generate, source_options
from busigen.api.pairs import Pair
from busigen.data.geometry import edit_region, grow
from busigen.data.images import read_image
from busigen.data.letterbox import letterbox
from busigen.errors import AcceptanceError, UsageError
from busigen.mtf import RADIUS
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.dataset.format import Sample
from busigen.runtime.execution.factory import generate as generate_set
from busigen.runtime.execution.run import SourceOptions
from busigen.runtime.sampling.batching import DrawRequest
from busigen.runtime.sampling.conditions import SampleConditions, parse_conditions, parse_lesions
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder, synthetic
from busigen.runtime.sampling.sampler import Sampler
from busigen.runtime.sampling.several import free_place
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.runtime.sampling.inputs.test_given_masks import save_image
from tests.runtime.sampling.test_grid import Placed

SEED = 6
SMALL = {"size": "0.01:0.03", "depth": "0.2:0.7", "across": "0.15:0.85", "height_width": "0.7"}


def several(engine: QuickEngine | None = None, mix: str = "1:0.5,2:0.25,3:0.25", **options: object) -> Sampler:
    options = {"asked": parse_conditions(**SMALL), **options}
    return quick_sampler(engine or Placed(), lesions=parse_lesions(mix), **options)


def draw(sampler: Sampler, count: int, first: int = 0) -> list[Sample]:
    return sampler.draw(SEED, range(first, first + count), lambda done: None).samples


def same(one: Sample, other: Sample) -> bool:
    pictures = zip((one.image, one.mask, *one.masks), (other.image, other.mask, *other.masks), strict=True)
    return (one.label, one.attempt, one.row) == (other.label, other.attempt, other.row) and all(
        np.array_equal(a, b) for a, b in pictures
    )


@pytest.fixture
def healthy(tmp_path: Path) -> HealthyFolder:
    for number in range(5):
        save_image(tmp_path / f"healthy/{number}.png", (400, 300 + 30 * number), seed=number)
    return HealthyFolder(tmp_path / "healthy")


def test_each_class_and_category_gets_its_share_of_numbers() -> None:
    asked = parse_conditions(birads="3:0.5,4:0.5", **SMALL)
    samples = draw(several(asked=asked, normals=0.2), 40)
    found = Counter((sample.label, sample.row["asked_birads"], len(sample.masks)) for sample in samples)
    assert found[("normal", None, 0)] == 8
    for label in ("benign", "malignant"):
        for category in ("3", "4"):
            assert [found[(label, category, number)] for number in (1, 2, 3)] == [4, 2, 2]
    assert all(sample.row["lesions"] == len(sample.masks) for sample in samples)


@pytest.mark.parametrize("real", [False, True])
def test_no_two_edit_regions_meet_and_nothing_else_is_changed(real: bool, healthy: HealthyFolder) -> None:
    sampler = several(mix="3", healthy=healthy if real else None)
    for sample in draw(sampler, 6):
        assert len(sample.masks) == 3 and np.array_equal(np.logical_or.reduce(sample.masks), sample.mask)
        valid = np.ones_like(sample.mask)
        if real:
            pixels, box = letterbox(read_image(healthy.folder / sample.row["healthy_file"]).pixels)
            valid = box.valid
        edits = [edit_region(mask, valid) for mask in sample.masks]
        assert np.sum(edits, axis=0).max() == 1
        if real:
            assert np.array_equal(sample.image[~np.any(edits, axis=0)], pixels[~np.any(edits, axis=0)])
            assert all((sample.image[mask] != pixels[mask]).mean() > 0.5 for mask in sample.masks)
            assert sample.row["edit_pixels"] == np.sum(edits)


def test_rows_say_what_was_asked_and_found_of_each_lesion() -> None:
    sampler = several()
    for sample in draw(sampler, 12):
        assert sample.row.keys() == sampler.row_types().keys() - {f"mask_{n}_sha256" for n in (1, 2, 3)}
        for number in (1, 2, 3):
            own = {name: sample.row[f"lesion_{number}_{name}"] for name in ("pixels", "area_share", "asked_size")}
            if number > len(sample.masks):
                assert set(own.values()) == {None}
                continue
            mask = sample.masks[number - 1]
            assert own["pixels"] == mask.sum()
            assert own["area_share"] == pytest.approx(own["asked_size"], rel=0.1)
            rows = np.flatnonzero(mask.any(axis=1))
            assert [sample.row[f"lesion_{number}_box_{side}"] for side in ("top", "bottom")] == [rows[0], rows[-1] + 1]
        assert sample.row["area_share"] == sample.row["lesion_1_area_share"]
        asked = [sample.row[f"lesion_{number}_asked_depth"] for number in range(1, len(sample.masks) + 1)]
        assert len(set(asked)) == len(asked)


def test_samples_with_one_lesion_are_those_of_a_run_without_the_option() -> None:
    plain = draw(quick_sampler(Placed(), asked=parse_conditions(**SMALL)), 8)
    mixed = draw(several(), 8)
    assert sum(len(sample.masks) == 1 for sample in mixed) == 4
    for one, other in zip(mixed, plain, strict=True):
        if len(one.masks) == 1:
            assert np.array_equal(one.image, other.image) and np.array_equal(one.mask, other.mask)
            assert one.row | other.row == one.row
        elif one.attempt == other.attempt:
            assert np.array_equal(one.masks[0], other.mask)


@pytest.mark.parametrize("real", [False, True])
def test_neither_batches_nor_where_a_run_begins_change_a_sample(real: bool, healthy: HealthyFolder) -> None:
    folder = healthy if real else None
    samples = draw(several(healthy=folder), 12)
    alone = [draw(several(healthy=folder, batch_size=1), 1, first=index)[0] for index in range(6, 12)]
    assert all(same(one, other) for one, other in zip(samples[6:], alone, strict=True))
    assert all(same(a, b) for a, b in zip(draw(several(healthy=folder, batch_size=16), 12), samples, strict=True))


def test_stage_1_sees_no_lesion_and_the_painting_stages_those_that_are_there() -> None:
    seen: set[bytes] = set()

    class Listening(Placed):
        def run(self, graph, inputs):  # type: ignore[no-untyped-def]
            if graph == "context" and not inputs["keep"].all():
                seen.update({image.tobytes() for image in inputs["image"]})
            return super().run(graph, inputs)

    engine = Listening()
    found = several(engine, mix="2").draw(SEED, range(4), lambda done: None)
    backgrounds = {image.tobytes() for image in engine.whole}
    # One for each draw; with a first lesion, too, for each that was not refused before.
    assert len(backgrounds) == len(found.samples) + len(found.rejections)
    painted = seen - backgrounds
    assert len(found.samples) <= len(painted) <= len(backgrounds)


def test_a_lesion_that_finds_no_room_is_drawn_elsewhere_and_the_draw_refused_in_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    crowded = parse_conditions(size="0.1", depth="0.4", across="0.4:0.6", height_width="0.7")
    with pytest.raises(AcceptanceError, match="lesions too near") as caught:
        draw(several(mix="2", asked=crowded), 1)
    assert "ask for less" in caught.value.fix
    (said,) = caplog.messages
    assert said.startswith("sample 0 was refused 8 times, last for: ")
    assert said.endswith(". Drawing goes on, 64 times at most, and takes longer")
    tight = parse_conditions(size="0.04", depth="0.4", across="0.1:0.9", height_width="0.7")
    found = several(mix="2", asked=tight).draw(SEED, range(8), lambda done: None)
    assert "lesions too near" not in {draw.reason for draw in found.rejections}


def test_a_further_lesion_is_asked_for_where_the_others_leave_room() -> None:
    taken, valid = np.zeros((256, 256), bool), np.ones((256, 256), bool)
    taken[:, :140], valid[:, :40] = True, False
    bounds = {"across": (0.1, 0.9), "depth": (0.3, 0.3)}
    at = free_place([0.0, 0.5, 0.4, 0.5, 0.9, 0.5, 0.99, 0.5], bounds, [taken], valid)
    # The first two lie in the other's edit region; shares are of the image without its bars.
    assert at == {"across": pytest.approx(0.82), "depth": 0.3}
    full = free_place([0.2, 0.5, 0.7, 0.5], bounds, [np.ones_like(taken)], valid)
    assert full == {"across": pytest.approx(0.66), "depth": 0.3}


def test_python_takes_numbers_and_mixes() -> None:
    assert source_options({"lesions": 2}).lesions == "2"
    assert source_options({"lesions": {1: 0.75, 2: 0.25}}).lesions == "1:0.75,2:0.25"
    assert parse_lesions("1") == parse_lesions(None) == {}


@pytest.mark.parametrize(
    ("options", "problem", "fix"),
    [
        ({"lesions": "4"}, "'4' is no number of lesions from 1 to 3", "1:0.9,2:0.1"),
        ({"lesions": "0"}, "'0' is no number", "Choose one of: 1, 2, 3"),
        ({"lesions": "1:0.5,2:0.6"}, r"whose shares sum to 1\.1", "1:9,2:1"),
        ({"lesions": "1:0.5,1:0.5"}, "names 1 twice", "1:0.9,2:0.1"),
        ({"lesions": "two"}, "'two' is no number", "1:0.9,2:0.1"),
        ({"lesions": "2:-1"}, "gives '2' the weight '-1'", "above 0"),
        ({"lesions": "2", "vary": "class"}, "a grid varies one lesion", "Leave out --lesions"),
        ({"lesions": "2", "masks": Path("masks")}, "--masks masks gives each image its mask", "Leave out --lesions"),
        ({"lesions": "1:1,2:1", "depth": "0.3", "across": "0.5"}, "in one place", "--across 0.2:0.8"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(options: dict[str, object], problem: str, fix: str) -> None:
    with pytest.raises(UsageError, match=problem) as caught:
        SourceOptions(**options).conditions()  # type: ignore[arg-type]
    assert fix in caught.value.fix


def test_the_shipped_bundle_paints_two_lesions_that_differ_from_what_was_there() -> None:
    pairs = list(generate(3, seed=2, lesions=2, threads=1, batch_size=4))
    single = list(generate(3, seed=2, threads=1, batch_size=4))
    for pair, one in zip(pairs, single, strict=True):
        assert isinstance(pair, Pair) and len(pair.masks) == 2 and len(one.masks) == 1
        assert np.array_equal(pair.masks[0] | pair.masks[1], pair.mask)
        if pair.row["attempt"] == one.row["attempt"]:
            # The first lesion is that of the same sample with one, and the second stands where that has none.
            assert np.array_equal(pair.masks[0], one.mask)
            second = pair.masks[1]
            assert abs(float(pair.image[second].mean()) - float(one.image[second].mean())) > 1
            # The filter reaches as far beyond the region that was painted.
            elsewhere = ~grow(edit_region(second, np.ones_like(second)), RADIUS)
            assert np.array_equal(pair.image[elsewhere], one.image[elsewhere])


def test_small_sets_with_categories_have_about_the_shares_that_were_asked_for() -> None:
    """Of every class and category, the first samples are not all of the rarest number."""
    mix = {"2": 0.1, "3": 0.4, "4": 0.3, "5": 0.2}
    plan = quick_sampler(QuickEngine(), asked=SampleConditions(birads=mix), lesions={"1": 0.9, "2": 0.1}).plan
    blank = np.zeros((256, 256), np.uint8)
    told = [plan.draft(7, DrawRequest(index=k, attempt=0), synthetic(blank, (256, 256))).lesions for k in range(1000)]
    # One for each of the eight kinds more or less than their share.
    for count in (12, 50, 200, 1000):
        assert abs(told[:count].count(2) - 0.1 * count) <= 3


def test_a_first_outline_that_is_refused_costs_no_background_where_the_bundle_says_so() -> None:
    bundle = Bundle.recorded(default_bundle())
    drawn = {}
    for most in (1, 4):
        told = replace(bundle, info={**bundle.info, "outlines": most})
        sampler = Sampler(told, QuickEngine(), classes={"benign": 1.0}, batch_size=4)
        samples = drawn[most] = sampler.draw(5, range(24), lambda done: None).samples
        if most == 4:
            for sample in samples:
                outside = ~edit_region(sample.mask, np.ones_like(sample.mask))
                background = sampler.background(5, sample.index, sample.attempt)
                # What no lesion reaches is the background's own, whichever outline it was.
                assert np.array_equal(sample.image[outside], background[outside])
    # Each attempt draws a background of its own.
    once, less = (sum(sample.attempt for sample in part) for part in drawn.values())
    assert once > less
    for one, other in zip(*drawn.values(), strict=True):
        if not one.attempt:
            assert np.array_equal(one.image, other.image) and one.row == other.row


def test_the_summary_counts_categories_and_numbers_that_were_asked_for(tmp_path: Path) -> None:
    asked = parse_conditions(**SMALL, birads="2:0.5,4:0.5")
    report = generate_set(several(mix="1:0.5,2:0.5", asked=asked, normals=0.2), tmp_path / "set", count=10, seed=1)
    table = pl.read_parquet(tmp_path / "set/manifest.parquet")
    said = "\n".join(report.lines())
    for category in ("2", "4"):
        assert f"{table['asked_birads'].to_list().count(category)} of {category}" in said
    told = ", ".join(f"{table['lesions'].to_list().count(number)} with {number}" for number in range(3))
    assert f"lesions an image: {told}" in said
    plain = generate_set(several(mix="1"), tmp_path / "plain", count=2, seed=1)
    assert "asked for" not in "\n".join(plain.lines()) and "lesions an image" not in "\n".join(plain.lines())
