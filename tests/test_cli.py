"""The command line as a user meets it: real processes, real files, real signals, the shipped bundle."""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from PIL import Image

from busigen.data.geometry import edit_region
from busigen.data.letterbox import fit
from busigen.runtime.backends.bundle import default_bundle
from busigen.runtime.dataset.format import FINISHED_FILES, SampleBatch
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.dataset.shards import write_shard
from tests.harness.command import CLI, ROOT, SMALL, Done, error_line, run
from tests.harness.hashing import hash_of, hashes
from tests.harness.processes import GUARD_SECONDS


@pytest.fixture(scope="module")
def healthy(synthetic_busi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(synthetic_busi / "normal", tmp_path_factory.mktemp("healthy") / "normal"))


@pytest.fixture(scope="module")
def generated(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A finished dataset, to be treated as read-only, and what the command said."""
    out = tmp_path_factory.mktemp("generated") / "set"
    return out, run("generate", *SMALL, "--out", out, "--healthy", healthy)


@pytest.fixture
def dataset(generated: tuple[Path, Done], tmp_path: Path) -> Path:
    return Path(shutil.copytree(generated[0], tmp_path / "set"))


@pytest.fixture
def unwritable(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "locked"
    folder.mkdir()
    if os.geteuid() != 0:
        folder.chmod(0o500)
        yield folder
        folder.chmod(0o700)
        return
    # Permissions do not stop root, but a read-only file system does.
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, check=False, capture_output=True).returncode:
        pytest.skip("cannot mount a read-only file system here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_workers_and_tasks_give_the_bytes_of_one_process(
    generated: tuple[Path, Done], healthy: Path, tmp_path: Path
) -> None:
    for number in (1, 2):
        done = run(
            *("generate", *SMALL, "--out", tmp_path / "set", "--healthy", healthy),
            *("--array-task", f"{number}/2", "--workers", number),
        )
        assert done.returncode == 0, done.stderr
        assert ("this task's part is complete; still to come from others: 2 shards" in done.stdout) is (number == 1)
    assert hashes(tmp_path / "set") == hashes(generated[0])


def test_an_unwritable_folder(unwritable: Path) -> None:
    line = error_line(run("generate", "--count", 1, "--out", unwritable / "set"), 4)
    assert str(unwritable / "set") in line
    assert "--out" in line


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "set"):
        line = error_line(run("generate", "--count", 1, "--out", out), 4)
        assert str(out) in line
        assert "another --out" in line
    assert (tmp_path / "file").read_text() == "mine"


def test_a_disk_that_fills_up_keeps_what_was_written(dataset: Path, healthy: Path) -> None:
    whole = hashes(dataset)
    for suffix in ("json", "tar", "parquet"):
        (dataset / "shards" / f"000002.{suffix}").unlink()
    kept = {name: digest for name, digest in hashes(dataset).items() if name.startswith("shards/")}

    def limit() -> None:
        # Less than a shard, and more than the small files: writing fails half way, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = ("generate", *SMALL, "--out", dataset, "--healthy", healthy)
    line = error_line(run(*command, preexec_fn=limit), 4)
    assert f"Cannot write to {dataset}: File too large." in line
    assert "run the same command again: what is complete is kept" in line
    assert {name: digest for name, digest in hashes(dataset).items() if name.startswith("shards/")} == kept
    assert run(*command).returncode == 0
    assert hashes(dataset) == whole


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.docx").write_text("mine")
    line = error_line(run("generate", "--count", 1, "--out", tmp_path), 4)
    assert str(tmp_path) in line
    assert "thesis.docx" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.docx"]


def test_the_folder_of_another_run_is_refused_with_the_difference(dataset: Path, healthy: Path, tmp_path: Path) -> None:
    before = hashes(dataset)
    command = ("generate", *SMALL, "--out", dataset)
    done = run(*command, "--seed", 4, "--classes", "Malignant", "--healthy", healthy, "--size", "0.02:0.1")
    line = error_line(done, 4)
    assert (
        "(--classes: benign=0.5,malignant=0.5 -> malignant=1; --seed: 3 -> 4; --size: the default -> 0.02:0.1)" in line
    )
    assert "healthy" not in done.stderr.replace(line, ""), (
        "what is known without the images is said before reading them"
    )
    assert "(--healthy: normal -> synthetic" in error_line(run(*command), 4)
    other = Path(shutil.copytree(healthy, tmp_path / "other"))
    next(other.glob("*3).png")).unlink()
    assert "(--healthy: normal -> other)" in error_line(run(*command, "--healthy", other), 4)
    assert hashes(dataset) == before


def test_a_provider_that_cannot_be_used_leaves_nothing_behind(tmp_path: Path) -> None:
    done = run("generate", "--count", 1, "--out", tmp_path / "set", "--provider", "cuda")
    if done.returncode == 0:
        pytest.skip("this machine has a CUDA device")
    line = error_line(done, 2)
    assert line.startswith("error: --provider cuda: ")
    assert f"`pip install -e '.[cuda]'` in {ROOT}" in line
    assert "--provider cpu" in line
    assert not (tmp_path / "set").exists(), "or the same command with --provider cpu would be refused"


# Generate and verify


def test_generate_writes_a_dataset_and_says_so(generated: tuple[Path, Done]) -> None:
    out, done = generated
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"6 samples (benign 3, malignant 3) in {out}: 3 shards")
    assert str(out / "preview.png") in done.stdout
    assert f"busigen verify {out}" in done.stdout
    assert {path.name for path in out.iterdir()} == {*FINISHED_FILES, "shards"}
    manifest = pl.read_parquet(out / "manifest.parquet")
    assert manifest["class"].value_counts()["count"].to_list() == [3, 3]
    assert Image.open(out / "preview.png").size[0] > 256


def test_a_rerun_does_nothing(dataset: Path, healthy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in dataset.rglob("*.*")}
    # Another batch size is no other run: it changes no sample.
    done = run("generate", *SMALL, "--batch-size", 5, "--out", dataset, "--healthy", healthy)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{dataset} is complete already: 6 samples (benign 3, malignant 3).\n"
    assert {path: path.stat().st_mtime_ns for path in dataset.rglob("*.*")} == before


def test_verify_proves_every_background(dataset: Path, healthy: Path) -> None:
    done = run("verify", dataset, "--healthy", healthy)
    assert done.returncode == 0, done.stdout
    assert f"{dataset} is sound: 6 samples in 3 shards read" in done.stdout
    assert "bit for bit: 6; not proven: 0" in done.stdout


def test_verify_finds_damage(dataset: Path) -> None:
    for number in (0, 1):
        path = dataset / "shards" / f"00000{number}.tar"
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    done = run("verify", dataset)
    assert done.returncode == 5
    assert "shards/000000.tar: has another sha256" in done.stdout
    assert "shards/000001.tar: has another sha256" in done.stdout
    assert done.stdout.count("Run `busigen verify --repair`") == 1
    assert f"{dataset} has " in done.stdout


def test_verify_finds_one_changed_pixel_behind_fitting_hashes(dataset: Path, healthy: Path) -> None:
    opened = Dataset.open(dataset)
    samples = list(opened.samples([2, 3]))
    row = samples[1].row
    width, height = Image.open(healthy / row["healthy_file"]).size
    edit = edit_region(samples[1].mask, fit(width, height).valid)
    image = samples[1].image.copy()
    image[tuple(np.argwhere(~edit)[0])] ^= 1
    types = {name: {"str": str, "int": int, "float": float}[kind] for name, kind in opened.info["columns"].items()}
    write_shard(dataset, 1, SampleBatch([samples[0], replace(samples[1], image=image)], []), types)
    done = run("verify", dataset, "--healthy", healthy)
    assert done.returncode == 5
    assert "sample 000000003: 1 pixels outside its edit region differ" in done.stdout
    assert "bit for bit: 5; not proven: 1" in done.stdout


def test_verify_misses_a_healthy_image_that_was_changed(dataset: Path, healthy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(healthy, tmp_path / "other"))
    name = pl.read_parquet(dataset / "manifest.parquet")["healthy_file"][0]
    pixels = np.array(Image.open(other / name).convert("L"))
    pixels[0, 0] ^= 1
    Image.fromarray(pixels).save(other / name)
    done = run("verify", dataset, "--healthy", other)
    assert done.returncode == 5
    needed = pl.read_parquet(dataset / "manifest.parquet")["healthy_sha256"].n_unique()
    assert (
        f"1 of {needed} healthy images are not below {other}; for example sample 000000000 needs {name} ("
        in done.stdout
    )
    assert f"{dataset} has 1 problem: " in done.stdout


def test_killed_at_any_moment_it_ends_with_the_same_bytes(
    generated: tuple[Path, Done], healthy: Path, tmp_path: Path
) -> None:
    whole, _ = generated
    out = tmp_path / "set"
    command = [*CLI, *map(str, ("generate", *SMALL, "--out", out, "--healthy", healthy))]
    rng = random.Random(5)
    kills = 0
    for complete in range(2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # Counted from the moment that the folder is claimed, so that start-up does not eat the instants.
        while process.poll() is None and not (out / "run.json").exists():
            time.sleep(0.01)
        # By what is done, not by the clock: how long a shard takes depends on what else the machine does.
        while process.poll() is None and len(list((out / "shards").glob("*.json"))) < complete:
            time.sleep(0.01)
        time.sleep(rng.uniform(0.0, 0.5))
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 1
    assert run("generate", *SMALL, "--out", out, "--healthy", healthy).returncode == 0
    assert hashes(out) == hashes(whole)


def begun(command: list[str], line: str) -> subprocess.Popen[str]:
    """Start a command, and wait until it says a line that begins so."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A test run in a shell's background inherits that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    assert any(said.startswith(line) for said in process.stderr)
    return process


def test_ctrl_c_says_how_to_continue(tmp_path: Path) -> None:
    out = tmp_path / "set"
    command = [*CLI, "generate", "--count", "500", "--shard-size", "500", "--batch-size", "1", "--out", str(out)]
    process = begun(command, "generating: ")
    assert process.stderr is not None
    # Until a sample is in the shard, which is then open.
    assert any(re.match("generating: [1-9][0-9]*/500", line) for line in process.stderr)
    process.send_signal(signal.SIGINT)
    described = next(line for line in process.stderr if "Ctrl-C: " in line)
    assert described.startswith("generating: Ctrl-C: finishing the open shard (")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=GUARD_SECONDS)
    line = error_line(subprocess.CompletedProcess(command, process.returncode, output, errors), 130)
    assert f"Interrupted with 0 of 1 shard complete in {out}" in line
    assert "same command" in line


def test_ctrl_c_leaves_a_line_where_a_command_has_nothing_of_its_own_to_say(
    synthetic_busi: Path, tmp_path: Path
) -> None:
    process = begun([*CLI, "prepare", str(synthetic_busi), "--out", str(tmp_path / "prepared")], "preparing: 0/")
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=GUARD_SECONDS)
    assert errors.splitlines()[-1] == "error: Interrupted."
    assert process.returncode == 130
    assert not output


def test_a_missing_shard_is_not_counted_as_read(dataset: Path) -> None:
    (dataset / "shards" / "000001.tar").unlink()
    done = run("verify", dataset)
    assert done.returncode == 5
    assert done.stdout.splitlines()[-1] == f"{dataset} has 1 problem: 4 samples read"


def test_help_lists_the_commands_in_the_order_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    listed = re.findall(r"^│ ([a-z][a-z-]*) ", run("--help").stdout, flags=re.MULTILINE)
    assert listed[0] == "generate"
    assert [name for name in listed if name in {"prepare", "train", "export", "build-engines"}] == [
        "prepare",
        "train",
        "export",
        "build-engines",
    ]


def test_the_shipped_bundle_generates_without_data_and_without_torch(tmp_path: Path) -> None:
    out = tmp_path / "set"
    code = (
        "import sys\nfrom busigen.cli import main\n"
        f"sys.argv = ['busigen', 'generate', '--count', '2', '--batch-size', '2', '--out', {str(out)!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    print('heavy:', [n for n in ('torch', 'diffusers', 'transformers', 'onnx') if n in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"
    fingerprint = json.loads((out / "dataset.json").read_text())["fingerprint"]
    assert fingerprint["healthy"] == "synthetic"
    assert fingerprint["bundle"] == hash_of(default_bundle() / "bundle.json")
    checked = run("verify", out)
    assert checked.returncode == 0, checked.stdout
    assert "2 samples in 1 shard read" in checked.stdout
    (tmp_path / "healthy").mkdir()
    proving = run("verify", out, "--healthy", tmp_path / "healthy")
    assert proving.returncode == 0, proving.stdout
    assert "2 synthetic backgrounds: made from no healthy image, so there is nothing to prove" in proving.stdout
    assert "bit for bit" not in proving.stdout
