"""The page in one file: it holds the dataset's own bytes, names nothing outside itself, replaces no file."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from busigen.errors import UsageError
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.execution.factory import generate
from busigen.runtime.viewing.page import MOST_PAIRS, write_page
from busigen.runtime.viewing.pairs import Pairs
from tests.harness.command import error_line, run
from tests.harness.hashing import hashes
from tests.harness.noise_source import NoiseSource, noise_sample
from tests.runtime.viewing.conftest import HOSTILE
from tests.runtime.viewing.test_server import tars


class Flat(NoiseSource):
    """Samples that cost nothing to draw or to store."""

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        flat = replace(noise_sample(0, 0), image=np.zeros((256, 256), np.uint8), mask=np.zeros((256, 256), bool))
        return SampleBatch([replace(flat, index=index) for index in indices], [])


class Elements(HTMLParser):
    """A page's elements with their attributes, and what its scripts and styles hold."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.content: list[tuple[str, str]] = []  # Tag and text
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements and self.elements[-1][0] in ("script", "style") and data.strip():
            self.content.append((self.elements[-1][1].get("id") or self.elements[-1][0], data))


@pytest.fixture(scope="module")
def page(plain: Path, healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    before = hashes(plain)
    done = run("view", plain, "--html", path, "--healthy", healthy)
    assert done.returncode == 0, done.stderr
    assert "14 pairs of " in done.stdout
    assert hashes(plain) == before
    return path


def test_it_holds_the_bytes_of_the_shards_and_the_rows(page: Path, plain: Path) -> None:
    blocks = {
        name: json.loads(text) for name, text in Elements(page.read_text()).content if name not in ("script", "style")
    }
    embedded = blocks["embedded"]
    table, stored = pl.read_parquet(plain / "manifest.parquet"), tars(plain)
    assert [column["name"] for column in embedded["about"]["columns"]] == table.columns
    for number, (pair, row) in enumerate(zip(embedded["pairs"], table.iter_rows(), strict=True)):
        assert (pair["name"], pair["row"], pair["problems"]) == (row[0], list(row), [])
        for kind in ("image", "mask"):
            content = base64.b64decode(blocks[f"pixels-{number}"][kind])
            assert content == stored[f"{pair['name']}.{kind}.png"]
        assert (pair["healthy"] is None) == (row[table.columns.index("healthy_sha256")] is None)
    # Each healthy image once, whatever pairs were painted into it.
    assert sum(name.startswith("healthy-") for name in blocks) == 3


def test_its_texts_are_no_markup_and_nothing_but_its_own_script_may_run(page: Path) -> None:
    text = page.read_text()
    found = Elements(text)
    assert HOSTILE not in text and '"evil"' not in text
    assert not [element for element in found.elements if element[1].get("class") == "evil"]
    (script,) = (content for name, content in found.content if name == "script")
    (style,) = (content for name, content in found.content if name == "style")
    policy = next(attributes["content"] for tag, attributes in found.elements if "http-equiv" in attributes)
    digests = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in (script, style)]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{digests[0]}'; style-src 'sha256-{digests[1]}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def test_it_needs_nothing_outside_of_itself(page: Path) -> None:
    found = Elements(page.read_text())
    named = [value for _, attributes in found.elements for key, value in attributes.items() if key in ("src", "href")]
    assert all(re.match("#|data:,", value or "") for value in named)


def test_the_same_dataset_gives_the_same_page_in_place_of_the_last_one(page: Path, plain: Path, healthy: Path) -> None:
    before = page.read_bytes()
    assert run("view", plain, "--html", page, "--healthy", healthy).returncode == 0
    assert page.read_bytes() == before


def test_no_other_file_is_replaced(plain: Path, tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.html"
    thesis.write_text("<p>mine")
    line = error_line(run("view", plain, "--html", thesis), 4)
    assert str(thesis) in line and "Choose another name" in line
    assert thesis.read_text() == "<p>mine"
    assert "exists" in error_line(run("view", plain, "--html", tmp_path), 4)
    assert "no is no folder" in error_line(run("view", plain, "--html", tmp_path / "no" / "page.html"), 4)
    assert "inside the dataset" in error_line(run("view", plain, "--html", plain / "page.html"), 2)


def test_a_dataset_too_large_for_one_file(tmp_path: Path) -> None:
    generate(Flat(), tmp_path / "set", count=MOST_PAIRS + 1, seed=0, shard_size=500)
    with pytest.raises(UsageError, match=r"too many for one file\. Give --limit 3000 or less"):
        write_page(Pairs(tmp_path / "set"), tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_browser_is_opened_only_if_asked_for(plain: Path, tmp_path: Path) -> None:
    program, told = tmp_path / "browser", tmp_path / "told"
    program.write_text(f'#!/bin/sh\necho "$1" > "{told}"\n')
    program.chmod(0o755)
    environment = {**os.environ, "BROWSER": f"{program} %s"}
    page = tmp_path / "a page.html"
    assert run("view", plain, "--limit", 1, "--html", page, env=environment).returncode == 0
    assert not told.exists()
    assert run("view", plain, "--limit", 1, "--html", page, "--open", env=environment).returncode == 0
    assert told.read_text().strip() == page.as_uri()
