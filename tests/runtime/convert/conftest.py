"""A plain dataset of ten pairs and a merged one of sixteen, drawn by no model; to be read only."""

from __future__ import annotations

from pathlib import Path

import pytest

from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import merge
from tests.harness.noise_source import NoiseSource


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("plain") / "set"
    generate(NoiseSource(), out, count=10, seed=7, shard_size=4)
    return out


@pytest.fixture(scope="session")
def merged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    generate(NoiseSource(), folder / "other", count=6, seed=8, shard_size=4)
    merge(folder / "set", [plain, folder / "other"])
    return folder / "set"
