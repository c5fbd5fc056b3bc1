"""A dataset of eight samples in three shards, drawn by no model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from busigen.runtime.execution.factory import generate
from tests.harness.noise_source import NoiseSource


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pristine") / "set"
    generate(NoiseSource(), out, count=8, seed=7, shard_size=3)
    return out


@pytest.fixture
def dataset(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "set"))
