"""The factory's promises: resumable anywhere, one process, one run per folder, errors that say what helps."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import time
from pathlib import Path

import polars as pl
import pytest

from busigen.errors import OutputError, UsageError
from busigen.runtime.dataset.format import FINISHED_FILES, Plan
from busigen.runtime.execution.factory import generate, part_of
from busigen.runtime.execution.signals import GenerationInterrupted
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.progress import Progress
from busigen.runtime.storage.lock import exclusive
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.processes import ROOT, command
from tests.harness.replaying import NoiseInputs


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "set"
    generate(NoiseSource(), out, count=75, seed=7, shard_size=10)
    return hashes(out)


def test_makes_a_whole_dataset(tmp_path: Path) -> None:
    report = generate(NoiseSource(), tmp_path / "deep" / "set", count=23, seed=7, shard_size=10)
    assert (report.samples, report.shards, report.written, report.already_complete) == (23, 3, 3, False)
    assert sum(report.classes.values()) == 23
    assert report.rejected == {"too dark": 3}
    folder = report.folder
    assert {path.name for path in folder.iterdir()} == {*FINISHED_FILES, "shards"}
    manifest = pl.read_parquet(folder / "manifest.parquet")
    assert manifest["index"].to_list() == list(range(23))
    info = json.loads((folder / "dataset.json").read_text())
    assert info["config"] == {"count": 23, "seed": 7, "shard_size": 10}
    assert info["fingerprint"] == {"source": {"name": "noise", "sizes": [12, 60]}}
    assert info["classes"] == report.classes


def test_webdataset_reads_it(tmp_path: Path) -> None:
    webdataset = pytest.importorskip("webdataset")
    generate(NoiseSource(), tmp_path / "set", count=5, seed=7, shard_size=3)
    url = (tmp_path / "set" / "shards" / "{000000..000001}.tar").as_posix()
    samples = list(webdataset.WebDataset(url, shardshuffle=False).decode("l8"))
    assert [sample["__key__"] for sample in samples] == [f"{n:09d}" for n in range(5)]
    assert all(sample["image.png"].shape == sample["mask.png"].shape == (256, 256) for sample in samples)
    assert [sample["json"]["index"] for sample in samples] == list(range(5))


def test_samples_do_not_depend_on_shard_size(tmp_path: Path) -> None:
    tables = []
    for size in (3, 50):
        generate(NoiseSource(), tmp_path / str(size), count=8, seed=7, shard_size=size)
        tables.append(pl.read_parquet(tmp_path / str(size) / "manifest.parquet").drop("shard"))
    assert tables[0].equals(tables[1])


def test_leftovers_and_half_shards_are_made_anew(tmp_path: Path, uninterrupted: dict[str, str]) -> None:
    out = tmp_path / "set"
    generate(NoiseSource(), out, count=75, seed=7, shard_size=10)
    (out / "shards" / ".tmp-1-000000.tar").write_bytes(b"torn")
    (out / "shards" / "000001.json").unlink()
    (out / "shards" / "000002.tar").write_bytes(b"torn")
    (out / "shards" / "000003.json").write_text("{")
    (out / "shards" / "000004.parquet").unlink()
    # The size stays what it was: only the hash tells.
    for name in ("000005.tar", "000006.parquet"):
        data = bytearray((out / "shards" / name).read_bytes())
        data[len(data) // 2] ^= 1
        (out / "shards" / name).write_bytes(data)
    assert generate(NoiseSource(), out, count=75, seed=7, shard_size=10).written == 6
    assert hashes(out) == uninterrupted


@pytest.mark.parametrize("name", ["manifest.parquet", "dataset.json"])
def test_a_changed_summary_is_written_anew(tmp_path: Path, name: str) -> None:
    generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=3)
    before = hashes(tmp_path)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data.replace(b'"samples": 4', b'"samples": 5') if b"{" in data[:1] else data[::-1])
    assert hashes(tmp_path) != before
    report = generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=3)
    assert (report.written, report.already_complete) == (0, False)
    assert hashes(tmp_path) == before


def test_finished_folder_is_left_alone(tmp_path: Path) -> None:
    generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    report = generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=3)
    assert report.already_complete
    assert report.written == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == before


def test_other_config_is_refused_with_the_difference(tmp_path: Path) -> None:
    generate(NoiseSource(bundle="aa"), tmp_path, count=4, seed=7, shard_size=3)
    before = hashes(tmp_path)
    with pytest.raises(OutputError, match=r"\(--bundle: aa -> bb; --seed: 7 -> 8\)") as caught:
        generate(NoiseSource(bundle="bb"), tmp_path, count=4, seed=8, shard_size=3)
    assert "--out" in caught.value.fix
    with pytest.raises(OutputError, match=r"--count: 4 -> 9.*another --seed"):
        generate(NoiseSource(bundle="aa"), tmp_path, count=9, seed=7, shard_size=3)
    # What follows from an option is counted, and shown only where nothing else says what changed.
    with pytest.raises(OutputError, match=r"\(--seed: 7 -> 8; and 2 more fields of run.json\)"):
        generate(NoiseSource(bundle="aa", preset="tiny", gates=[1]), tmp_path, count=4, seed=8, shard_size=3)
    with pytest.raises(OutputError, match=r'\(fingerprint.preset: null -> "tiny"\)'):
        generate(NoiseSource(bundle="aa", preset="tiny"), tmp_path, count=4, seed=7, shard_size=3)
    assert hashes(tmp_path) == before


@pytest.mark.parametrize("option", ["count", "shard_size", "seed"])
def test_impossible_numbers_are_refused_before_anything_is_written(tmp_path: Path, option: str) -> None:
    for value in (-1, 0) if option != "seed" else (-1, 2**64):
        numbers = {"count": 4, "seed": 7, "shard_size": 3, option: value}
        with pytest.raises(UsageError, match=f"--{option.replace('_', '-')} is {value}"):
            generate(NoiseSource(), tmp_path / "set", **numbers)
    assert not (tmp_path / "set").exists()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis.docx"):
        generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=3)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


FOREIGN_RECORDS = [{}, [], {"schema_version": 1}, {"name": "another program", "config": {"seed": 7}}]


@pytest.mark.parametrize("record", FOREIGN_RECORDS, ids=str)
def test_a_run_record_of_another_program_has_its_folder_left_alone(tmp_path: Path, record: object) -> None:
    theirs = {"run.json": json.dumps(record), ".lock-notes": "mine", ".tmp-1-0a1b2c3d-run.json": "mine", ".tmp-x": "y"}
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    for name in (".tmp-1-000000.tar", ".tmp-draft"):
        (tmp_path / "shards").mkdir(exist_ok=True)
        (tmp_path / "shards" / name).write_text("mine")
    before = hashes(tmp_path)
    for part in (None, part_of(Plan(count=4, seed=7, shard_size=2), task=(1, 2))):
        with pytest.raises(OutputError, match="is not a run record of busigen"):
            generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=2, part=part)
        assert hashes(tmp_path) == before


def test_what_only_looks_like_a_leftover_stays(tmp_path: Path) -> None:
    numbers = {"count": 4, "seed": 7, "shard_size": 3}
    generate(NoiseSource(), tmp_path, **numbers)
    before = hashes(tmp_path)
    mine = [".tmp-notes", ".lock-notes", ".tmp-1-thesis.tar", "shards/.tmp-000001.tar", "shards/.tmp-1-000001.tar.xz"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    left = [".tmp-1-0a1b2c3d-run.json", "shards/.tmp-1-000001.tar", ".lock-task-0-1", ".lock-turn"]
    for name in left:
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "shards/.tmp-2-000001.tar").symlink_to(tmp_path / ".tmp-notes")
    (tmp_path / ".tmp-3-run.json").mkdir()
    with pytest.raises(OutputError, match=r"shards/.tmp-2-000001.tar is a link"):
        generate(NoiseSource(), tmp_path, **numbers)
    (tmp_path / "shards/.tmp-2-000001.tar").unlink()
    generate(NoiseSource(), tmp_path, **numbers)
    assert hashes(tmp_path).keys() == before.keys() | set(mine)
    assert (tmp_path / ".tmp-3-run.json").is_dir()
    assert {found.file for found in verify(tmp_path).problems} == set(mine)


def test_a_lock_of_another_program_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("pid=12 of another program")
    for part in (None, part_of(Plan(count=4, seed=7, shard_size=2), task=(1, 2))):
        with pytest.raises(OutputError, match=r"\.lock is another program's file"):
            generate(NoiseSource(), tmp_path, count=4, seed=7, shard_size=2, part=part)
    assert (tmp_path / ".lock").read_text() == "pid=12 of another program"


@pytest.mark.parametrize("name", ["shards", "shards/000000.tar", "run.json", "manifest.parquet"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    out, away = tmp_path / "set", tmp_path / "away"
    generate(NoiseSource(), out, count=4, seed=7, shard_size=3)
    (out / name).rename(away)
    (out / name).symlink_to(away)
    (out / "shards/000001.tar").unlink()
    before = hashes(tmp_path)
    with pytest.raises(OutputError, match=rf"set/{name} is a link"):
        generate(NoiseSource(), out, count=4, seed=7, shard_size=3)
    assert hashes(tmp_path) == before


def test_a_bundle_without_its_origin_is_called_unproven(tmp_path: Path) -> None:
    class Notes(Progress):
        def __init__(self) -> None:
            super().__init__()
            self.described: list[str] = []

        def note(self, text: str) -> None:
            self.described.append(text)

    known, numbers = {"checkpoint": "a" * 64, "split_hash": "b" * 64}, {"count": 2, "seed": 7, "shard_size": 2}
    for place, changed, missing in (
        ("proven", {}, None),
        ("none", {"checkpoint": None, "split_hash": ""}, ["split_hash", "checkpoint"]),
        ("one", {"split_hash": "unknown"}, ["split_hash"]),
    ):
        source, notes, out = NoiseSource(bundle="b", **{**known, **changed}), Notes(), tmp_path / place
        generate(source, out, **numbers, progress=notes)
        records = [json.loads((out / name).read_text()) for name in ("run.json", "dataset.json")]
        assert [record.get("unproven") for record in records] == [missing, missing]
        described = explain(out, "0", inputs=NoiseInputs(source=source))
        assert described.error is None and described.history["unproven"] == (missing or [])
        texts = ["\n".join(notes.described), (out / "README.md").read_text(), "\n".join(described.lines())]
        named = f"records no valid {' and no valid '.join(missing)}, so nothing proves" if missing else "nproven"
        assert [named in text for text in texts] == [bool(missing)] * 3
        # A run that was begun before this was recorded goes on.
        for name in ("run.json", "dataset.json"):
            old = {key: value for key, value in json.loads((out / name).read_text()).items() if key != "unproven"}
            (out / name).write_text(json.dumps(old))
        assert generate(source, out, **numbers).already_complete


def test_second_process_is_refused_and_a_killed_one_never_blocks(tmp_path: Path) -> None:
    out = tmp_path / "set"
    holder = subprocess.Popen(command(out, 1000, 5, 7, 0.05), cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        while holder.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)
        with pytest.raises(OutputError, match=f"is being written by process {holder.pid}"):
            generate(NoiseSource(), out, count=1000, seed=7, shard_size=5)
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    assert (out / ".lock").exists()
    with exclusive(out):
        pass
    assert not (out / ".lock").exists()


def test_out_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "set"):
        with pytest.raises(OutputError, match="file"):
            generate(NoiseSource(), out, count=4, seed=7, shard_size=3)


def test_failed_write_keeps_complete_shards_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "set"

    def limit() -> None:
        # A shard of 2 samples (143 kB) fits, the preview (258 kB) does not; Python gets EFBIG.
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))

    done = subprocess.run(command(out, 4, 2), cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == OutputError.exit_code
    assert f"Cannot write to {out}: File too large." in done.stderr
    assert "what is complete is kept" in done.stderr
    assert not list(out.rglob(".tmp-*"))
    assert not (out / "dataset.json").exists()
    assert generate(NoiseSource(), out, count=4, seed=7, shard_size=2).written == 0


def test_ctrl_c_keeps_what_was_drawn(tmp_path: Path) -> None:
    class Interrupted(NoiseSource):
        def draw(self, seed, indices, done):
            if indices[0] == 6:
                done(2)
                raise KeyboardInterrupt
            return super().draw(seed, indices, done)

    lost = "lost with the unfinished shard: 2 samples drawn by then"
    with pytest.raises(GenerationInterrupted, match=rf"2 of 4 shards complete in .*; {lost}") as caught:
        generate(Interrupted(), tmp_path, count=12, seed=7, shard_size=3)
    assert caught.value.exit_code == 130
    assert generate(NoiseSource(), tmp_path, count=12, seed=7, shard_size=3).written == 2


@pytest.mark.parametrize("seed", [{"a": "x"}, {"a": 10**400}, [1], "seven", 10**400])
def test_a_run_record_with_a_strange_option_is_another_runs(tmp_path: Path, seed: object) -> None:
    generate(NoiseSource(), tmp_path, count=2, seed=7, shard_size=2)
    record = json.loads((tmp_path / "run.json").read_text())
    record["config"]["seed"] = seed
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(OutputError, match="belongs to another run"):
        generate(NoiseSource(), tmp_path, count=2, seed=7, shard_size=2)
