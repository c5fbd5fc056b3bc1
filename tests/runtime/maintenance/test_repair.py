"""Repair puts back the recorded bytes and nothing else, and refuses where it cannot know them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from busigen.errors import InputError, IntegrityError, OutputError
from busigen.runtime.dataset.format import FINISHED_FILES, SampleBatch
from busigen.runtime.dataset.shards import write_shard
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.signals import GenerationInterrupted
from busigen.runtime.maintenance.repair import RepairInterrupted, RepairReport, repair
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.storage.lock import exclusive
from tests.harness.hashing import hash_of, hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs, flip, reseal, truncate

SHARD = ("json", "parquet", "tar")


def mend(dataset: Path, inputs: NoiseInputs | None = None) -> tuple[RepairReport, list[list[int]]]:
    inputs = inputs or NoiseInputs()
    return repair(dataset, inputs=inputs), inputs.asked


def stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Inode and time of every file: equal only for a file that nobody has written or renamed over."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def remove(folder: Path, number: int, suffixes: tuple[str, ...] = SHARD) -> None:
    for suffix in suffixes:
        (folder / f"shards/{number:06d}.{suffix}").unlink()


@pytest.mark.parametrize(
    ("damage", "files", "generated"),
    [
        (lambda d: None, [], []),
        (lambda d: flip(d / "shards/000001.tar"), ["shards/000001.tar"], [[3, 4, 5]]),
        (lambda d: truncate(d / "shards/000002.tar"), ["shards/000002.tar"], [[6, 7]]),
        (lambda d: remove(d, 1), [f"shards/000001.{suffix}" for suffix in SHARD], [[3, 4, 5]]),
        (lambda d: remove(d, 1, ("json",)), ["shards/000001.json"], [[3, 4, 5]]),
        (lambda d: (d / "shards/000000.json").write_text("{"), ["shards/000000.json"], [[0, 1, 2]]),
        # The tar holds every row, so its table needs no drawing.
        (lambda d: flip(d / "shards/000001.parquet"), ["shards/000001.parquet"], []),
        (lambda d: remove(d, 2, ("parquet",)), ["shards/000002.parquet"], []),
        (lambda d: truncate(d / "manifest.parquet"), ["manifest.parquet"], []),
        (lambda d: truncate(d / "dataset.json"), ["dataset.json"], []),
        (lambda d: truncate(d / "run.json"), ["run.json"], []),
        (lambda d: [(d / name).unlink() for name in FINISHED_FILES if name != "run.json"], None, []),
        (
            lambda d: (flip(d / "shards/000000.tar"), remove(d, 2), truncate(d / "manifest.parquet")),
            ["manifest.parquet", "shards/000000.tar", *(f"shards/000002.{suffix}" for suffix in SHARD)],
            [[0, 1, 2], [6, 7]],
        ),
        (lambda d: shutil.rmtree(d / "shards"), None, [[0, 1, 2], [3, 4, 5], [6, 7]]),
    ],
)
def test_damage_is_mended_to_the_same_bytes_and_nothing_else_is_touched(
    pristine: Path,
    dataset: Path,
    damage: Callable[[Path], object],
    files: list[str] | None,
    generated: list[list[int]],
) -> None:
    damage(dataset)
    before = stamps(dataset)
    report, asked = mend(dataset)
    assert report.error is None, report
    assert report.after.ok
    assert hashes(dataset) == hashes(pristine)
    assert asked == generated
    if files is not None:
        assert sorted(line.split(":")[0] for line in report.repaired) == sorted(files)
        # A manifest is written together with the other files that describe the whole dataset.
        whole = set() if set(files).isdisjoint(FINISHED_FILES) else set(FINISHED_FILES) - {"run.json"}
        kept = {name: stamp for name, stamp in before.items() if name not in {*files, *whole}}
        assert {name: stamp for name, stamp in stamps(dataset).items() if name in kept} == kept


def test_any_bit_of_a_shard_is_found_and_mended(pristine: Path, dataset: Path) -> None:
    rng = np.random.default_rng(1)
    for suffix in SHARD:
        path = dataset / f"shards/000001.{suffix}"
        whole = path.read_bytes()
        for place in rng.integers(len(whole), size=4):
            data = bytearray(whole)
            data[place] ^= 1 << rng.integers(8)
            path.write_bytes(data)
            assert not verify(dataset).ok, (suffix, place)
            report, _ = mend(dataset)
            assert report.error is None, (suffix, place, report)
            assert hashes(dataset) == hashes(pristine), (suffix, place)


def test_a_killed_repair_is_continued(pristine: Path, dataset: Path) -> None:
    class Stopped(NoiseSource):
        def draw(self, seed, indices, done):
            if indices[0] == 6:
                raise KeyboardInterrupt
            return super().draw(seed, indices, done)

    for number in (0, 2):
        remove(dataset, number)
    with pytest.raises(RepairInterrupted, match="what was repaired in"):
        mend(dataset, NoiseInputs(source=Stopped()))
    (dataset / "shards/.tmp-1-000002.tar").write_bytes(b"torn")
    report, asked = mend(dataset)
    assert asked == [[6, 7]]
    assert any("temporary file removed" in line for line in report.repaired)
    assert hashes(dataset) == hashes(pristine)


@pytest.mark.parametrize("name", ["README.md", "run.json", "dataset.json", "shards/000001.tar", "shards/000001.json"])
def test_a_linked_file_is_replaced_and_what_it_points_to_stays(
    pristine: Path, dataset: Path, tmp_path: Path, name: str
) -> None:
    (dataset / name).rename(tmp_path / "away")
    (dataset / name).symlink_to(tmp_path / "away")
    before = hash_of(tmp_path / "away")
    assert {problem.file for problem in verify(dataset).problems} == {name}
    report, _ = mend(dataset)
    assert report.error is None and hashes(dataset) == hashes(pristine)
    assert not (dataset / name).is_symlink() and hash_of(tmp_path / "away") == before


def test_an_unfinished_run_is_completed(pristine: Path, tmp_path: Path) -> None:
    class Stopped(NoiseSource):
        def draw(self, seed, indices, done):
            if indices[0] == 3:
                raise KeyboardInterrupt
            return super().draw(seed, indices, done)

    out = tmp_path / "set"
    with pytest.raises(GenerationInterrupted):
        generate(Stopped(), out, count=8, seed=7, shard_size=3)
    report, asked = mend(out)
    assert report.error is None
    assert asked == [[3, 4, 5], [6, 7]]
    assert hashes(out) == hashes(pristine)


def test_a_shard_that_was_changed_together_with_its_record_is_restored(pristine: Path, dataset: Path) -> None:
    source = NoiseSource()
    generated = source.draw(7, range(3, 6), lambda _: None)
    image = generated.samples[1].image.copy()
    image[0, 0] ^= 1
    changed = [generated.samples[0], replace(generated.samples[1], image=image), generated.samples[2]]
    write_shard(dataset, 1, SampleBatch(changed, generated.rejections), source.row_types())
    report, asked = mend(dataset)
    assert report.error is None, report
    assert asked == [[3, 4, 5]]
    assert hashes(dataset) == hashes(pristine)


def test_a_table_that_was_changed_together_with_its_record_is_restored(pristine: Path, dataset: Path) -> None:
    path = dataset / "shards/000001.parquet"
    pl.read_parquet(path).with_columns(pl.lit("benign").alias("class")).write_parquet(path)
    reseal(dataset, 1)
    report, _ = mend(dataset)
    assert report.error is None, report
    assert hashes(dataset) == hashes(pristine)


def test_a_source_that_draws_other_samples_changes_nothing(dataset: Path) -> None:
    flip(dataset / "shards/000001.tar")
    before = hashes(dataset)
    report, asked = mend(dataset, NoiseInputs(source=NoiseSource(bundle="another")))
    assert isinstance(report.error, InputError)
    assert "fingerprint.bundle: null -> another" in str(report.error)
    assert "shards/000001.tar" in report.refused[0]
    assert asked == []
    assert hashes(dataset) == before


def test_bytes_that_are_not_the_recorded_ones_are_refused(dataset: Path) -> None:
    class Rounding(NoiseSource):
        """As another engine would: the same samples, one of them a grey level off."""

        def draw(self, seed, indices, done):
            generated = super().draw(seed, indices, done)
            first = generated.samples[0]
            return SampleBatch([replace(first, image=first.image ^ 1), *generated.samples[1:]], generated.rejections)

    flip(dataset / "shards/000001.tar")
    before = hashes(dataset)
    report, _ = mend(dataset, NoiseInputs(source=Rounding()))
    assert isinstance(report.error, IntegrityError)
    assert "shards/000001.tar: drawn again, it differs from what is recorded" in report.refused[0]
    assert not report.repaired
    assert hashes(dataset) == before
    # With the shard's records gone, the manifest still knows better.
    remove(dataset, 1)
    (dataset / "dataset.json").unlink()
    report, _ = mend(dataset, NoiseInputs(source=Rounding()))
    assert "differs from the rows in manifest.parquet" in report.refused[0]
    assert not (dataset / "shards/000001.tar").exists()


def test_other_versions_are_refused_where_no_record_is_left(dataset: Path) -> None:
    for name in ("dataset.json", "manifest.parquet"):
        (dataset / name).unlink()
    remove(dataset, 1)
    run = json.loads((dataset / "run.json").read_text())
    run["versions"]["pillow"] = "9.0"
    (dataset / "run.json").write_text(json.dumps(run))
    report, _ = mend(dataset)
    assert "versions.pillow: 9.0 then" in report.refused[0]
    assert not (dataset / "shards/000001.tar").exists()


def test_records_that_contradict_each_other_are_left_to_the_person(pristine: Path, dataset: Path) -> None:
    path = dataset / "run.json"
    path.write_text(path.read_text().replace('"seed": 7', '"seed": 8'))
    with pytest.raises(IntegrityError, match=r"contradict each other \(config\.seed: 8 and 7\)"):
        mend(dataset)
    path.unlink()
    mend(dataset)
    assert hashes(dataset) == hashes(pristine)


def test_strangers_stay_and_keep_the_dataset_from_being_sound(dataset: Path) -> None:
    (dataset / "notes.txt").write_text("mine")
    report, _ = mend(dataset)
    assert isinstance(report.error, IntegrityError)
    assert (dataset / "notes.txt").read_text() == "mine"


def test_repair_needs_a_dataset_that_nobody_else_writes(dataset: Path, tmp_path: Path) -> None:
    flip(dataset / "shards/000001.tar")
    with exclusive(dataset), pytest.raises(OutputError, match="is being written by process"):
        mend(dataset)
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="no busigen dataset"):
        mend(tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []
