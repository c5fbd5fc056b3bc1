"""Providers whose engines are built for a batch: who opens one asks for the batch that is to be computed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from busigen.registry import SYNTHETIC
from busigen.runtime.backends.tensorrt.profiles import Batches
from busigen.runtime.diagnostics.bench import Bench
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.maintenance.explain import explain
from busigen.runtime.maintenance.replay import Inputs
from busigen.runtime.progress import Progress
from tests.harness.static_engine import NAME, StaticBackend, static_engines


@pytest.fixture
def opened() -> Iterator[list[StaticBackend]]:
    with static_engines() as backends:
        yield backends


def dataset(out: Path, batch_size: int) -> dict[str, Any]:
    options = GenerateOptions(
        out=out, count=2, classes="benign=1", seed=3, batch_size=batch_size, shard_size=2, provider=NAME, threads=1
    )
    options.run(Progress())
    recorded: dict[str, Any] = json.loads((out / "run.json").read_text())
    return recorded


@pytest.mark.parametrize("older", [False, True], ids=["today", "before the field"])
def test_a_sample_is_drawn_again_by_engines_for_the_runs_own_batch(
    opened: list[StaticBackend], tmp_path: Path, older: bool
) -> None:
    """Engines for another batch may round otherwise: the replay would differ, or say that its conditions do."""
    recorded = dataset(tmp_path / "set", 4)
    assert recorded["fingerprint"]["engine_version"] == "0 on no card, batch 4"
    assert recorded["engine_batches"] == {"sizes": [4], "dynamic": False}
    if older:
        for name in ("run.json", "dataset.json"):
            record = json.loads((tmp_path / "set" / name).read_text())
            del record["engine_batches"]
            (tmp_path / "set" / name).write_text(json.dumps(record))
        dataset(tmp_path / "set", 4)  # It is continued, not refused as another run.
        del opened[1:]
    described = explain(tmp_path / "set", "1", inputs=Inputs(threads=1))
    assert described.error is None, described.error
    assert described.replay is not None
    assert (described.replay.image_agrees, described.replay.conditions) == (True, ())
    made, again = opened
    assert made.batches == again.batches == Batches((4,))


def test_bench_measures_each_batch_with_engines_that_are_built_for_it(
    opened: list[StaticBackend], tmp_path: Path
) -> None:
    record = Bench(
        out=tmp_path,
        ledger=tmp_path / "ledger.jsonl",
        bundle=None,
        providers=NAME,
        batch_sizes="4,2",
        count=2,
        count_for=10,
        repeat=1,
        healthy=SYNTHETIC,
        threads=1,
    ).run(Progress())
    assert [(result["provider"], result["batch_size"]) for result in record["results"]] == [(NAME, 2), (NAME, 4)]
    assert record["providers"] == {NAME: ["static"]}
    assert [backend.batches for backend in opened] == [Batches((2,)), Batches((4,))]
    for backend in opened:
        assert max(rows for _, rows in backend.asked) <= backend.batches.sizes[0], "no call is cut into several"
