"""Grids: equal backgrounds and noise in a group, and nothing but what was varied is asked for otherwise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from PIL import Image

from busigen.data.geometry import edit_region
from busigen.errors import OutputError, UsageError
from busigen.registry import ATTRIBUTES, BIRADS
from busigen.runtime.dataset.format import Plan, command_line
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.run import GenerateOptions, SourceOptions
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.grid import HELD, Grid, levels_of
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.hashing import hashes
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.runtime.maintenance.test_given_masks import change
from tests.runtime.sampling.inputs.test_given_masks import save_image

SEED = 4
VARY = "class,birads=3/5"


class Placed(QuickEngine):
    """Draws ellipses where they are asked for, of the size that is; some noise is refused, for one category alone."""

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        if not graph.startswith("mask-"):
            return super().run(graph, inputs)
        rows, columns = np.mgrid[0:256, 0:256].astype(np.float32) + 0.5
        found = []
        for asked, noise in zip(inputs["asked"], inputs["noise"], strict=True):
            across, down, size, ratio = asked[:4]
            worst = bool(asked[8 + BIRADS.index("5")])
            shift = 20.0 if noise[0] > 0.6 and worst else 0.0
            # No two of a group are the same.
            radius = np.exp(size) / np.sqrt(np.pi) * (1.0 + 0.02 * ("malignant" in graph) + 0.01 * worst)
            tall = np.exp(ratio / 2)
            distance = np.hypot((rows - down * 256) / tall, (columns - across * 256 - shift) * tall)
            found.append((radius - distance)[None])
        return np.stack(found).astype(np.float32)


def sampler(vary: str = VARY, **options: object) -> Sampler:
    grid = Grid.parse(vary)
    return quick_sampler(Placed(), grid=grid, asked=grid.held({}), **options)


@pytest.fixture
def healthy(tmp_path: Path) -> HealthyFolder:
    for number in range(5):
        save_image(tmp_path / f"healthy/{number}.png", (400, 300 + 30 * number), seed=number)
    return HealthyFolder(tmp_path / "healthy")


@pytest.mark.parametrize("real", [False, True])
def test_a_group_differs_in_its_levels_and_inside_of_its_edit_regions_alone(real: bool, healthy: HealthyFolder) -> None:
    samples = sampler(healthy=healthy if real else None).draw(SEED, range(24), lambda done: None).samples
    levels = [sample.row["grid_level"] for sample in samples[:4]]
    assert levels == [f"{label}, BI-RADS {birads}" for label in ("benign", "malignant") for birads in (3, 5)]
    for start in range(0, 24, 4):
        group = samples[start : start + 4]
        assert [s.row["grid_level"] for s in group] == levels
        assert {s.row["grid_group"] for s in group} == {start // 4}
        assert [(s.label, s.row["asked_birads"]) for s in group] == [
            (label, birads) for label in ("benign", "malignant") for birads in ("3", "5")
        ]
        assert len({s.attempt for s in group}) == 1
        for name in (*(f"asked_{name}" for name in ATTRIBUTES), "healthy_sha256", "letterbox_top", "letterbox_left"):
            assert len({s.row[name] for s in group}) == 1, name
        for other in group[1:]:
            valid = np.ones((256, 256), dtype=bool)
            outside = ~edit_region(group[0].mask, valid) & ~edit_region(other.mask, valid)
            assert np.array_equal(group[0].image[outside], other.image[outside])
    if real:
        first = {s.row["healthy_sha256"] for s in samples[:20] if not s.attempt}
        assert len(first) == len({s.row["grid_group"] for s in samples[:20] if not s.attempt}), "images take their turn"
    else:
        tops = {sample.image[sample.row["letterbox_top"] :][:20].tobytes() for sample in samples}
        assert len(tops) >= 4, "groups have backgrounds of their own"
    assert any(sample.attempt for sample in samples), "some group should have been refused as a whole"


def test_one_that_is_refused_takes_its_group_along_and_all_are_in_the_record(tmp_path: Path) -> None:
    generate(sampler(), tmp_path / "set", count=24, seed=SEED, shard_size=8)
    records = [json.loads((tmp_path / f"set/shards/{number:06d}.json").read_text()) for number in range(3)]
    reasons = {draw["reason"] for record in records for draw in record["rejections"]}
    assert "another of its group refused" in reasons and len(reasons) > 1
    counts = pl.read_parquet(tmp_path / "set/manifest.parquet").group_by("grid_group").agg(pl.col("attempt").n_unique())
    assert counts["attempt"].to_list() == [1] * 6
    report = verify(tmp_path / "set")
    assert report.ok, report.problems
    assert (report.groups, report.groups_equal) == (6, 6)
    assert any("6 of 6" in line for line in report.lines(proving=False))


def test_size_and_place_are_varied_one_by_one() -> None:
    samples = sampler("size=0.02/0.06,depth=0.3/0.4").draw(SEED, range(8), lambda done: None).samples
    for group in (samples[:4], samples[4:]):
        assert [(s.row["asked_size"], s.row["asked_depth"]) for s in group] == [
            (0.02, 0.3),
            (0.02, 0.4),
            (0.06, 0.3),
            (0.06, 0.4),
        ]
        assert len({(s.row["asked_across"], s.row["asked_height_width"], s.label) for s in group}) == 1
        for sample in group:
            assert sample.row["area_share"] == pytest.approx(sample.row["asked_size"], rel=0.1)
            assert sample.row["depth"] == pytest.approx(sample.row["asked_depth"], abs=0.02)
    assert samples[0].row["asked_across"] != samples[4].row["asked_across"]


def test_bytes_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    for name, batch_size in (("one", 1), ("many", 16)):
        generate(sampler(batch_size=batch_size), tmp_path / name, count=16, seed=SEED, shard_size=8)
    assert hashes(tmp_path / "one") == hashes(tmp_path / "many")
    whole = sampler().draw(SEED, range(16), lambda done: None)
    for index in (13, 2):
        alone = sampler(batch_size=2).draw(SEED, [index], lambda done: None)
        (found,) = alone.samples
        assert found.image.tobytes() == whole.samples[index].image.tobytes()
        assert (found.attempt, found.row) == (whole.samples[index].attempt, whole.samples[index].row)
        assert alone.rejections == [draw for draw in whole.rejections if draw.index == index]


def test_a_background_that_is_not_the_groups_is_named(tmp_path: Path) -> None:
    generate(sampler(), tmp_path / "set", count=8, seed=SEED, shard_size=8)
    change(tmp_path / "set", lambda row, mask: row.update(healthy_sha256="0" * 64))
    report = verify(tmp_path / "set")
    assert any("of the same group" in problem.problem and problem.fix for problem in report.problems)
    assert (report.groups, report.groups_equal) == (2, 1)


def test_record_command_and_sheet_say_what_was_varied(tmp_path: Path) -> None:
    generate(sampler(), tmp_path / "set", count=8, seed=SEED, shard_size=8)
    record = json.loads((tmp_path / "set/run.json").read_text())
    assert record["fingerprint"]["vary"] == "class=benign/malignant,birads=3/5"
    assert record["fingerprint"]["size"] == HELD["size"]
    told = command_line(record)
    assert told.startswith("busigen grid --backgrounds 2 ") and "--vary class=benign/malignant,birads=3/5" in told
    assert "--count" not in told
    with Image.open(tmp_path / "set/preview.png") as sheet:
        assert sheet.size == (2 * 2 * 256, 4 * (256 + 22)), "two categories across; two backgrounds of two classes down"
    with pytest.raises(OutputError, match="--vary"):
        generate(sampler("class"), tmp_path / "set", count=8, seed=SEED, shard_size=8)


@pytest.mark.parametrize(
    ("vary", "words"),
    [
        ("colour", "--vary names 'colour'"),
        ("class,class", "twice"),
        ("size=0.02", "a single one"),
        ("size=0.02/0.02", "a level twice"),
        ("class,scanner", "--vary scanner names no level"),
        ("size=0.02/7", "--vary size=7 is too large. Give single numbers from 0.003 to 0.4"),
        ("size=0.0/0.1", "--vary size=0.0 is too small."),
        ("size=0.02/big", "--vary size=big is no number."),
        ("birads=2/6", "--vary birads=6 is none of its levels."),
        ("size=0.01,0.03", "a comma begins another attribute"),
        ("size=0.01/0.02,0.03", "a comma begins another attribute"),
        ("size=0.02/0.01:0.03", "single numbers"),
        ("birads=2/9", "--vary birads=9 is none of its levels"),
        ("class=benign/normal", "--vary class=normal is none of its levels"),
        ("class,birads,size,depth", "makes 72 combinations"),
        ("", "--vary names ''"),
    ],
)
def test_what_cannot_be_varied_is_refused(vary: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Grid.parse(vary)


def test_options_that_contradict_a_grid_are_refused(tmp_path: Path) -> None:
    for options, words in (
        ({"vary": "size", "size": "0.03"}, "--size holds what --vary varies"),
        ({"vary": "height-width", "taller_than_wide": True}, "--taller-than-wide"),
        ({"vary": "birads", "birads": "4"}, "--birads"),
        ({"vary": "class", "masks": tmp_path}, "are both given"),
    ):
        with pytest.raises(UsageError, match=words):
            SourceOptions(**options).conditions()
    for plan, words in (
        ({"count": 9, "shard_size": 8}, "--count is 9"),
        ({"count": 8, "shard_size": 9}, "--shard-size"),
    ):
        with pytest.raises(UsageError, match=words):
            GenerateOptions(out=tmp_path / "set", vary=VARY, **plan).run(Progress())
    Grid.parse(VARY).refuse_cut(Plan(8, 0, 4))


@pytest.mark.parametrize("vary", ["class,birads,size", "depth,across,height-width=0.5/1.1"])
def test_what_a_row_says_of_its_levels_is_read_back(vary: str) -> None:
    grid = Grid.parse(vary)
    for index, cell in enumerate(grid.cells):
        assert levels_of(str(grid.row(index)["grid_level"])) == dict(cell)


@pytest.mark.parametrize("said", ["", "x", "size", "colour 3", ", ,"])
def test_levels_of_other_making_are_left_out(said: str) -> None:
    assert levels_of(said) == {}


def test_the_contact_sheet_says_how_many_backgrounds_it_has(tmp_path: Path) -> None:
    """Three attributes make 12 samples a background, of which 32 are shown: two backgrounds and a line below."""
    three = "class,birads=3/5,size=0.02/0.03/0.04"
    heights = {}
    for backgrounds in (2, 3):
        out = tmp_path / str(backgrounds)
        generate(sampler(three), out, count=12 * backgrounds, seed=SEED, shard_size=12)
        with Image.open(out / "preview.png") as sheet:
            heights[backgrounds] = sheet.height
            lowest = np.asarray(sheet)[-20:]
    assert heights[3] == heights[2] + 22
    assert lowest.any(), "the line is written"
