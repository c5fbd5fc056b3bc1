"""The command line before it does anything: help, start-up, and what it refuses, in one line each."""

from __future__ import annotations

import inspect
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path

import pytest
from PIL import Image

import busigen
from busigen.cli.generate import generate
from busigen.registry import LESION_CLASSES
from busigen.runtime.backends.bundle import default_bundle
from busigen.runtime.execution.run import GenerateOptions
from tests.harness.command import CLI, ROOT, error_line, run

COMMANDS = ("prepare", "train", "export", "generate", "verify", "audit", "doctor")


# Help and start-up


def test_help_names_every_command_and_exit_code() -> None:
    done = run("--help")
    assert done.returncode == 0
    assert all(f" {command} " in done.stdout for command in COMMANDS)
    documented = re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "exit-codes.md").read_text(), re.MULTILINE)
    named = " ".join(done.stdout.split("Exit codes:")[1].split())
    assert all(re.search(rf"\b{code} ", named) for code in documented if code != "1")
    assert run().stdout == done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str) -> None:
    done = run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"busigen {command}" in done.stdout
    assert f"Example: busigen {command}" in done.stdout.replace("Examples:", "Example:")


def test_version() -> None:
    assert run("--version").stdout == f"busigen {busigen.__version__}\n"


def import_times(*command: str) -> dict[str, int]:
    """Cumulative microseconds by module."""
    done = subprocess.run([sys.executable, "-X", "importtime", *command], cwd=ROOT, capture_output=True, text=True)
    found = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)$", done.stderr, re.MULTILINE)
    return {name: int(microseconds) for microseconds, name in found}


def test_importing_busigen_loads_nothing_but_itself() -> None:
    bare = import_times("-c", "pass").keys() | {"busigen", "__future__"}
    loaded = import_times("-c", "import busigen").keys()
    assert loaded - bare == set() and "busigen" in loaded


def test_help_loads_nothing_heavy_and_costs_little() -> None:
    loaded = import_times("-m", "busigen.cli", "--help")
    assert "typer" in loaded
    assert not {"numpy", "scipy", "polars", "onnxruntime", "torch", "PIL"} & loaded.keys()
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run("--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    # Time of the processor, which other work on the machine does not lengthen much: 0.5 s on a recent one. A heavy
    # import, which is what this guards against together with the list above, takes longer.
    assert min(seconds) < 1.0


def test_every_option_of_generate_is_one_of_the_model_and_has_its_default() -> None:
    command = {name: parameter.default for name, parameter in inspect.signature(generate).parameters.items()}
    assert (command.pop("out"), command.pop("log_json")) == (inspect.Parameter.empty, None)
    model = {field.name: field.default for field in fields(GenerateOptions)}
    assert model.pop("out") is MISSING
    assert model.pop("vary") is None, "that of `grid`"
    assert command == model


# Bad input


def bad(*arguments: object) -> tuple[object, ...]:
    return ("generate", "--out", "{out}", *arguments)


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (bad("--count", 4, "--classes", "purple=1"), 2, ["'purple'", *LESION_CLASSES]),
        (bad("--count", 4, "--classes", "benign=0"), 2, ["'benign'", "'0'", "above 0"]),
        (bad("--count", 4, "--classes", "benign=0.7,malignant=0.7"), 2, ["shares sum to 1.4", "sum to 1"]),
        (bad("--count", 0), 2, ["--count is 0", "from 1 to"]),
        (bad("--count", -5), 2, ["--count is -5", "from 1 to"]),
        (bad("--count", "many"), 2, ["--count", "many", "a whole number, such as 100", "busigen generate --help"]),
        (bad("--count", 4, "--normals", "20%"), 2, ["--normals", "20%", "a number, such as 0.2"]),
        (bad("--count", 4, "--classes", "normal=0.2,benign=0.8"), 2, ["'normal'", "--normals 0.2"]),
        (bad("--count", 4, "--seed", -1), 2, ["--seed is -1", "from 0 to"]),
        (bad("--count", 4, "--shard-size", 0), 2, ["--shard-size is 0"]),
        (bad("--count", 4, "--batch-size", 0), 2, ["--batch-size is 0", "from 1 to"]),
        (bad("--count", 4, "--threads", 0), 2, ["--threads is 0", "1 or more"]),
        (bad("--count", 4, "--provider", "abacus"), 2, ["'abacus'", "cpu"]),
        (bad("--count", 4, "--size", "0.9"), 2, ["--size is '0.9'", "0.003 to 0.4"]),
        (bad("--count", 4, "--depth", "deep"), 2, ["--depth is 'deep'", "0.08 to 0.75"]),
        (
            bad("--count", 4, "--height-width", "1.2:0.8"),
            2,
            ["--height-width is '1.2:0.8'", "smaller number comes first: 0.8:1.2"],
        ),
        (bad("--count", 4, "--height-width", 1.2, "--taller-than-wide"), 2, ["--height-width 1.2", "one of them"]),
        (bad("--count", 4, "--birads", 6), 2, ["--birads is '6'", "2, 3, 4, 5"]),
        (bad("--count", 4, "--birads", "4a"), 2, ["--birads is '4a'", "without a, b or c"]),
        (bad("--count", 4, "--birads", "2=0.5"), 2, ["--birads is '2=0.5'", "where a colon stands", "2:0.1,3:0.4"]),
        (bad("--count", 4, "--birads", "3:0.5,6:0.5"), 2, ["'6' is no category", "2:0.1,3:0.4"]),
        (bad("--count", 4, "--normals", 1), 2, ["--normals is 1", "from 0 to below 1"]),
        (bad("--count", 4, "--lesions", 4), 2, ["--lesions is '4'", "1:0.9,2:0.1"]),
        (bad("--count", 4, "--lesions", 2, "--masks", "masks"), 2, ["--masks masks gives each", "Leave out --lesions"]),
        (bad("--count", 4, "--colour", "red"), 2, ["--colour", "busigen generate --help"]),
        (bad(), 2, ["--count", "busigen generate --help"]),
        # As an unset variable of the shell leaves them; a path would be the current folder.
        (bad("--count", 4, "--healthy", ""), 2, ["--healthy is empty", "leave it out"]),
        (bad("--count", 4, "--healthy="), 2, ["--healthy is empty"]),
        (("prepare", "", "--out", "{out}"), 2, ["an argument is empty"]),
        (("generate", "--count", 4, "--out", "/proc/set"), 4, ["/proc, which is on no disk", "another --out"]),
        (("generate", "--count", 4, "--out", "{out}/caf\udce9"), 2, ["--out is ", r"caf\udce9", "no UTF-8", "Rename"]),
        (("verify", "{tmp}/\udcff"), 2, [r"\udcff", "no UTF-8"]),
        (("produce",), 2, ["produce", "busigen --help"]),
        (bad("--count", 4, "--bundle", "{tmp}/missing"), 3, ["{tmp}/missing", "bundle.json", "leave out --bundle"]),
        (bad("--count", 4, "--healthy", "{tmp}/missing"), 3, ["{tmp}/missing", "'synthetic'"]),
        (("verify", "{tmp}"), 3, ["{tmp}", "--out"]),
        (("verify", "{tmp}", "--healthy", "{tmp}/missing"), 3, ["{tmp}/missing", "generate --healthy"]),
        (("export", "{tmp}", "--out", "{out}"), 3, ["{tmp}", "busigen train"]),
        (("export", "{tmp}", "--out", "{out}", "--lora-alpha", 4), 2, ["--lora-alpha", "--base-model"]),
        (("train", "--data", "{tmp}", "--out", "{out}", "--window", 512), 2, ["--window", "--preset sd15"]),
        (("train", "--data", "{tmp}", "--out", "{out}", "--no-context"), 2, ["--no-context", "--preset sd15"]),
        (("prepare", "{tmp}/missing", "--out", "{out}"), 3, ["{tmp}/missing"]),
        (("prepare", "{tmp}", "--out", "{out}"), 3, ["{tmp} has none of the layouts", "it is empty"]),
        (bad("--count", 4, "--healthy", "{tmp}"), 3, ["--healthy {tmp}", "it is empty"]),
        (bad("--count", 4, "--masks", "{tmp}"), 3, ["--masks {tmp}", "it is empty"]),
        (("prepare", "{tmp}", "--out", "{out}", "--mask-values", "1,white"), 2, ["--mask-values", "'1,white'"]),
    ],
)
def test_bad_options_end_in_one_line(
    tmp_path: Path, arguments: tuple[object, ...], code: int, named: list[str]
) -> None:
    out = tmp_path / "out"
    filled = [str(argument).format(out=out, tmp=tmp_path) for argument in arguments]
    if filled[0] in ("export", "train"):
        pytest.importorskip("torch")
    line = error_line(run(*filled), code)
    for text in named:
        assert text.format(tmp=tmp_path) in line
    assert not out.exists(), "a refused command leaves nothing behind"


IMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tiny.png": (lambda path: Image.new("L", (1, 1)).save(path), "1x1"),
    "wide.png": (lambda path: Image.new("L", (40_000, 300)).save(path), "40000x300"),
    "text.png": (lambda path: path.write_text("no image"), "not a PNG"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_a_healthy_folder_of_unusable_files(tmp_path: Path, name: str) -> None:
    make, reason = IMAGES[name]
    (tmp_path / "healthy").mkdir()
    make(tmp_path / "healthy" / name)
    done = run("generate", "--count", 1, "--out", tmp_path / "out", "--healthy", tmp_path / "healthy")
    line = error_line(done, 3)
    assert all(text in line for text in (str(tmp_path / "healthy"), "no healthy image", name, reason, "'synthetic'"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "made"),
    [(("generate", "--count", 1, "--batch-size", 2, "--out", "{out}"), True), (("--help",), False)],
)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_what_cannot_be_printed_is_told_in_one_line_and_the_work_is_kept(
    tmp_path: Path, arguments: tuple[object, ...], made: bool
) -> None:
    filled = [str(argument).format(out=tmp_path / "out") for argument in arguments]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([*CLI, *filled], cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: standard output cannot be written to: No space left on device. All that was made")
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    assert (tmp_path / "out" / "dataset.json").exists() == made


def test_a_reader_that_goes_away_is_told_in_one_line() -> None:
    """As `busigen --help | true` does."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        done = subprocess.run([*CLI, "--help"], cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("error: standard output cannot be written to: Broken pipe.")
    assert len(done.stderr.splitlines()) == 1


def test_debug_shows_where_it_happened(tmp_path: Path) -> None:
    command = ["generate", "--count", "0", "--out", tmp_path / "out"]
    for arguments in (["--debug", *command], [*command, "--debug"]):
        done = run(*arguments)
        assert done.returncode == 2
        assert "Traceback (most recent call last)" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: --count is 0.")


def test_a_tampered_bundle_is_refused_by_file(tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(default_bundle(), tmp_path / "bundle"))
    path = bundle / "decoder.weights"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    line = error_line(run("generate", "--count", 1, "--out", tmp_path / "out", "--bundle", bundle), 5)
    assert str(path) in line
    assert "busigen export" in line
    path.unlink()
    assert str(path) in error_line(run("generate", "--count", 1, "--out", tmp_path / "out", "--bundle", bundle), 5)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("installed", [False, True])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(tmp_path: Path, installed: bool) -> None:
    home = ROOT
    if installed:  # No pyproject.toml lies beside the package then.
        home = tmp_path
        shutil.copytree(ROOT / "busigen", home / "busigen", ignore=shutil.ignore_patterns("bundles", "__pycache__"))
    code = (
        "import sys\nfor name in ('diffusers', 'peft', 'safetensors', 'torch', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from busigen.cli import main\n"
        "sys.argv = ['busigen', 'train', '--data', 'a', '--out', 'b']\nmain()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(home)}
    done = subprocess.run([sys.executable, "-c", code], cwd=home, env=environment, capture_output=True, text=True)
    line = error_line(done, 7)
    assert ("`pip install 'busigen[train]'`" if installed else f"`pip install -e '.[train]'` in {ROOT}") in line


# Output
