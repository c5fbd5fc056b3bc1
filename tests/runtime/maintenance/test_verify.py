"""Whatever is done to a dataset, verify names the file; and a reader trusts nothing in it."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.geometry import edit_region
from busigen.data.letterbox import letterbox
from busigen.errors import InputError, IntegrityError
from busigen.evaluation.reading.sets import read_set
from busigen.runtime.dataset.finalize import contact_sheet, outline, pick_evenly
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.dataset.reader import Dataset, read_members
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.signals import GenerationInterrupted
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource, noise_sample
from tests.harness.replaying import NoiseInputs, flip, reseal


def edit_record(folder: Path, number: int, name: str, value: object) -> None:
    """Change a field of the first refused draw."""
    path = folder / f"shards/{number:06d}.json"
    record = json.loads(path.read_text())
    record["rejections"][0][name] = value
    path.write_text(json.dumps(record))


def test_untouched_dataset_is_fine(pristine: Path) -> None:
    report = verify(pristine)
    assert report.ok, report.problems
    assert (report.samples, report.shards, report.duplicates) == (8, 3, 0)
    assert (report.backgrounds_proven, report.backgrounds_unproven) == (0, 0)


@pytest.mark.parametrize(
    ("damage", "file", "problem"),
    [
        (lambda d: flip(d / "shards/000001.tar"), "shards/000001.tar", "sha256"),
        (lambda d: flip(d / "shards/000001.parquet"), "shards/000001.parquet", "sha256"),
        (lambda d: (d / "shards/000001.parquet").write_bytes(b"PAR1"), "shards/000001.parquet", "4 bytes"),
        (lambda d: (d / "shards/000002.json").unlink(), "shards/000002.json", "missing"),
        (lambda d: (d / "shards/000002.json").write_text("[]"), "shards/000002.json", "not the record"),
        (lambda d: (d / "shards/000002.tar").unlink(), "shards/000002.tar", "missing"),
        (lambda d: edit_record(d, 1, "attempt", 1), "shards/000001.json", "other refused draws"),
        (lambda d: edit_record(d, 1, "reason", "too bright"), "shards/000001.json", "other rejections"),
        (lambda d: (d / "run.json").write_text("{"), "run.json", "cannot be read"),
        (lambda d: (d / "shards/000009.tar").write_bytes(b""), "shards/000009.tar", "no part"),
        (lambda d: (d / "notes.txt").write_bytes(b""), "notes.txt", "no part"),
        (lambda d: (d / "shards/.tmp-1-000000.tar").write_bytes(b""), "shards/.tmp-1-000000.tar", "temporary"),
        (lambda d: flip(d / "manifest.parquet"), "manifest.parquet", "sha256"),
        (lambda d: (d / "manifest.parquet").unlink(), "manifest.parquet", "missing"),
        (lambda d: (d / "dataset.json").unlink(), "dataset.json", "missing"),
        (lambda d: (d / "dataset.json").write_text("{"), "dataset.json", "JSON"),
        (lambda d: (d / "dataset.json").write_text("[]"), "dataset.json", "differs"),
        (lambda d: (d / "README.md").unlink(), "README.md", "missing"),
    ],
)
def test_damage_is_named(dataset: Path, damage: Callable[[Path], object], file: str, problem: str) -> None:
    damage(dataset)
    report = verify(dataset)
    assert not report.ok
    assert any(found.file == file and problem in found.problem and found.fix for found in report.problems), report


FUTURE = 9


def of_the_future(folder: Path, *names: str) -> None:
    for name in names:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, "schema_version": FUTURE}))


@pytest.mark.parametrize("names", [("run.json",), ("dataset.json",), ("run.json", "dataset.json")])
def test_a_schema_of_the_future_is_read_by_nobody(dataset: Path, pristine: Path, tmp_path: Path, names: tuple) -> None:
    of_the_future(dataset, *names)
    (dataset / "README.md").unlink()  # So that there is something to repair.
    before = hashes(dataset)
    for command in (
        verify,
        repair,
        read_set,
        lambda folder: explain(folder, "0", inputs=NoiseInputs(), replay=False),
        lambda folder: merge(tmp_path / "all", [folder, pristine]),
        lambda folder: generate(NoiseSource(), folder, count=8, seed=7, shard_size=3),
    ):
        with pytest.raises(InputError, match=rf"{names[0]} has schema version 9; this busigen reads up to 2") as caught:
            command(dataset)
        assert "Upgrade" in caught.value.fix
        assert hashes(dataset) == before and not (tmp_path / "all").exists()


@pytest.mark.parametrize("command", [verify, repair, read_set, lambda folder: explain(folder, "000/0", replay=False)])
def test_a_merged_dataset_of_the_future_is_read_by_nobody(
    pristine: Path, tmp_path: Path, command: Callable[[Path], object]
) -> None:
    generate(NoiseSource(), tmp_path / "other", count=2, seed=8, shard_size=3)
    merge(tmp_path / "all", [pristine, tmp_path / "other"])
    of_the_future(tmp_path / "all", "dataset.json")
    before = hashes(tmp_path / "all")
    with pytest.raises(InputError, match=r"all/dataset.json has schema version 9"):
        command(tmp_path / "all")
    assert hashes(tmp_path / "all") == before


@pytest.mark.parametrize("version", [None, 0, -1, True, "1", 1.0, [1]])
def test_no_schema_at_all_is_damage(dataset: Path, pristine: Path, version: object) -> None:
    content = json.loads((dataset / "run.json").read_text())
    (dataset / "run.json").write_text(json.dumps({**content, "schema_version": version}))
    assert "run.json" in {problem.file for problem in verify(dataset).problems}
    assert repair(dataset, inputs=NoiseInputs()).error is None
    assert hashes(dataset) == hashes(pristine)


def test_a_changed_row_is_found_behind_fitting_hashes(dataset: Path) -> None:
    path = dataset / "shards/000001.parquet"
    pl.read_parquet(path).with_columns(pl.lit("benign").alias("class")).write_parquet(path)
    reseal(dataset, 1)
    found = [str(problem) for problem in verify(dataset).problems]
    assert any("shards/000001.tar: sample 00000000" in text and "(class)" in text for text in found), found
    assert any(text.startswith("manifest.parquet: does not equal") for text in found)
    assert any(text.startswith("dataset.json: differs") for text in found)


def test_a_foreign_table_is_found_behind_fitting_hashes(dataset: Path) -> None:
    pl.DataFrame({"index": [3, 4, 5]}).write_parquet(dataset / "shards/000001.parquet")
    reseal(dataset, 1)
    assert any(found.file == "shards/000001.parquet" for found in verify(dataset).problems)


def test_what_verify_names_generate_mends(dataset: Path) -> None:
    for name in ("shards/000001.tar", "manifest.parquet"):
        flip(dataset / name)
    (dataset / "shards/000002.json").write_text("{")
    problems = verify(dataset).problems
    assert {problem.file for problem in problems} == {"shards/000001.tar", "shards/000002.json", "manifest.parquet"}
    assert all("same options again" in problem.fix and "Delete" not in problem.fix for problem in problems)
    generate(NoiseSource(), dataset, count=8, seed=7, shard_size=3)
    assert verify(dataset).ok


def test_wrong_content_behind_fitting_hashes_has_to_be_deleted(dataset: Path) -> None:
    path = dataset / "shards/000001.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    reseal(dataset, 1)
    problem = next(found for found in verify(dataset).problems if found.file == "shards/000001.parquet")
    assert "Delete shards/000001.json" in problem.fix
    (dataset / "shards/000001.json").unlink()
    generate(NoiseSource(), dataset, count=8, seed=7, shard_size=3)
    assert verify(dataset).ok


def test_an_unfinished_run_is_one_problem(tmp_path: Path) -> None:
    class Interrupted(NoiseSource):
        def draw(self, seed, indices, done):
            if indices[0] == 3:
                raise KeyboardInterrupt
            return super().draw(seed, indices, done)

    with pytest.raises(GenerationInterrupted):
        generate(Interrupted(), tmp_path, count=8, seed=7, shard_size=3)
    (tmp_path / "shards/.tmp-1-000001.tar").write_bytes(b"torn")
    (problem,) = verify(tmp_path).problems
    assert str(problem) == (
        "dataset.json: is missing, the run is unfinished: 1 of 3 shards. "
        "The same `busigen generate` command continues it."
    )
    flip(tmp_path / "shards/000000.tar")
    assert {found.file for found in verify(tmp_path).problems} == {"shards/000000.tar", "dataset.json"}


def test_duplicates_are_reported(tmp_path: Path) -> None:
    class Repeating(NoiseSource):
        def draw(self, seed, indices, done):
            return SampleBatch([replace(noise_sample(seed, 0), index=index) for index in indices], [])

    generate(Repeating(), tmp_path, count=3, seed=7, shard_size=2)
    report = verify(tmp_path)
    assert report.duplicates == 2
    assert "000000002: its image equals that of sample 000000000" in report.problems[-1].problem


def test_verify_and_open_refuse_what_is_no_dataset(tmp_path: Path, dataset: Path) -> None:
    with pytest.raises(InputError, match="no busigen dataset"):
        verify(tmp_path / "absent")
    with pytest.raises(InputError, match="no busigen dataset"):
        Dataset.open(tmp_path / "absent")
    (dataset / "dataset.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        Dataset.open(dataset)


def test_dataset_reads_back(pristine: Path) -> None:
    dataset = Dataset.open(pristine)
    samples = dataset.samples(dataset.plan.span)
    assert [sample.index for sample in samples] == list(range(8))
    assert sum(record.count for record in dataset.shards()) == dataset.manifest().height == 8
    fresh = NoiseSource().draw(7, range(8), lambda _: None).samples
    for read, generated in zip(samples, fresh, strict=True):
        assert np.array_equal(read.image, generated.image)
        assert np.array_equal(read.mask, generated.mask)
        assert (read.attempt, read.label, read.row) == (generated.attempt, generated.label, generated.row)
    assert [sample.index for sample in dataset.samples([7, 0])] == [7, 0]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("../../etc/passwd", tarfile.REGTYPE),
        ("/etc/passwd", tarfile.REGTYPE),
        ("000000000.image.png", tarfile.SYMTYPE),
        ("000000000.image.png", tarfile.LNKTYPE),
        ("000000000.image.png", tarfile.CHRTYPE),
        ("000000000.image.png", tarfile.DIRTYPE),
        ("000000001.image.png", tarfile.REGTYPE),
    ],
)
def test_evil_members_are_refused(tmp_path: Path, name: str, kind: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(member)
    with pytest.raises(IntegrityError, match=r"expected the file 000000000\.image\.png"):
        list(read_members(tmp_path / "x.tar", range(1)))


def test_oversized_missing_and_surplus_members_are_refused(pristine: Path, tmp_path: Path) -> None:
    member = tarfile.TarInfo("000000000.image.png")
    member.size = 2 << 20
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.addfile(member, io.BytesIO(bytes(member.size)))
    with pytest.raises(IntegrityError, match="2097152 bytes"):
        list(read_members(tmp_path / "x.tar", range(1)))
    with pytest.raises(IntegrityError, match="unexpected member"):
        list(read_members(pristine / "shards/000000.tar", range(2)))
    with pytest.raises(IntegrityError, match="ends before"):
        list(read_members(pristine / "shards/000000.tar", range(4)))
    (tmp_path / "cut.tar").write_bytes((pristine / "shards/000000.tar").read_bytes()[:70_000])
    with pytest.raises(IntegrityError, match=r"cut\.tar"):
        list(read_members(tmp_path / "cut.tar", range(3)))


class PaintingSource(NoiseSource):
    """Paints noise into real healthy images; ``leak`` also changes one pixel outside the edit region."""

    def __init__(self, healthy: Path, leak: bool = False) -> None:
        super().__init__()
        self.leak = leak
        self.sha256 = hashlib.sha256(healthy.read_bytes()).hexdigest()
        self.pixels, self.box = letterbox(np.asarray(Image.open(healthy)))

    def draw(self, seed, indices, done):
        samples = []
        generated = super().draw(seed, indices, done)
        for sample in generated.samples:
            edit = edit_region(sample.mask, self.box.valid)
            image = np.where(edit, sample.image, self.pixels)
            if self.leak and sample.index == 1:
                image[tuple(np.argwhere(~edit)[-1])] ^= 1
            real = self.sha256 if sample.index else None
            samples.append(replace(sample, image=image, row=sample.row | {"healthy_sha256": real}))
        return SampleBatch(samples, generated.rejections)


def test_backgrounds_are_proven_bit_for_bit(tmp_path: Path) -> None:
    healthy = tmp_path / "healthy"
    healthy.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (200, 300), dtype=np.uint8)
    Image.fromarray(pixels).save(healthy / "a.png")
    for name, leak in (("honest", False), ("leaky", True)):
        generate(PaintingSource(healthy / "a.png", leak), tmp_path / name, count=4, seed=7, shard_size=3)
    honest = verify(tmp_path / "honest", healthy=healthy)
    assert honest.ok, honest.problems
    assert (honest.backgrounds_proven, honest.backgrounds_unproven) == (3, 0)
    leaky = verify(tmp_path / "leaky", healthy=healthy)
    assert (leaky.backgrounds_proven, leaky.backgrounds_unproven) == (2, 1)
    assert "sample 000000001: 1 pixels outside" in leaky.problems[0].problem
    assert verify(tmp_path / "honest").backgrounds_unproven == 3
    assert honest.backgrounds_synthetic == 1
    (healthy / "a.png").rename(tmp_path / "a.png")
    (problem,) = verify(tmp_path / "honest", healthy=healthy).problems
    assert problem.problem.startswith(f"1 of 1 healthy images are not below {healthy}; for example sample 000000001 ")


def test_contact_sheet_shows_lesion_and_contour(pristine: Path) -> None:
    samples = Dataset.open(pristine).samples(range(8))
    sheet = contact_sheet(samples[:5])
    assert sheet.size == (2048, 2 * 278)
    assert sheet.tobytes() == contact_sheet(samples[:5]).tobytes()
    painted = outline(samples[0].image, samples[0].mask, (255, 0, 0))
    changed = (painted != samples[0].image[..., None]).any(axis=2)
    assert changed.any()
    assert not (changed & samples[0].mask).any()
    picked = pick_evenly(Dataset.open(pristine).manifest(), per_class=2)
    assert {samples[index].label for index in picked} == {"benign", "malignant"}
