"""Fixtures that every layer's tests share: drawn sets always, the real data where it is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from busigen.data.prepare import prepare
from busigen.data.prepared import Prepared
from tests.harness.synthetic_datasets import draw_busbra, draw_busi

_BESIDE_THE_REPOSITORY = Path(__file__).resolve().parents[2] / "shared" / "data"


@dataclass(frozen=True)
class Sources:
    """A BUSI and a BUS-BRA folder and what was prepared from both."""

    busi: Path
    busbra: Path
    prepared: Prepared


def _real_folder() -> Path | None:
    folder = Path(os.environ.get("BUSIGEN_DATA") or _BESIDE_THE_REPOSITORY)
    return folder if (folder / "Dataset_BUSI_with_GT").is_dir() and (folder / "BUSBRA").is_dir() else None


_KINDS = ["drawn"] if _real_folder() is None else ["drawn", "real"]


@pytest.fixture(scope="session")
def synthetic_busi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BUSI-like set; treat it as read-only."""
    return draw_busi(tmp_path_factory.mktemp("drawn") / "Dataset_BUSI_with_GT")


@pytest.fixture(scope="session")
def synthetic_busbra(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BUS-BRA-like set; treat it as read-only."""
    return draw_busbra(tmp_path_factory.mktemp("drawn") / "BUSBRA")


@pytest.fixture(scope="session")
def synthetic_prepared(
    synthetic_busi: Path, synthetic_busbra: Path, tmp_path_factory: pytest.TempPathFactory
) -> Prepared:
    """Both drawn sets, prepared with seed 0; treat it as read-only."""
    out = tmp_path_factory.mktemp("prepared") / "drawn"
    prepare([synthetic_busi, synthetic_busbra], out)
    return Prepared.open(out)


@pytest.fixture(scope="session")
def real_data() -> Path | None:
    """The folder with the real sets, from BUSIGEN_DATA or beside the repository; None where there is none."""
    return _real_folder()


@pytest.fixture(scope="session", params=_KINDS)
def any_sources(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Sources:
    """The drawn sets and, where present, the real ones."""
    if request.param == "drawn":
        return Sources(*(request.getfixturevalue(f"synthetic_{name}") for name in ("busi", "busbra", "prepared")))
    folder = request.getfixturevalue("real_data")
    busi, busbra = folder / "Dataset_BUSI_with_GT", folder / "BUSBRA"
    return Sources(busi, busbra, Prepared.open(_real_prepared(busi, busbra, tmp_path_factory)))


def _real_prepared(busi: Path, busbra: Path, folders: pytest.TempPathFactory) -> Path:
    """Where the real sets lie prepared: once for all test processes and turns of a fixture: it takes a minute."""
    base = folders.getbasetemp()
    out = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "real-prepared"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            prepare([busi, busbra], out)
    return out


@pytest.fixture(scope="session")
def any_busi(any_sources: Sources) -> Path:
    """The drawn BUSI-like set and, where present, the real one."""
    return any_sources.busi
