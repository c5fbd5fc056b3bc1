"""Explain tells what a dataset records of a sample, and whether drawing it again proves that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from busigen.errors import IntegrityError, UsageError
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.dataset.reader import read_members
from busigen.runtime.dataset.shards import write_shard
from busigen.runtime.maintenance.explain import explain
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource, noise_sample
from tests.harness.replaying import NoiseInputs, flip, reseal, truncate


def test_the_history_is_what_the_dataset_records_and_the_replay_agrees(pristine: Path, tmp_path: Path) -> None:
    before = hashes(pristine)
    inputs = NoiseInputs()
    described = explain(pristine, "000000003", inputs=inputs, out=tmp_path / "again")
    assert described.error is None, described
    assert described.replay is not None
    assert (described.replay.image_agrees, described.replay.mask_agrees) == (True, True)
    assert (described.replay.differs, described.replay.conditions, described.problems) == ((), (), ())
    assert inputs.asked == [[3]], "a sample is drawn alone"
    past = described.history
    assert (past["key"], past["index"], past["seed"], past["attempt"]) == ("000000003", 3, 7, 1)
    assert past["class"] == noise_sample(7, 3, 1).label
    assert past["refused"] == [{"attempt": 0, "reason": "too dark"}]
    assert past["shard"] == {"number": 1, "file": "shards/000001.tar"}
    chain = {link["link"]: link["sha256"] for link in past["chain"]}
    assert chain["shards/000001.tar"] == before["shards/000001.tar"]
    (member,) = read_members(pristine / "shards/000001.tar", range(3, 6), only=[3])
    again = {path.name: path.read_bytes() for path in (tmp_path / "again").iterdir()}
    assert again["000000003.image.png"] == member.image
    assert again["000000003.mask.png"] == member.mask
    assert json.loads(again["000000003.json"]) == member.row
    assert hashes(tmp_path / "again")["000000003.image.png"] == chain["image"] == described.replay.files["image"]
    assert hashes(tmp_path / "again")["000000003.mask.png"] == chain["mask"] == described.replay.files["mask"]
    assert hashes(pristine) == before, "the dataset itself is left alone"
    json.dumps(described.to_json(), allow_nan=False)
    text = "\n".join(described.lines())
    assert "2 (attempt 0 refused: too dark)" in text
    assert f"the image's bytes agree ({chain['image']})" in text


def test_a_plain_index_is_a_key_and_other_things_are_not(pristine: Path) -> None:
    assert explain(pristine, "3", replay=False).history == explain(pristine, "000000003", replay=False).history
    for key in ("8", "-1", "x", "3.0", "", "³", "9" * 5000):
        with pytest.raises(UsageError, match="a key from 000000000 to 000000007"):
            explain(pristine, key, replay=False)


def test_a_changed_pixel_behind_fitting_hashes_is_named(dataset: Path) -> None:
    """As someone who tampers with care: shard, table and record agree with each other."""
    source = NoiseSource()
    generated = source.draw(7, range(3, 6), lambda _: None)
    image = generated.samples[1].image.copy()
    image[10:12, 20] ^= 4
    changed = [generated.samples[0], replace(generated.samples[1], image=image), generated.samples[2]]
    write_shard(dataset, 1, SampleBatch(changed, generated.rejections), source.row_types())
    described = explain(dataset, "4", inputs=NoiseInputs())
    assert isinstance(described.error, IntegrityError)
    assert described.replay is not None
    assert (described.replay.image_agrees, described.replay.mask_agrees) == (False, True)
    assert "image: 2 of 65536 pixels differ, by up to 4 grey levels." in described.replay.differs
    assert any("dataset.json records another shards/000001.tar" in problem for problem in described.problems)
    assert any("shards/000001.parquet says image_sha256 is" in problem for problem in described.problems)
    # Its neighbour's own bytes are what they were.
    neighbour = explain(dataset, "5", inputs=NoiseInputs())
    assert neighbour.replay is not None
    assert neighbour.replay.differs == ()


def test_a_changed_row_is_named_though_the_files_agree(dataset: Path) -> None:
    path = dataset / "shards/000001.parquet"
    pl.read_parquet(path).with_columns(lesion_pixels=pl.lit(1, pl.Int64)).write_parquet(path)
    reseal(dataset, 1)
    described = explain(dataset, "4", inputs=NoiseInputs())
    assert described.replay is not None
    assert (described.replay.image_agrees, described.replay.mask_agrees) == (True, True)
    assert "the files agree, but what is recorded differs" in str(described.error)
    assert any("shards/000001.parquet: lesion_pixels is 1, drawn again" in text for text in described.replay.differs)


def test_a_damaged_dataset_tells_what_is_left_and_the_replay_stands_in(dataset: Path) -> None:
    truncate(dataset / "manifest.parquet")
    (dataset / "shards/000001.tar").unlink()
    described = explain(dataset, "4", inputs=NoiseInputs())
    assert described.replay is not None
    assert (described.replay.image_agrees, described.replay.mask_agrees) == (True, True), (
        "the table still has both hashes"
    )
    assert "verify --repair" in str(described.error)
    assert any(problem.startswith("manifest.parquet") for problem in described.problems)
    assert "shards/000001.tar is missing." in described.problems
    (dataset / "shards/000001.parquet").unlink()
    with pytest.raises(IntegrityError, match="nothing is left of sample 000000004"):
        explain(dataset, "4", inputs=NoiseInputs())


def test_a_flipped_bit_is_told_without_a_replay(dataset: Path) -> None:
    flip(dataset / "shards/000001.tar")
    described = explain(dataset, "4", replay=False)
    assert described.replay is None
    assert isinstance(described.error, IntegrityError)
    assert any("shards/000001.tar has another sha256" in problem for problem in described.problems)


def test_other_conditions_are_told(dataset: Path) -> None:
    for name in ("run.json", "dataset.json"):
        path = dataset / name
        record = json.loads(path.read_text())
        record["versions"]["numpy"] = "1.0"
        path.write_text(json.dumps(record))
    described = explain(dataset, "4", inputs=NoiseInputs())
    assert described.error is None
    assert described.replay is not None
    (condition,) = described.replay.conditions
    assert condition.startswith("versions.numpy: 1.0 then, ")

    class Rounding(NoiseSource):
        def draw(self, seed, indices, done):
            generated = super().draw(seed, indices, done)
            return SampleBatch(
                [replace(sample, image=sample.image ^ 1) for sample in generated.samples], generated.rejections
            )

    described = explain(dataset, "4", inputs=NoiseInputs(source=Rounding()))
    assert "The conditions are others than the run's" in str(described.error)


def test_another_refusal_than_the_recorded_one_is_named(dataset: Path) -> None:
    path = dataset / "shards/000001.json"
    path.write_text(path.read_text().replace("too dark", "too bright"))
    described = explain(dataset, "3", inputs=NoiseInputs())
    assert described.replay is not None
    assert "refused draws: too bright, drawn again too dark." in described.replay.differs


def test_out_stays_outside_the_dataset(dataset: Path) -> None:
    with pytest.raises(UsageError, match="lies inside the dataset"):
        explain(dataset, "0", inputs=NoiseInputs(), out=dataset / "again")
    with pytest.raises(UsageError, match="draws nothing"):
        explain(dataset, "0", replay=False, out=dataset.parent / "again")
