"""Datasets to look at, whose texts would be markup if anything took them for it, and the command that shows them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from busigen.data.sources.renamed import image_hash
from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import merge
from tests.harness.command import CLI, ROOT
from tests.harness.noise_source import NoiseSource
from tests.harness.processes import listening

HOSTILE = "</script><img class=evil src=x onerror=\"document.title='taken'\"><!-- \u202e"
"""A name of a file, folder or column that a page must show and never obey."""


class PaintedSource(NoiseSource):
    """The noise source, whose samples say that they were painted into images of a folder, the last one into none."""

    def __init__(self, healthy: Path) -> None:
        super().__init__()
        self.images = [(path.name, image_hash(path)) for path in sorted(healthy.iterdir())]

    def row_types(self) -> Mapping[str, type]:
        return {**super().row_types(), "healthy_file": str, "<b class=evil>": str}

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        batch = super().draw(seed, indices, done)
        return replace(batch, samples=[replace(one, row=one.row | self.told(one.index)) for one in batch.samples])

    def told(self, index: int) -> dict[str, Any]:
        name, sha256 = self.images[index % len(self.images)] if index != 13 else (None, None)
        return {"healthy_file": name, "healthy_sha256": sha256, "<b class=evil>": f"{HOSTILE} {index}"}


@pytest.fixture(scope="package")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three images, one of which has a name that is markup."""
    folder = tmp_path_factory.mktemp("healthy")
    rng = np.random.default_rng(5)
    for name, size in (("a.png", (300, 200)), ("b.png", (128, 400)), ('<img class=evil src="x">.png', (256, 256))):
        Image.fromarray(rng.integers(0, 255, size[::-1], dtype=np.uint8)).save(folder / name)
    return folder


@pytest.fixture(scope="package")
def plain(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fourteen pairs in three shards; to be treated as read-only."""
    out = tmp_path_factory.mktemp("plain") / "<img class=evil src=x>"
    generate(PaintedSource(healthy), out, count=14, seed=7, shard_size=5)
    return out


@pytest.fixture(scope="package")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """140 pairs in two parts, which are three pages; to be treated as read-only."""
    folder = tmp_path_factory.mktemp("merged")
    for seed in (1, 2):
        generate(NoiseSource(), folder / str(seed), count=70, seed=seed, shard_size=30)
    merge(folder / "all", [folder / "1", folder / "2"])
    return folder / "all"


@contextmanager
def serving(*arguments: object) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`busigen view` in a process of its own, which is ended if it runs yet: the address that it prints, and it."""
    process = subprocess.Popen(
        [*CLI, "view", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:\d+/[\w-]+/", line)
        assert found, process.stderr.read()
        yield found[0], process
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="package")
def plain_url(plain: Path, healthy: Path) -> Iterator[str]:
    with serving(plain, "--healthy", healthy) as (url, _):
        yield url


@pytest.fixture(scope="package")
def merged_url(merged: Path) -> Iterator[str]:
    with serving(merged) as (url, _):
        yield url
