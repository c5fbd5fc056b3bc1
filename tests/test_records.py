"""Reading JSON from elsewhere: within bounds, and held to a model, whose refusal names file, key and value."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from busigen.errors import InputError, IntegrityError
from busigen.records import (
    MAX_KEYS,
    MAX_NODES,
    Number,
    Record,
    Text,
    Whole,
    checked,
    parse_json,
    read_checked,
    read_given,
    read_json,
)
from tests.harness.processes import ROOT


class Shop(Record):
    name: Text
    width: Whole
    load: Number = 0.0
    books: dict[Text, Whole] = {}  # noqa: RUF012


GOOD: dict[str, Any] = {"name": "top", "width": 3, "load": 1, "books": {"a": 1}, "of_another_version": [None]}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"width": "3"}, "has no valid 'width': '3' should be a valid integer"),
        ({"width": True}, "has no valid 'width': True should be"),
        ({"width": 3.0}, "has no valid 'width': 3.0 should be"),
        ({"width": -1}, "has no valid 'width': -1 should be greater"),
        ({"width": 10**4000}, "has no valid 'width': 10000"),
        ({"load": float("nan")}, "has no valid 'load': nan should be a finite number"),
        ({"load": "1"}, "has no valid 'load': '1' should be"),
        ({"name": None}, "has no valid 'name': None should be"),
        ({"name": "x" * 5000}, "has no valid 'name': 'xxx"),
        ({"books": {"a\n\x1b[2J": "b"}}, r"has no valid 'books.a\n\x1b[2J': 'b' should be"),
        ({"books": [1]}, "has no valid 'books': [1] should be"),
    ],
)
def test_what_is_wrong_is_named_in_a_short_line(change: dict[str, Any], said: str) -> None:
    checked(Shop, GOOD, "shelf.json", fix="")
    with pytest.raises(IntegrityError) as caught:
        checked(Shop, GOOD | change, "shelf.json", fix="Get another.")
    assert said in caught.value.problem
    assert str(caught.value).startswith("shelf.json ") and str(caught.value).endswith("Get another.")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 400


def test_what_is_missing_or_no_object_is_named() -> None:
    with pytest.raises(IntegrityError, match=r"shelf\.json lacks 'width'"):
        checked(Shop, {"name": "top"}, "shelf.json", fix="")
    with pytest.raises(IntegrityError, match=r"shelf\.json is no record: \[\] should be"):
        checked(Shop, [], "shelf.json", fix="")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "no JSON"),
        (b'{"a": NaN}', "no JSON: NaN is no number"),
        (b'{"a": 1e999}', "no JSON: 1e999 is no number"),
        (b'{"a": "\\ud800"}', "no JSON"),
        (b'{"a": "\xff"}', "no JSON"),
        (b"9" * 5000, "no JSON"),
        (b"[" * 300 + b"]" * 300, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b"{" + b",".join(b'"%d":1' % key for key in range(MAX_KEYS + 1)) + b"}", f"more than {MAX_KEYS} keys"),
        (b"[" + b"[]," * MAX_NODES + b"[]]", f"more than {MAX_NODES} values"),
    ],
)
def test_what_no_busigen_wrote_is_no_json(content: bytes, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        parse_json(content, "it")


def test_a_diverged_trainings_numbers_are_read_where_they_may_stand() -> None:
    assert parse_json(b"[NaN, 1e999]", "it", nan=True)[1] == float("inf")


def test_only_regular_files_of_the_folder_are_read(tmp_path: Path) -> None:
    (tmp_path / "real.json").write_text('{"name": "top", "width": 1, "schema": 3}')
    (tmp_path / "link.json").symlink_to("real.json")
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    assert read_json(tmp_path / "link.json")["width"] == 1
    for name, said in (("link.json", "is a link"), ("pipe.json", "is a pipe")):
        with pytest.raises(ValueError, match=said):
            read_json(tmp_path / name, root=tmp_path)
        with pytest.raises(IntegrityError, match=said):
            read_checked(Shop, tmp_path / name, fix="", root=tmp_path)
        with pytest.raises(InputError, match=said):
            read_given(tmp_path / name, "shelf", schemas=(3,), fix="")
    with pytest.raises(InputError, match=r"has schema 3; this busigen reads 1 or 2"):
        read_given(tmp_path / "real.json", "shelf", schemas=(1, 2), fix="")
    with pytest.raises(InputError, match=r"is no shelf: it has no none\.json"):
        read_given(tmp_path / "none.json", "shelf", schemas=(1,), fix="")


def test_help_and_the_package_do_without_records() -> None:
    """Models take a tenth of a second to import, which a person who asks for help would wait for."""
    code = (
        "import sys, busigen\nfrom busigen.cli import main\nsys.argv = ['busigen', 'generate', '--help']\n"
        "try:\n    main()\nfinally:\n    print('busigen.records' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
