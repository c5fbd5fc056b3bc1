"""The engine cache: what it returns after damage, kills and other processes' work."""

from __future__ import annotations

import json
import logging
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest

from busigen.errors import OutputError
from busigen.runtime.backends.tensorrt.engine_builder import CONTENT, RECORD, Cache, default_folder
from busigen.runtime.backends.tensorrt.library import TIMINGS, Device
from tests.harness.command import ROOT
from tests.harness.engine_library import rtx

KEY = {"target": "tensorrt-rtx", "version": "1.7", "profiles": [[16, 16, 16]]}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


def test_what_was_kept_is_read_by_its_key_alone(cache: Cache) -> None:
    cache.write("engines", KEY, b"engine")
    assert cache.read("engines", KEY) == b"engine"
    # Another reader, and a key whose parts come in another order.
    assert Cache(cache.folder).read("engines", dict(reversed(KEY.items()))) == b"engine"
    for other in ({**KEY, "version": "1.8"}, {**KEY, "profiles": [[16, 16, 16], [4, 4, 4]]}):
        assert cache.read("engines", other) is None
    assert cache.read("kernels", KEY) is None


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda entry: (entry / CONTENT).write_bytes(b"enginE"), "sha256"),
        (lambda entry: (entry / CONTENT).write_bytes(b""), "sha256"),
        (lambda entry: (entry / RECORD).write_text("{"), "cannot be used"),
        (lambda entry: (entry / RECORD).write_text("[]"), "no record"),
        (lambda entry: (entry / RECORD).write_bytes(b"\xff" * (2 << 20)), "no JSON"),
        (lambda entry: (entry / CONTENT).unlink(), ""),
        (lambda entry: (entry / RECORD).unlink(), ""),
    ],
)
def test_a_damaged_entry_is_no_entry(cache: Cache, caplog: pytest.LogCaptureFixture, damage, said: str) -> None:
    cache.write("engines", KEY, b"engine")
    damage(cache.entry("engines", KEY))
    with caplog.at_level(logging.WARNING):
        assert cache.read("engines", KEY) is None
    assert said in caplog.text
    cache.write("engines", KEY, b"engine")
    assert cache.read("engines", KEY) == b"engine"


def test_an_entry_under_another_ones_name_is_refused(cache: Cache, caplog: pytest.LogCaptureFixture) -> None:
    other = {**KEY, "version": "1.6"}
    cache.write("engines", other, b"old engine")
    cache.entry("engines", other).rename(cache.entry("engines", KEY))
    with caplog.at_level(logging.WARNING):
        assert cache.read("engines", KEY) is None
    assert "something else" in caplog.text


def test_measured_times_are_those_of_this_card_driver_and_version(cache: Cache) -> None:
    """Another's would have TensorRT choose wrong kernels: what is not this card's, or damaged, is as if not there."""
    library, card = rtx(), Device(0, "NVIDIA L4", "8.9", 13000)
    key = {**library.key, **card.key}
    cache.write(TIMINGS, key, b"measured")
    assert Cache(cache.folder).read(TIMINGS, key) == b"measured"
    for other in (replace(card, name="NVIDIA L40S"), replace(card, driver=13010)):
        assert cache.read(TIMINGS, {**library.key, **other.key}) is None
    assert cache.read(TIMINGS, {**replace(library, version="1.0").key, **card.key}) is None
    (content,) = cache.folder.rglob(CONTENT)
    content.write_bytes(b"measureD")
    assert cache.read(TIMINGS, key) is None


def test_a_cache_that_was_copied_is_read_where_it_lies(cache: Cache, tmp_path: Path) -> None:
    cache.write("engines", KEY, b"engine")
    cache.folder.rename(tmp_path / "copied")
    assert Cache(tmp_path / "copied").read("engines", KEY) == b"engine"


def test_the_folder_is_the_variables_or_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BUSIGEN_CACHE", str(tmp_path / "named"))
    assert default_folder() == tmp_path / "named"
    monkeypatch.delenv("BUSIGEN_CACHE")
    assert default_folder().name in ("busigen", "cache")
    assert default_folder() != Path("busigen")


def test_a_folder_that_cannot_be_written_to_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file")
    with pytest.raises(OutputError, match="file"):
        cache.write("engines", KEY, b"engine")
    with pytest.raises(OutputError, match="file"), cache.making("engines", KEY):
        pass


def test_another_programs_file_in_place_of_the_lock_is_not_waited_for(cache: Cache) -> None:
    entry = cache.entry("engines", KEY)
    entry.mkdir(parents=True)
    (entry / ".lock").write_text("somebody's notes")
    with pytest.raises(OutputError, match="another program's file"), cache.making("engines", KEY):
        pass


def test_two_processes_do_not_make_the_same_entry(cache: Cache, tmp_path: Path) -> None:
    """Four processes want one engine: one makes it, three find it made."""
    program = textwrap.dedent(
        f"""
        import sys, time
        from pathlib import Path
        from busigen.runtime.backends.tensorrt.engine_builder import Cache
        cache, key = Cache(Path({str(cache.folder)!r})), {KEY!r}
        with cache.making("engines", key):
            if cache.read("engines", key) is None:
                time.sleep(0.5)
                cache.write("engines", key, b"engine")
                print("made")
        """
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(4)
    ]
    assert sum("made" in process.communicate(timeout=60)[0] for process in processes) == 1
    assert all(process.returncode == 0 for process in processes)
    assert cache.read("engines", KEY) == b"engine"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_a_kill_while_an_entry_is_written_leaves_none_and_blocks_nobody(cache: Cache) -> None:
    program = textwrap.dedent(
        f"""
        import os, time
        from pathlib import Path
        from busigen.runtime.backends.tensorrt.engine_builder import Cache
        cache, key = Cache(Path({str(cache.folder)!r})), {KEY!r}
        real = os.replace
        def slow(source, target):
            # Bytes are written and flushed, the name is not there yet.
            print("here", flush=True)
            time.sleep(60)
            real(source, target)
        os.replace = slow
        with cache.making("engines", key):
            cache.write("engines", key, b"engine" * 1000)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "here"
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    assert cache.read("engines", KEY) is None
    # A lock that outlived its holder would be waited for without end.
    with cache.making("engines", KEY):
        assert cache.read("engines", KEY) is None
        cache.write("engines", KEY, b"whole")
    assert cache.read("engines", KEY) == b"whole"
    names = {path.name for path in cache.entry("engines", KEY).iterdir()}
    assert names == {CONTENT, RECORD}
    assert json.loads((cache.entry("engines", KEY) / RECORD).read_text())["bytes"] == 5
