"""Datasets at URLs, here ``file://``: the same bytes, promises and refusals as in a folder. S3: test_remote_s3.py."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from busigen.errors import InputError, MissingDependencyError, OutputError, UsageError
from busigen.runtime.dataset.finalize import write_manifest
from busigen.runtime.dataset.shards import FileRecord, ShardRecord, write_table
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.maintenance.remote import explain_place, refuse_repair, verify_place, viewed
from busigen.runtime.output.ownership import Beat
from busigen.runtime.output.remote import RemoteOutput, _FromStore
from busigen.runtime.progress import Progress
from busigen.runtime.storage.url import Address, place_of
from tests.harness.command import error_line, run
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource
from tests.harness.processes import GUARD_SECONDS, ROOT, Hold, listening, read_until, wait_for
from tests.harness.replaying import NoiseInputs

RUN = {"count": 8, "seed": 7, "shard_size": 3}
"""What the fixture ``pristine`` holds."""


def started(url: str, spool: Path, *more: object, hold: Hold | None = None) -> subprocess.Popen[str]:
    numbers = map(str, (url, RUN["count"], RUN["shard_size"], "--spool", spool, *more))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.harness.remote_source", *numbers],
        cwd=ROOT,
        env=hold and hold.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{(tmp_path / 'bucket' / 'set').as_posix()}"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return tmp_path / "bucket" / "set"


def write(url: str, tmp_path: Path, source: NoiseSource | None = None, **changed: Any) -> Any:
    beat = changed.pop("beat", None)
    destination = RemoteOutput(Address(url), tmp_path / changed.pop("spools", "spools"), beat=beat)
    return generate(source or NoiseSource(), destination, **{**RUN, **changed})


def test_the_files_are_those_of_a_folder_and_the_spool_is_gone(
    url: str, there: Path, tmp_path: Path, pristine: Path
) -> None:
    report = write(url, tmp_path)
    assert hashes(there) == hashes(pristine)
    assert not list((tmp_path / "spools").iterdir())
    assert (str(report.folder), report.written, report.already_complete) == (url, 3, False)
    assert write(url, tmp_path).already_complete


def test_a_killed_run_continues_wherever_it_was_killed(tmp_path: Path) -> None:
    """Before and after every seventh change that a run makes at the URL; the slow test below does all of them."""
    tally = swept(f"file://{(tmp_path / 'at').as_posix()}", tmp_path, 7)
    assert tally.pop("killed") >= 8
    assert not any(tally.values()), tally


@pytest.mark.slow
def test_a_killed_run_continues_from_every_change(tmp_path: Path) -> None:
    tally = swept(f"file://{(tmp_path / 'at').as_posix()}", tmp_path, 1)
    assert tally.pop("killed") >= 50
    assert not any(tally.values()), tally


def swept(url: str, folder: Path, step: int, **options: Any) -> dict[str, int]:
    if not hasattr(os, "fork"):
        pytest.skip("runs are forked")
    command = [sys.executable, "-m", "tests.harness.remote_crash_sweep", url, str(folder), str(step)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=4 * GUARD_SECONDS, check=False, **options
    )
    assert done.returncode == 0, done.stderr
    tally: dict[str, int] = json.loads(done.stdout)
    return tally


def test_another_config_is_refused_with_the_difference(url: str, there: Path, tmp_path: Path) -> None:
    write(url, tmp_path)
    before = hashes(there)
    with pytest.raises(OutputError, match=f"{url} belongs to another run .*--seed: 7 -> 8"):
        write(url, tmp_path, seed=8)
    assert hashes(there) == before


def test_foreign_files_are_left_alone(url: str, there: Path, tmp_path: Path) -> None:
    there.mkdir(parents=True)
    (there / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match=r"holds other files \(thesis.tex\) and no run.json"):
        write(url, tmp_path)
    assert [path.name for path in there.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("record", [{}, [], {"name": "another program"}], ids=str)
def test_a_run_record_of_another_program_has_its_files_left_alone(
    url: str, there: Path, tmp_path: Path, record: object
) -> None:
    (there / "shards").mkdir(parents=True)
    (there / "run.json").write_text(json.dumps(record))
    for name in (".tmp-0a1b2c3d-run.json", ".tmp-notes", "shards/.tmp-0a1b2c3d-000001.tar", "shards/.tmp-draft"):
        (there / name).write_text("mine")
    before = hashes(there)
    with pytest.raises(OutputError, match="is not a run record of busigen"):
        write(url, tmp_path)
    assert hashes(there) == before


def test_what_only_looks_like_a_leftover_stays(url: str, there: Path, tmp_path: Path, pristine: Path) -> None:
    write(url, tmp_path)
    (there / "shards/.tmp-draft").write_text("mine")
    for name in (".tmp-0a1b2c3d-run.json", ".tmp-1-0a1b2c3d-.lock", "shards/.tmp-1-0a1b2c3d-000001.tar"):
        (there / name).write_text("torn")
    write(url, tmp_path)
    assert hashes(there).keys() - hashes(pristine).keys() == {"shards/.tmp-draft"}


def test_a_newer_dataset_is_not_made_again(url: str, there: Path, tmp_path: Path) -> None:
    write(url, tmp_path)
    for name in ("dataset.json", "run.json"):
        content = json.loads((there / name).read_text())
        (there / name).write_text(json.dumps({**content, "schema_version": 9}))
        before = hashes(there)
        for command in (lambda: write(url, tmp_path), lambda: verify_place(Address(url))):
            with pytest.raises(InputError, match=rf"{name} has schema version 9"):
                command()
        assert hashes(there) == before


def test_a_spool_is_emptied_of_its_own_files_alone(url: str, tmp_path: Path) -> None:
    spool = RemoteOutput(Address(url), tmp_path / "spools").folder
    (spool / "shards/deep").mkdir(parents=True)
    mine = [spool / "thesis.tex", spool / "shards/notes.txt", spool / "shards/deep/notes.txt", spool / ".tmp-notes"]
    for path in mine:
        path.write_text("mine")
    (spool / "shards/000009.tar").write_text("torn")
    write(url, tmp_path)
    assert hashes(tmp_path / "spools").keys() == {path.relative_to(tmp_path / "spools").as_posix() for path in mine}
    spool.rename(tmp_path / "away")
    spool.symlink_to(tmp_path / "away")
    before = hashes(tmp_path / "away")
    with pytest.raises(OutputError, match="is a link"):
        write(url, tmp_path)
    assert hashes(tmp_path / "away") == before


def test_an_unsound_shard_is_made_again(url: str, there: Path, tmp_path: Path, pristine: Path) -> None:
    write(url, tmp_path)
    (there / "shards" / "000001.tar").write_bytes(b"cut short")
    (there / "shards" / "000002.json").write_text("{")
    assert write(url, tmp_path).written == 2
    assert hashes(there) == hashes(pristine)


def test_what_arrives_damaged_is_sent_again(url: str, there: Path, tmp_path: Path, pristine: Path) -> None:
    destination = RemoteOutput(Address(url), tmp_path / "spools")
    fs = destination._store._fs
    send, damaged = fs.put_file, []

    def put_file(local: str, path: str) -> None:
        send(local, path)
        if path.endswith("000001.tar") and not damaged:
            data = bytearray(Path(path).read_bytes())
            data[len(data) // 2] ^= 1
            damaged.append(Path(path).write_bytes(data))

    fs.put_file = put_file
    generate(NoiseSource(), destination, **RUN)
    assert damaged
    assert hashes(there) == hashes(pristine)


def test_the_spool_holds_few_shards_however_many_there_are(url: str, there: Path, tmp_path: Path) -> None:
    held: list[int] = []

    class Watching(NoiseSource):
        def draw(self, seed: int, indices: Any, done: Callable[[int], None]) -> Any:
            held.append(len(list((tmp_path / "spools").rglob("*.tar"))))
            return super().draw(seed, indices, done)

    write(url, tmp_path, Watching(), count=24, shard_size=1)
    # One that is being written or sent, and one that waits for that.
    assert max(held) <= 2
    assert len(list((there / "shards").glob("*.tar"))) == 24


def test_workers_publish_through_the_coordinator(url: str, there: Path, tmp_path: Path, pristine: Path) -> None:
    process = started(url, tmp_path / "spools", "--workers", 2)
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 0, errors
    assert hashes(there) == hashes(pristine)
    assert not list((tmp_path / "spools").iterdir())


def test_a_second_writer_is_refused_from_here_and_from_elsewhere(
    url: str, there: Path, tmp_path: Path, pristine: Path
) -> None:
    process = started(url, tmp_path / "spools", "--seconds", GUARD_SECONDS, "--beat", 0.5)
    read_until(process, "generating")
    with pytest.raises(OutputError, match=f"{url} is being written by process {process.pid}"):
        write(url, tmp_path)
    # Another spool is another machine as far as anyone can tell: it has to see the lock change.
    with pytest.raises(OutputError, match=rf"{url} is being written by process {process.pid} on "):
        write(url, tmp_path, spools="elsewhere", beat=Beat(0.5, GUARD_SECONDS, 0.1))
    process.kill()
    process.wait()
    write(url, tmp_path)
    assert hashes(there) == hashes(pristine)


def test_a_dead_writers_lock_is_taken_over_from_elsewhere(
    url: str, there: Path, tmp_path: Path, pristine: Path
) -> None:
    hold = Hold(tmp_path, 3)
    process = started(url, tmp_path / "spools", hold=hold)
    wait_for(process, (there / "shards" / "000000.json").exists)
    process.kill()
    process.wait()
    assert (there / ".lock").exists()
    begun = time.monotonic()
    assert write(url, tmp_path, spools="elsewhere", beat=Beat(0.2, 1.5, 0.1)).written == 2
    assert time.monotonic() - begun >= 1.5, "it has to be watched before it counts as dead"
    assert hashes(there) == hashes(pristine)


def test_a_run_whose_lock_is_taken_over_ends_and_publishes_nothing_more(url: str, there: Path, tmp_path: Path) -> None:
    other = json.dumps({"mark": "another", "holder": "process 1 on elsewhere", "beat": 1}).encode()

    class Robbed(NoiseSource):
        def draw(self, seed: int, indices: Any, done: Callable[[int], None]) -> Any:
            if 3 in indices:
                (there / ".lock").write_bytes(other)
            return super().draw(seed, indices, done)

    with pytest.raises(OutputError, match="taken over by process 1 on elsewhere"):
        write(url, tmp_path, Robbed())
    assert not (there / "shards" / "000001.json").exists()
    assert not (there / "dataset.json").exists()
    assert (there / ".lock").read_bytes() == other


def test_writers_that_start_at_once_do_not_disturb_each_other(
    url: str, there: Path, tmp_path: Path, pristine: Path
) -> None:
    """As if from three machines; who waits for the first one may find the dataset complete."""
    timing = ("--seconds", 0.1, "--beat", 0.5, "--dead", GUARD_SECONDS)
    processes = [started(url, tmp_path / f"spools-{number}", *timing) for number in range(3)]
    errors = [process.communicate(timeout=GUARD_SECONDS)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes and set(codes) <= {0, 4}, errors
    assert hashes(there) == hashes(pristine)


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="this system cannot pause a process")
def test_a_paused_writer_that_wakes_up_after_its_lock_was_taken_over_ends(
    url: str, there: Path, tmp_path: Path, pristine: Path
) -> None:
    hold = Hold(tmp_path, 3)
    process = started(url, tmp_path / "spools", "--beat", 0.5, hold=hold)
    wait_for(process, (there / "shards" / "000000.json").exists)
    process.send_signal(signal.SIGSTOP)
    report = write(url, tmp_path, spools="elsewhere", beat=Beat(0.5, 2.0, 0.1))
    assert report.written == 2
    process.send_signal(signal.SIGCONT)
    hold.release()
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == 4, errors
    assert f"{url}: the lock .lock was removed while this process could not be heard" in errors
    assert hashes(there) == hashes(pristine)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_and_publishes_the_open_shard(
    url: str, there: Path, tmp_path: Path, pristine: Path, number: int, code: int
) -> None:
    hold = Hold(tmp_path, 1)
    process = started(url, tmp_path / "spools", hold=hold)
    wait_for(process, hold.reached)
    process.send_signal(number)
    read_until(process, "finishing ")
    hold.release()
    _, errors = process.communicate(timeout=GUARD_SECONDS)
    assert process.returncode == code, errors
    assert len(list((there / "shards").glob("*.json"))) == 1
    assert f"with 1 of 3 shards complete in {url}" in errors
    assert not (there / ".lock").exists()
    assert not list((tmp_path / "spools").iterdir())
    assert write(url, tmp_path).written == 2
    assert hashes(there) == hashes(pristine)


def test_the_manifest_of_streamed_tables_has_the_same_bytes(tmp_path: Path, url: str, there: Path) -> None:
    """Row groups that hold many shards, and shards of other sizes than row groups."""
    rng = np.random.default_rng(5)
    (there / "shards").mkdir(parents=True)
    for size, count in ((37, 9001), (4096, 9000), (5000, 12_000)):
        records = []
        for number, first in enumerate(range(0, count, size)):
            rows = range(first, min(first + size, count))
            table = pl.DataFrame(
                {
                    "key": [f"{index:09d}" for index in rows],
                    "class": rng.choice(["benign", "malignant"], len(rows)),
                    "score": rng.random(len(rows)),
                    "rare": pl.Series([index if index % 50 == 0 else None for index in rows], dtype=pl.Int64),
                }
            )
            name = f"shards/{number:06d}.parquet"
            file = io.BytesIO()
            write_table(table, file)
            (there / name).write_bytes(file.getvalue())
            record = FileRecord.of(there, name)
            records.append(ShardRecord(number, first, len(rows), {}, {}, [], record, record))
        spool = tmp_path / "spool"
        spool.mkdir(exist_ok=True)
        write_manifest(there, records)
        write_manifest(spool, records, _FromStore(RemoteOutput(Address(url), tmp_path / "spools")._store, spool))
        assert (spool / "manifest.parquet").read_bytes() == (there / "manifest.parquet").read_bytes()


def test_verify_reads_a_url_and_says_what_to_do_there(url: str, there: Path, tmp_path: Path, pristine: Path) -> None:
    write(url, tmp_path)
    sound = verify_place(Address(url))
    assert (sound.ok, str(sound.folder), sound.samples, sound.shards) == (True, url, 8, 3)
    tar = there / "shards" / "000001.tar"
    data = bytearray(tar.read_bytes())
    data[len(data) // 2] ^= 1
    tar.write_bytes(data)
    (there / "notes.txt").write_text("?")
    done = run("verify", url)
    assert done.returncode == 5
    assert "shards/000001.tar: has another sha256" in done.stdout
    assert "notes.txt: is no part of the dataset" in done.stdout
    assert "Delete shards/000001.json there" in done.stdout
    (there / "shards" / "000001.json").unlink()
    (there / "notes.txt").unlink()
    assert write(url, tmp_path).written == 1
    assert hashes(there) == hashes(pristine)
    with pytest.raises(UsageError, match="--repair mends folders"):
        refuse_repair(Address(url))


def test_explain_reads_a_url(url: str, tmp_path: Path) -> None:
    write(url, tmp_path)
    described = explain_place(Address(url), "000000004", inputs=NoiseInputs())
    assert described.error is None
    assert (described.history["dataset"], described.history["index"], described.history["seed"]) == (url, 4, 7)
    assert described.replay is not None and described.replay.image_agrees and described.replay.mask_agrees


def test_a_view_fetches_nothing_to_other_places(url: str, there: Path, tmp_path: Path) -> None:
    """Names at a URL may be anything; only those of a dataset's files become names of local ones."""
    write(url, tmp_path)
    for name in ("shards/..000.json", "shards/1.json", "shards/999999999999.json", "deep/er/run.json"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).write_text("{}")
    with viewed(Address(url)) as view:
        found = {name for name in hashes(view.folder) if not name.endswith((".tar", ".parquet"))}
    assert found == {f"shards/00000{n}.json" for n in range(3)} | {
        "run.json",
        "dataset.json",
        "README.md",
        "croissant.json",
        "preview.png",
    }


@pytest.mark.parametrize(
    ("text", "described"),
    [
        ("memory://set", "lies in the memory of a process"),
        ("https://example.org/set", "can be read but not written to"),
        ("simplecache::s3://bucket/set", "chains two protocols"),
        ("s3://", "names no place"),
    ],
)
def test_urls_that_cannot_work_are_refused(text: str, described: str) -> None:
    with pytest.raises(UsageError, match=described):
        place_of(text)


def test_places_are_told_apart() -> None:
    assert place_of("out/set") == Path("out/set")
    assert place_of("S3://bucket/set/") == Address("s3://bucket/set")
    assert str(place_of("gs://bucket/a") / "run.json") == "gs://bucket/a/run.json"


def test_an_unknown_protocol_or_a_missing_package_is_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Protocol not known: foo"):
        RemoteOutput(Address("foo://bucket/set"), tmp_path)
    without = "import sys; sys.modules[{!r}] = None\nfrom busigen.cli import main; sys.argv[1:] = {!r}; main()"
    for module, url, extra in (("gcsfs", "gs://bucket/set", "gcs"), ("fsspec", "s3://bucket/set", "s3")):
        code = without.format(module, ["generate", "--count", "2", "--out", url, "--spool", str(tmp_path)])
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == MissingDependencyError.exit_code, done.stderr
        assert f"{url} needs a package that is not installed. Run `pip install" in done.stderr
        assert f"[{extra}]" in done.stderr


def test_commands_that_read_folders_say_what_to_do(tmp_path: Path) -> None:
    line = error_line(run("merge", tmp_path / "all", "s3://bucket/first", tmp_path / "second"), 2)
    assert "`busigen merge` reads folders, and s3://bucket/first is a URL" in line
    assert "aws s3 sync s3://bucket/first copy" in line


def test_tasks_of_one_url_are_refused(url: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"provider": "cpu", "count": 4, "shard_size": 2, "spool": tmp_path / "spools"}
    for task in ({"array_task": "1/2"}, {"index_range": "0:2"}):
        with pytest.raises(UsageError, match=r"need one folder for all tasks.*--workers or --launcher ray"):
            GenerateOptions(**options, out=Address(url), **task).run(Progress())
    assert not (tmp_path / "bucket").exists()
    with pytest.raises(UsageError, match=r"--spool .* is for URLs"):
        GenerateOptions(**options, out=tmp_path / "set").run(Progress())
