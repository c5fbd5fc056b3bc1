"""Merged datasets: the bytes of one run where that is possible, parts that keep theirs where it is not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from busigen.errors import BusigenError, InputError, IntegrityError, OutputError, UsageError
from busigen.evaluation.reading.sets import read_set
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.dataset.shards import FileRecord
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.merge import merge, open_parts
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from busigen.runtime.storage.files import atomic_folder
from tests.harness.command import CLI, ROOT, error_line, run
from tests.harness.hashing import hash_of, hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs, flip


def make(folder: Path, first: int, count: int, *, seed: int = 7, shard_size: int = 2, **fingerprint: object) -> Path:
    source = NoiseSource(**fingerprint)
    generate(source, folder, count=count, seed=seed, shard_size=shard_size, first=first)
    return folder


def came_from(info: dict[str, Any]) -> list[list[str]]:
    return [[source["folder"] for source in part["sources"]] for part in info["parts"]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Treat as read-only: links share their bytes."""
    place = tmp_path_factory.mktemp("made")
    return {
        "whole": make(place / "whole", 0, 7),
        "front": make(place / "front", 0, 4),
        "back": make(place / "back", 4, 3),
        "other": make(place / "other", 0, 3, seed=8),
    }


@pytest.fixture
def parts(made: dict[str, Path], tmp_path: Path) -> Path:
    """Two seeds, of which one is two ranges: two parts, copied so that a test may damage them."""
    merge(tmp_path / "linked", [made["other"], made["back"], made["front"]])
    return Path(shutil.copytree(tmp_path / "linked", tmp_path / "all"))


def test_ranges_that_follow_one_another_are_one_run(made: dict[str, Path], tmp_path: Path) -> None:
    before = hashes(made["front"]) | hashes(made["back"])
    out = tmp_path / "all"
    report = merge(out, [made["back"], made["front"]])
    assert (report.samples, report.parts) == (7, 1)
    assert hashes(made["front"]) | hashes(made["back"]) == before
    merged, alone = hashes(out), hashes(made["whole"])
    assert {name for name in merged if merged[name] != alone.get(name)} == {"run.json", "dataset.json"}
    assert merged.keys() == alone.keys()
    for name in ("run.json", "dataset.json"):
        record = json.loads((out / name).read_text())
        assert [source["folder"] for source in record.pop("sources")] == ["front", "back"]
        assert record == json.loads((made["whole"] / name).read_text())
    assert verify(out).ok
    # It is the folder of that run in every other way, too.
    again = generate(NoiseSource(), out, count=7, seed=7, shard_size=2)
    assert again.already_complete and hashes(out) == merged


def test_other_seeds_are_kept_in_parts(made: dict[str, Path], parts: Path) -> None:
    assert verify(parts).ok
    assert verify(parts).samples == 10
    first, second = open_parts(parts)
    assert hashes(second.folder) == hashes(made["other"])
    assert hashes(first.folder / "shards") == hashes(made["whole"] / "shards")
    info = json.loads((parts / "dataset.json").read_text())
    assert came_from(info) == [["front", "back"], ["other"]]
    assert (info["samples"], sum(info["classes"].values()), info["schema_version"]) == (10, 10, 2)
    rows = pl.read_parquet(parts / "manifest.parquet")
    assert rows["part"].to_list() == ["parts/000"] * 7 + ["parts/001"] * 3
    assert rows["index"].to_list() == [*range(7), *range(3)]
    assert "| `parts/001` | 3 | 8 | other |" in (parts / "README.md").read_text()
    with pytest.raises(BusigenError):
        Dataset.open(parts)
    frames = read_set(parts)
    assert (len(frames), frames.refused) == (10, ())


def test_shards_are_linked_and_never_moved(made: dict[str, Path], tmp_path: Path) -> None:
    report = merge(tmp_path / "all", [made["front"], made["back"]])
    linked = (tmp_path / "all/shards/000002.tar").samefile(made["back"] / "shards/000002.tar")
    assert linked is not report.copied


def test_what_does_not_join_seamlessly_is_kept_in_parts(made: dict[str, Path], tmp_path: Path) -> None:
    gap = make(tmp_path / "gap", 8, 2)
    report = merge(tmp_path / "all", [made["front"], gap])
    assert (report.parts, report.samples) == (2, 6)
    assert verify(tmp_path / "all").ok
    # Merging again takes parts apart and remembers where they came from.
    report = merge(tmp_path / "more", [tmp_path / "all", made["back"]])
    assert (report.parts, report.samples) == (2, 9)
    info = json.loads((tmp_path / "more/dataset.json").read_text())
    assert came_from(info) == [["front", "back"], ["gap"]]
    assert verify(tmp_path / "more").ok


def test_a_sample_is_explained_by_part_and_key(parts: Path) -> None:
    inputs = NoiseInputs()
    described = explain(parts, "001/000000002", inputs=inputs)
    assert described.history["seed"] == 8
    assert described.replay is not None and described.replay.image_agrees and described.replay.mask_agrees
    assert explain(parts, "parts/000/2", inputs=inputs, replay=False).history["seed"] == 7
    assert explain(parts, "5", inputs=inputs, replay=False).history["seed"] == 7
    with pytest.raises(UsageError, match=r"'2' is in several parts of .*: 000, 001\. Name part and key"):
        explain(parts, "2", inputs=inputs)
    for key in ("9", "002/2", "x", "../001/2", "001/"):
        with pytest.raises(UsageError):
            explain(parts, key, inputs=inputs)


def test_damage_is_found_and_repaired_in_its_part(parts: Path) -> None:
    sound = hashes(parts)
    flip(parts / "parts/001/shards/000000.tar")
    (parts / "parts/000/shards/000001.parquet").unlink()
    flip(parts / "manifest.parquet")
    (parts / "README.md").unlink()
    (parts / "stranger.txt").write_text("mine")
    report = verify(parts)
    blamed = {"parts/001/shards/000000.tar", "parts/000/shards/000001.parquet", "README.md", "stranger.txt"}
    assert {problem.file for problem in report.problems} == blamed
    (parts / "stranger.txt").unlink()
    mended = repair(parts, inputs=NoiseInputs())
    assert mended.error is None and mended.after.ok
    assert hashes(parts) == sound


@pytest.mark.parametrize("name", ["README.md", "manifest.parquet", "dataset.json", "croissant.json"])
def test_a_link_beside_the_parts_is_replaced(parts: Path, tmp_path: Path, name: str) -> None:
    (parts / name).rename(tmp_path / "away")
    before = hash_of(tmp_path / "away")
    (parts / name).symlink_to(tmp_path / "away")
    assert {(problem.file, problem.problem) for problem in verify(parts).problems} == {
        (name, "is a link, and links are not followed.")
    }
    assert repair(parts, inputs=NoiseInputs()).error is None
    assert verify(parts).ok and not (parts / name).is_symlink()
    assert hash_of(tmp_path / "away") == before


def test_a_merged_dataset_of_before_croissant_is_whole(parts: Path) -> None:
    (parts / "croissant.json").unlink()
    assert verify(parts).ok
    assert repair(parts, inputs=NoiseInputs()).repaired == ()


@pytest.mark.parametrize("name", ["manifest.parquet", "dataset.json"])
def test_a_changed_summary_of_the_parts_is_written_again(parts: Path, name: str) -> None:
    sound = hashes(parts)
    if name == "dataset.json":
        text = (parts / name).read_text()
        (parts / name).write_text(text.replace('"samples": 10', '"samples": 11'))
    else:
        flip(parts / name)
    assert {problem.file for problem in verify(parts).problems} == {name}
    assert repair(parts, inputs=NoiseInputs()).error is None
    assert hashes(parts) == sound


def test_what_does_not_fit_is_refused_with_the_difference(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "all"
    bundle = make(tmp_path / "bundle", 8, 2, bundle="bb")
    overlap = make(tmp_path / "overlap", 2, 4)
    unfinished = make(tmp_path / "unfinished", 8, 2)
    (unfinished / "dataset.json").unlink()
    for folders, kind, problem in (
        ([made["front"]], UsageError, "fewer than two"),
        (
            [made["front"], bundle],
            InputError,
            r"front and .*bundle are of different runs \(--bundle: the default -> bb",
        ),
        ([made["front"], overlap], InputError, r"samples 2 to 3 of seed 7 are in .*front and in .*overlap"),
        ([made["front"], made["front"]], InputError, "samples 0 to 3 of seed 7"),
        ([made["front"], unfinished], InputError, "is not finished"),
        ([made["front"], tmp_path], InputError, "is no busigen dataset"),
    ):
        with pytest.raises(kind, match=problem):
            merge(out, folders)
        assert not out.exists()
    with pytest.raises(OutputError, match="exists"):
        merge(made["whole"], [made["front"], made["back"]])


def test_a_damaged_dataset_is_refused_and_nothing_appears(made: dict[str, Path], tmp_path: Path) -> None:
    for name in ("shards/000001.tar", "shards/000001.json", "manifest.parquet"):
        broken = Path(shutil.copytree(made["other"], tmp_path / "broken"))
        flip(broken / name)
        with pytest.raises(IntegrityError, match=r"verify --repair|anew"):
            merge(tmp_path / "all", [made["front"], broken])
        shutil.rmtree(broken)
        assert list(tmp_path.iterdir()) == []


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of a copy; the original may share its bytes."""
    content = json.loads(path.read_text())
    change(content)
    path.unlink()
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda info: info["shards"].pop(), "shards"),
        (lambda info: info["shards"].clear(), "shards"),
        (lambda info: info.pop("shards"), "shards"),
        (lambda info: info["shards"].append(info["shards"][0]), "shards"),
        (lambda info: info["shards"][0]["tar"].update(sha256="0" * 64), "shards"),
        (lambda info: info["classes"].update(benign=99), "classes"),
        (lambda info: info["fingerprint"].update(source=None), "run.json"),
    ],
)
def test_a_list_that_does_not_fit_plan_and_records_is_refused(
    made: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], named: str
) -> None:
    fronts, others = Path(shutil.copytree(made["front"], tmp_path / "fronts")), [made["back"], made["other"]]
    edit(fronts / "dataset.json", change)
    if named == "run.json":
        others = [Path(shutil.copytree(fronts, tmp_path / "same"))]
        edit(others[0] / "dataset.json", lambda info: info["config"].update(seed=8))
    assert not verify(fronts).ok
    for other in others:
        with pytest.raises(IntegrityError, match=named):
            merge(tmp_path / "all", [fronts, other])
        assert not (tmp_path / "all").exists() and not list(tmp_path.glob(".tmp-*"))


def test_a_record_of_other_samples_is_refused(made: dict[str, Path], tmp_path: Path) -> None:
    fronts = Path(shutil.copytree(made["front"], tmp_path / "fronts"))
    for name, place in (("shards/000001.json", None), ("dataset.json", 1)):
        edit(fronts / name, lambda record, at=place: (record if at is None else record["shards"][at]).update(first=0))
    with pytest.raises(IntegrityError, match=r"shards/000001.json is not what"):
        merge(tmp_path / "all", [fronts, made["other"]])


def test_a_folder_of_the_same_name_is_left_alone(made: dict[str, Path], tmp_path: Path) -> None:
    out, mine = tmp_path / "all", tmp_path / "mine"
    (mine / "deep").mkdir(parents=True)
    (mine / "thesis.tex").write_text("precious")
    shutil.copytree(mine, tmp_path / ".tmp-merge-all")
    (tmp_path / ".tmp-1-0a1b2c3d-all").symlink_to(mine)
    before = hashes(mine)
    merge(out, [made["front"], made["other"]])
    assert hashes(mine) == before == hashes(tmp_path / ".tmp-merge-all")
    assert out.is_dir() and not out.is_symlink() and verify(out).ok
    assert {path.name for path in tmp_path.iterdir()} == {"all", "mine", ".tmp-merge-all", ".tmp-1-0a1b2c3d-all"}
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "mine" / "deep")
    with pytest.raises(OutputError, match="is a link"):
        merge(link, [made["front"], made["other"]])


@pytest.mark.parametrize(
    "name", ["README.md", "croissant.json", "preview.png", "run.json", "dataset.json", "shards", "shards/000000.tar"]
)
def test_no_link_of_a_dataset_is_followed(made: dict[str, Path], tmp_path: Path, name: str) -> None:
    theirs, secret = Path(shutil.copytree(made["other"], tmp_path / "theirs")), tmp_path / "secret"
    (theirs / name).rename(secret)  # So that what it points to is even what was recorded.
    (theirs / name).symlink_to(secret)
    with pytest.raises(InputError, match=rf"theirs/{name} is a link"):
        merge(tmp_path / "all", [made["front"], theirs])
    with pytest.raises(InputError, match="is a link"):
        explain(theirs, "0", inputs=NoiseInputs(), replay=False)
    with pytest.raises(InputError, match="is a link"):
        read_set(theirs)
    assert name in {problem.file for problem in verify(theirs).problems}
    assert not (tmp_path / "all").exists()


def test_a_part_that_is_a_link_is_refused(parts: Path, made: dict[str, Path], tmp_path: Path) -> None:
    (parts / "parts/001").rename(tmp_path / "away")
    (parts / "parts/001").symlink_to(tmp_path / "away")
    for command in (verify, repair, read_set, lambda folder: merge(tmp_path / "more", [folder, made["whole"]])):
        with pytest.raises(InputError, match=r"parts/001 is a link"):
            command(parts)


def test_files_that_no_hash_covers_are_made_anew(made: dict[str, Path], tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(made["other"], tmp_path / "theirs"))
    for name in ("README.md", "croissant.json", "preview.png"):
        (theirs / name).write_text("click here")
    os.mkfifo(theirs / "pipe")
    merge(tmp_path / "all", [made["front"], theirs])
    assert hashes(tmp_path / "all/parts/001") == hashes(made["other"])
    for name in ("README.md", "preview.png"):
        (theirs / name).unlink()
        os.mkfifo(theirs / name)
    merge(tmp_path / "more", [made["front"], theirs])
    assert hashes(tmp_path / "more/parts/001") == hashes(made["other"])


def test_a_manifest_of_other_rows_is_refused_behind_a_hash_that_fits(made: dict[str, Path], tmp_path: Path) -> None:
    theirs = Path(shutil.copytree(made["other"], tmp_path / "theirs"))
    rows = pl.read_parquet(theirs / "manifest.parquet")
    for table, refused in ((rows.reverse(), True), (rows, False)):
        (theirs / "manifest.parquet").unlink()
        table.write_parquet(theirs / "manifest.parquet", compression="snappy")
        file = asdict(FileRecord.of(theirs, "manifest.parquet"))
        edit(theirs / "dataset.json", lambda info, file=file: info["files"].update({"manifest.parquet": file}))
        if refused:
            with pytest.raises(IntegrityError, match=r"manifest.parquet is not what"):
                merge(tmp_path / "all", [made["front"], theirs])
        else:
            # Another version packs the same rows otherwise.
            merge(tmp_path / "all", [made["front"], theirs])
            assert verify(tmp_path / "all").ok


def test_killed_anywhere_a_merge_leaves_nothing_or_all(made: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "all"
    arguments = [*CLI, "merge", str(out), str(made["front"]), str(made["other"]), str(made["back"])]
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob(".tmp-*/parts")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    if out.exists():
        assert verify(out).ok
        out.rename(tmp_path / "before")
    done = run("merge", out, made["front"], made["other"], made["back"])
    assert done.returncode == 0, done.stderr
    assert "10 samples in" in done.stdout and "in 2 parts" in done.stdout
    assert verify(out).ok
    assert not list(tmp_path.glob(".tmp-*"))
    assert "exists" in error_line(run("merge", out, made["front"], made["other"]), 4)


def test_what_a_killed_merge_left_is_known_by_its_lock(made: dict[str, Path], tmp_path: Path) -> None:
    killed = """
import os, sys
from pathlib import Path
from busigen.runtime.storage.files import atomic_folder
with atomic_folder(Path(sys.argv[1])) as place:
    (place / "half").write_text("torn")
    os.kill(os.getpid(), 9)
"""
    out, beside = tmp_path / "all", tmp_path / "more"
    for place in (out, beside):
        subprocess.run([sys.executable, "-c", killed, str(place)], cwd=ROOT, check=False)
    left = {path.name for path in tmp_path.glob(".tmp-*")}
    assert len(left) == 4  # A folder and its lock, of each.
    with atomic_folder(out) as place:
        assert len(set(tmp_path.glob(".tmp-*"))) == 4
        with pytest.raises(OutputError, match=rf"all is being written by process {os.getpid()}"):
            merge(out, [made["front"], made["back"]])
        (place / "whole").write_text("whole")
    assert [path.name for path in out.iterdir()] == ["whole"]
    assert len({path.name for path in tmp_path.glob(".tmp-*")} & left) == 2
