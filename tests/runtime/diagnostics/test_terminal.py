"""Text that others chose, in a terminal: it is shown, and neither obeyed by the terminal nor read as markup."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from busigen.runtime.backends.bundle import default_bundle
from busigen.runtime.progress import Bar, Progress
from busigen.runtime.storage.url import place_of
from busigen.terminal import LineFormatter, Terminal
from busigen.text import printable, without_credentials
from tests.harness.command import run
from tests.harness.hostile_datasets import edit
from tests.runtime.backends.test_bundle import seal

EVIL = "a\x1b]0;owned\x07\x9b31m\u202e[bold][0m]:smile:"
"""Sets a terminal's title, its colour in C1's way, turns the reading direction; markup and emoji of rich."""


def is_safe(text: str) -> bool:
    return all(line.isprintable() for line in text.split("\n"))


def test_a_path_is_printed_as_it_is_named(dataset: Path, tmp_path: Path) -> None:
    evil = dataset.rename(tmp_path / EVIL)
    done = run("verify", evil)
    assert is_safe(done.stdout + done.stderr)
    assert f"{printable(str(evil))} " in done.stdout


@pytest.mark.parametrize("options", [(), ("--debug",)])
def test_an_error_and_its_traceback_are_safe(tmp_path: Path, options: tuple[str, ...]) -> None:
    done = run("verify", tmp_path / EVIL, *options)
    assert done.returncode == 3
    assert is_safe(done.stdout + done.stderr)
    assert printable(EVIL) in done.stderr
    assert ("Traceback" in done.stderr) == bool(options)


def test_a_record_is_told_and_its_json_means_the_same(dataset: Path) -> None:
    edit(dataset / "run.json", lambda run: run["versions"].update(busigen=EVIL))
    done = run("explain", dataset, 4, "--no-replay")
    assert is_safe(done.stdout + done.stderr)
    assert f"busigen {printable(EVIL)}" in done.stdout
    done = run("explain", dataset, 4, "--no-replay", "--json")
    assert is_safe(done.stdout + done.stderr) and done.stdout.isascii()
    assert json.loads(done.stdout)["made_with"]["busigen"] == EVIL


def test_names_in_a_graph_do_not_reach_the_terminal_past_us(tmp_path: Path) -> None:
    """ONNX Runtime's own log quotes the node that fails."""
    onnx = pytest.importorskip("onnx")
    bundle = Path(shutil.copytree(default_bundle(), tmp_path / "bundle"))
    model = onnx.load(str(bundle / "context.onnx"), load_external_data=False)
    output = model.graph.output[0].name
    for node in model.graph.node:
        node.output[:] = ["inner" if name == output else name for name in node.output]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7]), "seven"))
    model.graph.node.append(onnx.helper.make_node("Reshape", ["inner", "seven"], [output], name=EVIL))
    (bundle / "context.onnx").write_bytes(model.SerializeToString())
    seal(bundle, "context.onnx")
    done = run("generate", "--count", 2, "--bundle", bundle, "--out", tmp_path / "set", "--provider", "cpu")
    assert done.returncode == 5, done.stderr
    assert is_safe(done.stdout + done.stderr)
    assert "\\x1b]0;owned" in done.stderr


def test_letters_that_a_terminal_lacks_are_no_error(dataset: Path, tmp_path: Path) -> None:
    done = run("verify", dataset.rename(tmp_path / "brüste"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 0, done.stderr
    assert "br\\xfcste is sound" in done.stdout


def test_log_lines_and_bars() -> None:
    try:
        raise ValueError(EVIL)
    except ValueError:
        record = logging.LogRecord("x", logging.INFO, "", 0, "%s\nfake line", (EVIL,), sys.exc_info())
    first, *rest = LineFormatter("%(message)s").format(record).split("\n")
    assert first == f"{printable(EVIL)}\\nfake line"
    assert is_safe("\n".join(rest)) and "Traceback" in rest[0]
    file = io.StringIO()
    with Progress(Bar(Terminal(file=file, force_terminal=True, width=200))) as progress:
        progress.start(f"{EVIL}[/x]", 3)
        progress.note(EVIL)
    assert file.getvalue().count(printable(EVIL)) >= 2
    assert "\x1b]0;" not in file.getvalue() and "\u202e" not in file.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a@b/c is there", "s3://bucket/a@b/c is there"),
        ("http://127.0.0.1:9000/x", "http://127.0.0.1:9000/x"),
        ("C:/Users/a@b, b://c", "C:/Users/a@b, b://c"),
        ("sftp://me:pass@host/x", "sftp://***@host/x"),
        ("sftp://me:p@ss@host/x", "sftp://***@host/x"),
        ("s3://AKIA:key/with+slash@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:key?with#all@bucket/x", "s3://***@bucket/x"),
        ("s3:/AKIA:key@bucket/x", "s3:/***@bucket/x"),
        ("simplecache::s3://AKIA:key@bucket", "simplecache::s3://***@bucket"),
        ("see (https://h/x?X-Amz-Signature=a%2F&b=c).", "see (https://h/x?***)."),
        ("gs://b/x#token", "gs://b/x#***"),
        ('endpoint "http://u:p@h:9/b?list-type=2&c"', 'endpoint "http://***@h:9/b?***"'),
    ],
)
def test_urls_are_shown_without_credentials(text: str, shown: str) -> None:
    assert without_credentials(text) == shown


@pytest.mark.parametrize(
    "command",
    [
        "generate --count 1 --log-json log --out sftp://me:{secret}@nowhere/set",
        "generate --count one --out s3://AKIA:{secret}@bucket/set?X-Amz-Signature={signature}",
        "generate --count 1 --out https://me:{secret}@host/set?sig={signature}",
        "generate --count 1 --out set --ray-address ray://me:{secret}@host:1?sig={signature}",
        "generate --count 1 --out set --log-json log --healthy s3://AKIA:{secret}@bucket",
        "verify --debug simplecache::s3://AKIA:{secret}@bucket#{signature}",
        "verify --repair s3://AKIA:{secret}@bucket/set?sig={signature}",
        "merge all one s3://AKIA:{secret}@bucket/set?sig={signature}",
        "prepare s3://AKIA:{secret}@bucket/set?sig={signature} --out prepared",
    ],
)
def test_no_command_tells_a_password_or_a_signature(tmp_path: Path, command: str) -> None:
    described = command.format(secret="S3cr3t/key", signature="S1gn4ture").replace(" log", f" {tmp_path / 'log'}")
    done = run(*described.replace(" set ", f" {tmp_path / 'set'} ").split())
    assert done.returncode in (2, 3, 4, 7), done.stderr
    log = (tmp_path / "log").read_text() if "log-json" in command else ""
    assert ("failed" in log) == bool(log)
    assert "***" in done.stderr
    for secret in ("S3cr3t", "S1gn4ture"):
        assert secret not in done.stdout + done.stderr + log


def test_what_a_stores_library_says_is_told_without_the_urls_credentials() -> None:
    address = place_of("s3://AKIA12:S3cr3t%2Fkey@bucket/set?X-Amz-Signature=S1gn4ture")
    assert str(address) == repr(address) == "s3://***@bucket/set?***"
    said = address.redact(
        'Invalid bucket name "AKIA12:S3cr3t%2Fkey@bucket" (S3cr3t/key; S1gn4ture), X-Amz-Signature=S1gn4ture'
    )
    assert said == 'Invalid bucket name "***@bucket" (***; S1gn4ture), ***'
