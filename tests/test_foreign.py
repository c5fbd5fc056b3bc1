"""Files from elsewhere: nothing is waited for, followed or read without an end."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.lib import format as npy

import busigen
from busigen.data import prepared as schema
from busigen.data.prepared import Prepared
from busigen.errors import BusigenError, InputError, IntegrityError
from busigen.evaluation.reading.sets import read_set
from busigen.foreign import ForeignFileError, open_file, read_file
from busigen.runtime.backends.tensorrt.engine_builder import CONTENT, RECORD, Cache
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import explain
from tests.harness.command import error_line, run
from tests.harness.noise_source import NoiseSource


def test_a_file_within_its_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_file(path, 5) == b"12345"
    with pytest.raises(ForeignFileError, match="has 5 bytes; at most 4 are read"):
        read_file(path, 4)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ForeignFileError, match="is a pipe, not a file"):
        open_file(tmp_path / "pipe")


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs devices")
def test_a_link_to_a_device_without_an_end_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(ForeignFileError, match="is a device, not a file"):
        read_file(tmp_path / "endless", 100)


def test_a_folder_and_a_missing_file_say_so(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder"):
        open_file(tmp_path)
    with pytest.raises(FileNotFoundError):
        open_file(tmp_path / "none")


def test_links_are_followed_where_no_root_is_given_and_never_beneath_one(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    root = tmp_path / "root"
    root.mkdir()
    (root / "file").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (tmp_path / "way").symlink_to(root)
    assert read_file(root / "file", 10) == b"secret"
    for path in (root / "file", root / "folder" / "secret", root / ".." / "outside" / "secret", outside / "secret"):
        with pytest.raises(ForeignFileError):
            read_file(path, 10, root=root)
    # A link above the root is the user's own way to it.
    (root / "plain").write_bytes(b"plain")
    assert read_file(tmp_path / "way" / "plain", 10, root=tmp_path / "way") == b"plain"


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(1 << 40)  # A hole, which takes no room.


POSIX = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes and devices")
ODD = pytest.mark.parametrize("become", [_pipe, _device, _huge])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "set"
    generate(NoiseSource(), out, count=4, seed=7, shard_size=2)
    return out


def _replaced(path: Path, become: Callable[[Path], None]) -> None:
    path.unlink()
    become(path)


@POSIX
@ODD
@pytest.mark.parametrize("file", ["shards/000000.tar", "shards/000000.parquet", "manifest.parquet"])
def test_explain_ends_by_itself(made: Path, tmp_path: Path, file: str, become: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "set"))
    _replaced(folder / file, become)
    try:
        found = explain(folder, "0", replay=False).error
    except BusigenError as error:  # Where links are not followed.
        found = error
    assert found is not None and found.exit_code in (3, 5)


@POSIX
def test_a_command_that_meets_a_pipe_ends(made: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "set"))
    _replaced(folder / "shards" / "000000.tar", _pipe)
    done = run("explain", folder, "0", "--no-replay")
    assert done.returncode == 5, done.stderr
    assert "shards/000000.tar" in done.stdout and "is a pipe, not a file" in done.stdout


@POSIX
@ODD
def test_the_audit_names_a_shard_that_is_none(made: Path, tmp_path: Path, become: Callable[[Path], None]) -> None:
    folder = Path(shutil.copytree(made, tmp_path / "set"))
    _replaced(folder / "shards" / "000000.tar", become)
    if become is _device:
        with pytest.raises(InputError, match=r"000000\.tar is a link"):
            read_set(folder)
        return
    found = read_set(folder)
    assert len(found) == 2
    # Holes are zeros, and zeros are the end of a tar file.
    assert any(refused.file == "000000.tar" for refused in found.refused) or become is _huge
    assert any("2 of 4 samples" in refused.problem for refused in found.refused)


@POSIX
@ODD
@pytest.mark.parametrize("file", [schema.TABLE, *schema.ARRAYS.values()])
def test_prepared_folders_are_refused(
    synthetic_prepared: Prepared, tmp_path: Path, file: str, become: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(synthetic_prepared.folder, tmp_path / "prepared"))
    _replaced(folder / file, become)
    with pytest.raises(IntegrityError, match=file):
        Prepared.open(folder)


@POSIX
@ODD
@pytest.mark.parametrize("file", [CONTENT, RECORD])
def test_a_cached_engine_that_is_none_is_made_again(tmp_path: Path, file: str, become: Callable[[Path], None]) -> None:
    cache = Cache(tmp_path)
    cache.write("engines", {"graph": "a"}, b"engine")
    _replaced(cache.entry("engines", {"graph": "a"}) / file, become)
    assert cache.read("engines", {"graph": "a"}) is None


@POSIX
@ODD
def test_weights_and_healed_images_that_are_none_are_refused(tmp_path: Path, become: Callable[[Path], None]) -> None:
    pytest.importorskip("torch")
    from busigen.training.checkpoint import load_component, weight_hashes
    from busigen.training.rollouts import healed_reader
    from busigen.training.trainer import load_state

    folder = tmp_path / "base" / "mask"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    become(folder / "model.safetensors")
    readers = (
        lambda: load_state(folder / "model.safetensors"),
        lambda: healed_reader(folder / "model.safetensors"),
        lambda: weight_hashes(tmp_path),
        lambda: load_component("mask", folder),
    )
    for read in readers:
        with pytest.raises(BusigenError, match=r"model\.safetensors"):
            read()


def test_healed_images_that_claim_more_than_they_hold_are_refused(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from busigen.training.rollouts import healed_reader, save_healed

    images = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 2, 2)
    save_healed(tmp_path / "healed.npz", [7, 9], images)
    assert (healed_reader(tmp_path / "healed.npz")(9, 4) == images[1, 1]).all()
    np.savez_compressed(tmp_path / "packed.npz", rows=np.arange(2), images=images)
    np.savez(tmp_path / "others.npz", rows=np.arange(3), images=images)
    with zipfile.ZipFile(tmp_path / "claims.npz", "w") as archive:
        for name, shape in (("rows", (1 << 40,)), ("images", (1 << 40, 1, 256, 256))):
            with archive.open(f"{name}.npy", "w") as member:
                descr = "<i8" if name == "rows" else "|u1"
                npy.write_array_header_1_0(member, {"descr": descr, "fortran_order": False, "shape": shape})
    for name in ("packed", "others", "claims"):
        with pytest.raises(IntegrityError, match=rf"{name}\.npz is damaged"):
            healed_reader(tmp_path / f"{name}.npz")


@POSIX
def test_a_log_into_a_pipe_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    done = run("generate", "--count", 1, "--out", tmp_path / "out", "--log-json", tmp_path / "log")
    assert "is a pipe that nobody reads from. Start its reader first." in error_line(done, 4)


@POSIX
def test_a_log_into_a_pipe_is_read_while_the_run_goes_on(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        command = [sys.executable, "-m", "tests.harness.noise_source", tmp_path / "set", "4", "2", "7", "0"]
        root = Path(__file__).parents[1]
        subprocess.run([*map(str, command), str(tmp_path / "log")], cwd=root, check=True, capture_output=True)
        events = [json.loads(line)["event"] for line in os.read(reader, 1 << 20).splitlines()]
    finally:
        os.close(reader)
    assert events[-1] == "finished"


@POSIX
def test_a_log_into_a_pipe_that_nobody_empties_holds_nothing_up(tmp_path: Path) -> None:
    from busigen.runtime.execution.events import EventLog

    os.mkfifo(tmp_path / "log")
    reader = os.open(tmp_path / "log", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with EventLog.open(str(tmp_path / "log"), out=tmp_path / "out") as log:
            for _ in range(100):
                log.event("progress", text="x" * 4096)
    finally:
        os.close(reader)


def _table_of(rows: int) -> pl.DataFrame:
    hashes = [hashlib.sha256(str(row).encode()).hexdigest() for row in range(min(rows, 12_000))]
    return pl.DataFrame({"image_sha256": (hashes * (rows // len(hashes) + 1))[:rows]})


def test_a_table_is_bounded_by_what_its_rows_have_on_disk(tmp_path: Path) -> None:
    from busigen.foreign import refuse_costly

    path = tmp_path / "table.parquet"
    _table_of(12_000).write_parquet(path)
    refuse_costly(path, 12_000)
    # Nothing but runs of one value: some kilobytes, and 6.8 GB once they are read.
    pl.select(pl.repeat(None, 30_000_000, dtype=pl.String).alias("key")).write_parquet(path)
    assert path.stat().st_size < 1 << 20
    with pytest.raises(ValueError, match="cannot hold a table of 30,000,000 rows"):
        refuse_costly(path, 30_000_000)
    pl.DataFrame({f"c{k}": [1] for k in range(200)}).write_parquet(path)
    with pytest.raises(ValueError, match="200 columns"):
        refuse_costly(path, 1)
    pl.DataFrame({"list": [[1, 2]] * 3}).write_parquet(path)
    refuse_costly(path, 3, lists=True)
    with pytest.raises(ValueError, match="lists or structures"):
        refuse_costly(path, 3)
    pl.DataFrame({"list": [[0] * 1_000_000]}).write_parquet(path)
    with pytest.raises(ValueError, match="holds what no table has"):
        refuse_costly(path, 1, lists=True)


_OPEN = {"FileIO", "from_pretrained", "load_file", "open", "read_bytes", "read_csv", "read_parquet", "read_text"}
_OPEN |= {"safe_open", "scan_parquet"}
_LOAD = {"jit", "np", "onnx", "torch"}
"""Modules whose ``load`` opens a file."""

_OWN, _SYSTEM, _CHECKED = "made by this process", "the system's", "checked by open_file or by its hash before"
DIRECT = {
    "cli/__init__.py": ("open", "a device to write to"),
    "cli/view.py": ("open", "a page in a browser"),
    "data/prepared.py": ("read_parquet", _CHECKED),
    "data/sources/records.py": ("read_csv", _CHECKED),
    "evaluation/fidelity/inception.py": ("load", _CHECKED),
    "evaluation/physics/features.py": ("read_parquet", _CHECKED),
    "export/request.py": ("safe_open", _CHECKED),
    "export/import_bundle.py": ("load", _CHECKED),
    "export/precision_search.py": ("load", _OWN),
    "export/report.py": ("load", _OWN),
    "export/weights.py": ("safe_open", _CHECKED),
    "files.py": ("open", "to have a written file on the disk"),
    "foreign.py": ("open", "the opener"),
    "runtime/backends/memory.py": ("read_text", _SYSTEM),
    "runtime/backends/probe.py": ("read_text", _SYSTEM),
    "runtime/dataset/finalize.py": ("read_parquet", _OWN),
    "runtime/dataset/shards.py": ("read_parquet scan_parquet", _CHECKED),
    "runtime/diagnostics/bench.py": ("open", "to write"),
    "runtime/diagnostics/doctor.py": ("read_text", _SYSTEM),
    "runtime/execution/events.py": ("open", "to write"),
    "runtime/execution/workers.py": ("read_bytes", _OWN),
    "runtime/maintenance/repair.py": ("open", _OWN),
    "runtime/output/remote.py": ("read_parquet", "from memory"),
    "runtime/viewing/beside.py": ("open", "a dataset and its bundle, by their own readers"),
    "runtime/viewing/page.py": ("read_text", "the package's own"),
    "runtime/storage/lock.py": ("open", "a lock that is opened to write to"),
    "runtime/storage/object_store.py": ("open", _OWN),
    "training/checkpoint.py": ("from_pretrained", _CHECKED),
    "training/stable_diffusion/base_model.py": ("from_pretrained safe_open", _CHECKED),
    "training/stable_diffusion/lora.py": ("safe_open", _CHECKED),
    "training/stable_diffusion/painter.py": ("from_pretrained load_file", _CHECKED),
    "training/trainer.py": ("load_file safe_open", _CHECKED),
}
"""What opens files itself, with the reason why it may."""


def _opened(tree: ast.AST) -> Iterator[str]:
    """Names of the calls that open a file by its name to read it."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        call = node.func
        name = call.attr if isinstance(call, ast.Attribute) else call.id if isinstance(call, ast.Name) else ""
        owner = ast.unparse(call.value).rpartition(".")[2] if isinstance(call, ast.Attribute) else ""
        given = [part.value for part in (*node.args, *(key.value for key in node.keywords if key.arg == "mode"))
                 if isinstance(part, ast.Constant)]  # fmt: skip
        writes = any(isinstance(mode, str) and set(mode) <= set("wxab") and mode[:1] in "wxa" for mode in given)
        # A class opens with ``open`` what it stands for, and says itself how; a member lies in an open archive.
        of_class = name == "open" and (owner[:1].isupper() or owner in ("stored", "inputs") or "(" in owner)
        if not writes and not of_class and (name in _OPEN or (name == "load" and owner in _LOAD)):
            yield name


def test_nothing_else_opens_what_others_may_have_made() -> None:
    package = Path(busigen.__file__).parent
    found = {
        path.relative_to(package).as_posix(): sorted(set(_opened(ast.parse(path.read_text(encoding="utf-8")))))
        for path in package.rglob("*.py")
    }
    allowed = {path: names.split() for path, (names, _) in DIRECT.items()}
    assert {path: names for path, names in found.items() if names} == allowed, "use busigen.foreign, or say why not"
