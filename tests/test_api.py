"""The package from Python: what the commands do, as functions and objects."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tempfile
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import busigen
from busigen.errors import InputError, IntegrityError, MissingDependencyError, UsageError, needs
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.merge import merge
from tests.harness.command import run
from tests.harness.noise_source import NoiseSource, noise_sample

SEED = 7


def make(folder: Path, count: int, seed: int = SEED, first: int = 0) -> Path:
    generate(NoiseSource(), folder, count=count, seed=seed, shard_size=3, first=first)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight pairs in three shards, from index 3 on."""
    return make(tmp_path_factory.mktemp("plain") / "set", 8, first=3)


@pytest.fixture(scope="module")
def merged(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Parts of eight and four pairs."""
    place = tmp_path_factory.mktemp("merged")
    merge(place / "set", [plain, make(place / "other", 4, SEED + 1)])
    return place / "set"


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def url(folder: Path) -> str:
    return f"file://{folder.as_posix()}"


def expected(places: list[tuple[int, int]]) -> list[tuple[bytes, bytes, str]]:
    samples = [noise_sample(seed, index, int(index % 7 == 3)) for seed, index in places]
    return [(one.image.tobytes(), one.mask.tobytes(), one.label) for one in samples]


def content(pairs: Any) -> list[tuple[bytes, bytes, str]]:
    return [(pair.image.tobytes(), pair.mask.tobytes(), pair.label) for pair in pairs]


# The package


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    loaded = json.loads(python("import sys, busigen, json; print(json.dumps(sorted(sys.modules)))"))
    assert not {"numpy", "polars", "pydantic", "onnxruntime", "torch", "typing", "rich"} & set(loaded)
    loaded = json.loads(python("import sys, busigen, json; busigen.Dataset; print(json.dumps(sorted(sys.modules)))"))
    assert not {"torch", "monai", "onnxruntime"} & set(loaded)


def test_what_is_offered_is_there_and_typed() -> None:
    offered = {
        "BusigenError",
        "Dataset",
        "Pair",
        "audit",
        "explain",
        "generate",
        "grid",
        "prepare",
        "torch",
        "verify",
        "write",
    }
    assert offered <= set(dir(busigen))
    for name in offered:
        assert getattr(busigen, name).__doc__
    with pytest.raises(AttributeError, match="convort"):
        busigen.convort  # noqa: B018
    assert (Path(busigen.__file__).parent / "py.typed").is_file()


# Datasets


@pytest.mark.parametrize("remote", [False, True])
def test_a_dataset_is_read_by_position(plain: Path, remote: bool) -> None:
    data = busigen.Dataset(url(plain) if remote else plain, check=True)
    samples = expected([(SEED, index) for index in range(3, 11)])
    assert content(data) == samples
    assert content([data[0], data[-1], data[5]]) == [samples[0], samples[7], samples[5]]
    view = data[1:7:2]
    assert (len(view), len(view[1:]), len(data[8:])) == (3, 2, 0)
    assert content(view) == samples[1:7:2]
    assert view.manifest()["index"].to_list() == [4, 6, 8]
    assert data.manifest().height == 8
    assert data.shards() == [range(0, 3), range(3, 6), range(6, 8)]
    assert view.shards() == [range(0, 1), range(1, 3)]
    pair = data[4]
    assert (pair.key, pair.image.dtype, pair.mask.dtype) == ("000000007", np.uint8, np.bool_)
    assert pair.row == data.manifest().row(4, named=True)
    assert content([data["000000007"], view["000000008"]]) == [samples[4], samples[5]]
    with pytest.raises(IndexError, match="no position 8: they go from 0 to below 8"):
        data[8]
    for asked, key in ((data, "7"), (data, "000000002"), (data, "000/000000007"), (data[:0], "000000007")):
        with pytest.raises(KeyError, match=f"no pair '{key}'"):
            asked[key]
    with pytest.raises(KeyError, match="the keys are 000000004 to 000000008"):
        view["000000003"]


@pytest.mark.parametrize("remote", [False, True])
def test_a_merged_dataset_is_one(merged: Path, remote: bool) -> None:
    data = busigen.Dataset(url(merged) if remote else merged)
    assert content(data) == expected([(SEED, k) for k in range(3, 11)] + [(SEED + 1, k) for k in range(4)])
    for position, key in ((7, "000/000000010"), (8, "001/000000000")):
        assert data[position].key == key
        assert data[key].row == data[position].row
    table = data.manifest()
    assert table["part"].to_list() == ["parts/000"] * 8 + ["parts/001"] * 4
    # What the folder itself says.
    assert table.equals(busigen.Dataset(merged).manifest())
    assert busigen.explain(merged, data[8].key, replay=False, progress=False).error is None


def _contents(data: busigen.Dataset, positions: list[int]) -> list[tuple[bytes, bytes, str]]:
    return content([data[position] for position in positions])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_read_it_too(plain: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    data = busigen.Dataset(url(plain))
    here = _contents(data, [0, 7])
    with get_context(method).Pool(2) as pool:
        assert pool.starmap(_contents, [(data, [0, 7])] * 2) == [here] * 2
    # The other processes have taken nothing with them that is needed here, and leave nothing when this one ends.
    assert _contents(data, [0, 7]) == here
    copied = pickle.loads(pickle.dumps(data))
    del data
    assert _contents(copied, [0, 7]) == here
    del copied
    assert list(tmp_path.iterdir()) == []


def test_damage_is_found_on_request(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    tar = folder / "shards" / "000002.tar"
    blob = bytearray(tar.read_bytes())
    blob[blob.rindex(b"}")] = ord(" ")  # of the last row
    tar.write_bytes(blob)
    assert len(content(busigen.Dataset(folder)[:4])) == 4
    checked = busigen.Dataset(folder, check=True)
    assert len(content(checked[:3])) == 3
    with pytest.raises(IntegrityError, match=r"000002\.tar has another sha256"):
        checked[3]
    report = busigen.verify(folder, progress=False)
    assert not report.ok and any("000002.tar" in problem.file for problem in report.problems)


@pytest.mark.parametrize("remote", [False, True])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"index_range": "3:1000000000"}, "manifest.parquet"),
        ({"index_range": "3:11", "shard_size": 1}, "lists 3 shards, of which there should be 8"),
    ],
)
def test_a_record_is_not_believed(
    plain: Path, tmp_path: Path, change: dict[str, Any], named: str, remote: bool
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    record = json.loads((folder / "dataset.json").read_text())
    record["config"] |= change
    (folder / "dataset.json").write_text(json.dumps(record))
    with pytest.raises(IntegrityError, match=named):
        busigen.Dataset(url(folder) if remote else folder)


def test_a_place_without_a_dataset_says_so(plain: Path, tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "none", url(tmp_path / "none"), str(tmp_path)):
        with pytest.raises(InputError, match="no busigen dataset"):
            busigen.Dataset(place)
    folder = Path(shutil.copytree(plain, tmp_path / "set"))
    (folder / "dataset.json").unlink()
    for place in (folder, url(folder)):
        with pytest.raises(InputError, match="is not finished") as caught:
            busigen.Dataset(place)
        assert str(place) in str(caught.value)
    (folder / "shards" / "000001.tar").unlink()
    shutil.copy(plain / "dataset.json", folder)
    for place in (folder, url(folder)):
        with pytest.raises(IntegrityError, match=r"000001\.tar"):
            busigen.Dataset(place)[0]


# Functions


def test_generate_has_the_pairs_of_the_command(tmp_path: Path) -> None:
    done = run("generate", "--out", tmp_path / "by-command", "--count", 6, "--seed", 3, "--shard-size", 4, "--size",
               "0.02:0.06", "--classes", "benign=1,malignant=2", "--threads", 1)  # fmt: skip
    assert done.returncode == 0, done.stderr
    options: dict[str, Any] = {
        "seed": 3, "size": (0.02, 0.06), "classes": {"benign": 1, "malignant": 2}, "threads": 1
    }  # fmt: skip
    pairs = list(busigen.generate(6, **options))
    stored = busigen.Dataset(tmp_path / "by-command")
    assert content(pairs) == content(stored)
    assert [pair.key for pair in pairs] == [pair.key for pair in stored]
    of_files = ("shard", "image_sha256", "mask_sha256")
    assert [pair.row for pair in pairs] == [
        {name: value for name, value in pair.row.items() if name not in of_files} for pair in stored
    ]
    report = busigen.write(tmp_path / "by-python", 6, shard_size=4, progress=False, **options)
    assert (report.samples, report.classes) == (6, {"benign": 2, "malignant": 4})
    for file in ("shards/000000.tar", "shards/000001.tar", "manifest.parquet", "run.json"):
        assert (tmp_path / "by-python" / file).read_bytes() == (tmp_path / "by-command" / file).read_bytes()
    assert busigen.verify(tmp_path / "by-python", progress=False).ok
    assert content(busigen.generate(2, first=4, **options)) == content(stored[4:])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"count": 0}, "--count is 0"),
        ({"first": -1}, "first is -1"),
        ({"seed": -1}, "--seed is -1"),
        ({"classes": ["benign", "purple"]}, "'purple'"),
        ({"classes": {"benign": 0.2, "malignant": 0.2}}, "sum to 0.4"),
        ({"size": (0.06, 0.02)}, "smaller number comes first"),
        ({"depth": 3}, "--depth is '3.0'"),
        ({"birads": 6}, "--birads is '6'"),
        ({"provider": "abacus"}, "unknown provider 'abacus'"),
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"healthy": "nowhere"}, "--healthy nowhere is no folder"),
        ({"bundle": "nowhere"}, "nowhere"),
        ({"cuont": 3}, "no option 'cuont'. Did you mean count?"),
        ({"batchsize": 3}, "no option 'batchsize'. Did you mean batch_size?"),
        ({"shard_size": 3}, "no option 'shard_size'"),
    ],
)
def test_an_unfit_option_is_refused_at_once(options: dict[str, Any], named: str) -> None:
    with pytest.raises(busigen.BusigenError, match=named):
        busigen.generate(**options)


def test_a_misspelt_option_of_what_writes_is_named_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no option 'shardsize'.*shard_size"):
        busigen.write(tmp_path / "out", 3, shardsize=3)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match=r"no option 'background'.*backgrounds"):
        busigen.grid(tmp_path / "out", "class", background=3)  # type: ignore[call-arg]


def test_prepare_gives_an_object(synthetic_busi: Path, tmp_path: Path) -> None:
    report = busigen.prepare(synthetic_busi, tmp_path / "prepared", progress=False)
    assert report.images == sum(report.by_class.values()) > 0
    assert report.out == tmp_path / "prepared"


def test_audit_gives_an_object(synthetic_busi: Path, merged: Path, tmp_path: Path) -> None:
    report = busigen.audit(merged, synthetic_busi, tmp_path / "report", only="integrity", progress=False)
    assert report.failed == () and list(report.outcomes) == ["integrity"]
    with pytest.raises(UsageError, match="is a URL"):
        busigen.audit(url(merged), synthetic_busi, tmp_path / "other", progress=False)


def test_a_missing_extra_is_named() -> None:
    with pytest.raises(MissingDependencyError, match=r"busigen\.audit needs nowhere_at_all.*\[eval\]"), needs(
        "eval", "busigen.audit"
    ):  # fmt: skip
        import nowhere_at_all  # noqa: F401
