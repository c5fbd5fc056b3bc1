"""``busigen explain`` and ``verify --repair`` as a user meets them: real processes, the shipped bundle."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image

from busigen.registry import LESION_CLASSES
from busigen.runtime.backends.bundle import default_bundle
from busigen.runtime.dataset.reader import Dataset, read_members
from tests.harness.command import SMALL, run
from tests.harness.hashing import hashes
from tests.harness.replaying import flip, truncate


@pytest.fixture(scope="module")
def healthy(synthetic_busi: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(shutil.copytree(synthetic_busi / "normal", tmp_path_factory.mktemp("healthy") / "normal"))


@pytest.fixture(scope="module")
def generated(healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished dataset, to be treated as read-only: batches of two, ranges asked for, so that draws are refused."""
    out = tmp_path_factory.mktemp("generated") / "set"
    done = run("generate", *SMALL, "--out", out, "--healthy", healthy, "--size", "0.201234567:0.3", "--seed", 2)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def dataset(generated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(generated, tmp_path / "set"))


@pytest.fixture(scope="module")
def other_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped graphs under another record: another bundle that happens to draw the same."""
    out = Path(shutil.copytree(default_bundle(), tmp_path_factory.mktemp("bundle") / "other"))
    record = json.loads((out / "bundle.json").read_text())
    (out / "bundle.json").write_text(json.dumps({**record, "note": "another"}))
    return out


def test_every_sample_replays_alone_to_the_bytes_of_its_batch(generated: Path, healthy: Path, tmp_path: Path) -> None:
    attempts = dict(Dataset.open(generated).manifest().select("index", "attempt").iter_rows())
    often = max(attempts, key=lambda index: (attempts[index], index))
    assert attempts[often], "one of the samples should have been refused once, or this shows too little"
    for key in (f"{often:09d}", str(next(index for index in attempts if index != often))):
        done = run("explain", generated, key, "--healthy", healthy, "--out", tmp_path / key, "--json")
        assert done.returncode == 0, done.stderr
        described = json.loads(done.stdout)
        assert described["replay"]["image_agrees"] and described["replay"]["mask_agrees"]
        assert described["replay"]["conditions"] == described["problems"] == []
        assert described["background"]["folder"] == "normal"
        assert described["class"] in LESION_CLASSES
        assert 0.201 < described["asked"]["size"] < 0.3
        assert len(described["refused"]) == described["attempt"]
        links = [link["link"] for link in described["chain"]]
        assert links[:3] == ["training split", "checkpoint (base, LoRA, merged)", "bundle"]
        assert f"ONNX mask-{described['class']}" in links
        number = described["shard"]["number"]
        tar = generated / described["shard"]["file"]
        (member,) = read_members(tar, range(2 * number, 2 * number + 2), only=[described["index"]])
        assert (tmp_path / key / f"{described['key']}.image.png").read_bytes() == member.image
        assert (tmp_path / key / f"{described['key']}.mask.png").read_bytes() == member.mask


def test_explain_tells_the_history_even_where_it_cannot_replay(generated: Path, healthy: Path, tmp_path: Path) -> None:
    done = run("explain", generated, "000000001")
    assert done.returncode == 3
    assert done.stdout.startswith(f"sample 000000001 of {generated}: index 1, seed 2, ")
    assert re.search(r"asked for .*, size 0\.\d{3,4}$", done.stdout, re.MULTILINE)
    assert "replay" not in done.stdout
    assert "a folder named 'normal', which is not given. Give that folder with --healthy." in done.stderr
    assert run("explain", generated, "000000001", "--no-replay").stdout == done.stdout
    more = Path(shutil.copytree(healthy, tmp_path / "more"))
    first = next(path for path in sorted(more.iterdir()) if "mask" not in path.name)
    Image.open(first).convert("L").rotate(180).save(more / "another.png")
    done = run("explain", generated, "000000001", "--healthy", more)
    assert done.returncode == 3
    assert f"--healthy {more} holds other images than the run's 'normal' did" in done.stderr


def test_another_bundle_is_told_by_explain_and_refused_by_repair(
    dataset: Path, healthy: Path, other_bundle: Path
) -> None:
    done = run("explain", dataset, "0", "--healthy", healthy, "--bundle", other_bundle)
    assert done.returncode == 0, done.stderr
    assert "replay: under other conditions than the run's" in done.stdout
    assert "fingerprint.bundle: " in done.stdout
    flip(dataset / "shards/000001.tar")
    before = hashes(dataset)
    done = run("verify", dataset, "--repair", "--healthy", healthy, "--bundle", other_bundle)
    assert done.returncode == 3
    assert "not repaired 1 shard (shards/000001.tar): the dataset was made with another bundle" in done.stdout
    assert "Give the run's own bundle with --bundle" in done.stderr
    assert hashes(dataset) == before


def test_a_tampered_sample_does_not_replay(dataset: Path, healthy: Path) -> None:
    flip(dataset / "shards/000001.tar")
    results = [run("explain", dataset, key, "--healthy", healthy) for key in ("2", "3")]
    assert [done.returncode for done in results] == [5, 5]
    assert all("shards/000001.tar has another sha256" in done.stdout for done in results)
    # The flipped bit is in one of the two; the other one is whole inside a damaged shard.
    assert sum("DIFFER" in done.stdout for done in results) <= 1


def test_repair_restores_the_bytes(generated: Path, dataset: Path, healthy: Path) -> None:
    flip(dataset / "shards/000001.tar")
    for suffix in ("tar", "parquet", "json"):
        (dataset / f"shards/000002.{suffix}").unlink()
    truncate(dataset / "manifest.parquet")
    intact = (dataset / "shards/000000.tar").stat()
    damaged = hashes(dataset)
    done = run("verify", dataset, "--repair")
    assert done.returncode == 3
    assert "not repaired 2 shards (shards/000001.tar, shards/000002.tar): the dataset was painted into" in done.stdout
    assert "--healthy" in done.stderr
    assert hashes(dataset) == damaged
    done = run("verify", dataset, "--repair", "--healthy", healthy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "repaired shards/000001.tar: drawn again, to the recorded bytes" in done.stdout
    assert "repaired manifest.parquet: written again from the shards" in done.stdout
    assert f"{dataset} is sound: 6 samples in 3 shards read" in done.stdout
    assert hashes(dataset) == hashes(generated)
    now = (dataset / "shards/000000.tar").stat()
    assert (now.st_ino, now.st_mtime_ns) == (intact.st_ino, intact.st_mtime_ns), "an intact shard is not written over"
    assert "nothing was repaired" in run("verify", dataset, "--repair").stdout


def test_options_for_repair_alone_are_refused(generated: Path) -> None:
    done = run("verify", generated, "--threads", 1)
    assert done.returncode == 2
    assert "add --repair" in done.stderr
