"""Samples without a lesion, and mixes of categories, in a dataset: proven, told, mended, merged and described."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from busigen.api.pairs import Dataset
from busigen.runtime.dataset.format import command_line
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.replay import Inputs, recorded_conditions
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.sampling.conditions import parse_conditions
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.hashing import hashes
from tests.harness.quick_engine import QuickEngine, quick_sampler
from tests.harness.replaying import flip
from tests.runtime.maintenance.test_given_masks import change
from tests.runtime.sampling.inputs.test_given_masks import save_image
from tests.runtime.sampling.test_grid import Placed

HELD = {"size": "0.03", "depth": "0.4", "across": "0.5", "height_width": "0.7"}


@dataclass(frozen=True)
class QuickInputs(Inputs):
    """Opens what a run recorded, on an engine that draws crude lesions."""

    def open(self, run: Mapping[str, Any], *, other_bundle: bool = False) -> Sampler:
        healthy = HealthyFolder(self.healthy) if self.healthy else None
        return quick_sampler(Placed(), healthy=healthy, **recorded_conditions(run))


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("balance") / "healthy"
    for number in range(3):
        save_image(folder / f"{number}.png", (400, 300 + 30 * number), seed=number)
    return folder


def written(out: Path, healthy: Path | None, seed: int = 1) -> Path:
    asked = parse_conditions(birads="3:0.5,4:0.5", **HELD)
    folder = HealthyFolder(healthy) if healthy else None
    sampler = quick_sampler(Placed(), healthy=folder, normals=0.4, asked=asked)
    generate(sampler, out, count=10, seed=seed, shard_size=5)
    return out


@pytest.fixture(scope="module")
def real(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("balance") / "real", healthy)


def test_verify_proves_every_pixel_of_normals_which_may_be_there_twice(real: Path, healthy: Path) -> None:
    report = verify(real, healthy=healthy)
    assert report.ok, report.problems
    assert (report.normals, report.normals_equal, report.backgrounds_proven, report.duplicates) == (4, 4, 10, 0)
    (line,) = [line for line in report.lines(proving=True) if "normal" in line]
    assert line.endswith("without a lesion: 4; equal to their healthy image, bit for bit: 4")
    assert len(Dataset(real)) == 10 and {pair.label for pair in Dataset(real)} == {"normal", "benign", "malignant"}


def test_a_normal_that_marks_a_lesion_is_named(real: Path, healthy: Path, tmp_path: Path) -> None:
    out = written(tmp_path / "set", healthy)

    def mark(row: dict[str, Any], mask: np.ndarray[Any, Any]) -> None:
        assert row["class"] == "normal"
        mask[40:60, 100:130] = True
        row.update(lesion_pixels=600, box_left=100, box_top=40, box_right=130, box_bottom=60)

    assert json.loads((out / "shards/000000.json").read_text())["classes"]["normal"] == 2
    change(out, mark)
    assert any("it is normal, and its mask marks" in one.problem for one in verify(out).problems)


@pytest.mark.parametrize("kind", ["real", "synthetic"])
def test_explain_tells_what_it_is_and_draws_it_again(kind: str, real: Path, healthy: Path, tmp_path: Path) -> None:
    folder = healthy if kind == "real" else None
    out = real if folder else written(tmp_path / "set", None)
    key = next(pair.key for pair in Dataset(out) if pair.label == "normal")
    told = explain(out, key, inputs=QuickInputs(healthy=folder))
    assert told.error is None, told.replay
    assert told.history["asked"]["normals"] == "0.4"
    assert not [link for link in told.history["chain"] if "lesion" in link["link"] or "mask-" in link["link"]]
    assert any(line.startswith("  it is") for line in told.lines())
    key = next(pair.key for pair in Dataset(out) if pair.label == "benign")
    told = explain(out, key, inputs=QuickInputs(healthy=folder))
    assert told.error is None and told.history["asked"]["birads"] in ("3", "4")


def test_repair_draws_normals_and_mixes_again(healthy: Path, tmp_path: Path) -> None:
    out = written(tmp_path / "set", healthy)
    before = hashes(out)
    flip(out / "shards/000001.tar")
    assert repair(out, inputs=QuickInputs(healthy=healthy)).after.ok
    assert hashes(out) == before


def test_merged_datasets_may_share_normals(real: Path, healthy: Path, tmp_path: Path) -> None:
    other = written(tmp_path / "other", healthy, seed=2)
    merge(tmp_path / "all", [real, other])
    report = verify(tmp_path / "all", healthy=healthy)
    assert report.ok, report.problems
    assert (report.normals, report.normals_equal) == (8, 8)
    card = (tmp_path / "all/README.md").read_text()
    assert "8 samples of class `normal`" in card and '"2": "normal"' in card


def test_card_record_and_command_say_what_was_dealt(real: Path, tmp_path: Path) -> None:
    card = (real / "README.md").read_text()
    assert "--normals 0.4" in card and "--birads 3:0.5,4:0.5" in card
    assert "synthetic benign or malignant lesion" in card
    assert "4 samples of class `normal` have no lesion and an empty mask" in card
    assert "Samples of class `normal` are such images whole." in card
    assert '"2": "normal"' in card and "2 normal" in card
    info = json.loads((real / "dataset.json").read_text())
    assert info["classes"] == {"benign": 3, "malignant": 3, "normal": 4}
    assert recorded_conditions(info)["normals"] == 0.4
    assert "--normals 0.4" in command_line(info)
    synthetic = (written(tmp_path / "set", None) / "README.md").read_text()
    assert "they are synthetic backgrounds" in synthetic and "no sample holds a patient's pixels" in synthetic


def test_runs_without_either_say_nothing_of_them(tmp_path: Path) -> None:
    generate(quick_sampler(QuickEngine()), tmp_path / "set", count=4, seed=1, shard_size=4)
    card, run = (tmp_path / "set/README.md").read_text(), json.loads((tmp_path / "set/run.json").read_text())
    assert "normal" not in card and "normals" not in run["fingerprint"]
    assert run["fingerprint"]["birads"] is None
