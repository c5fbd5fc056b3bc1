"""Draws regrouped across shards: the same samples in fuller batches, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from busigen.errors import IntegrityError
from busigen.runtime.dataset.format import SampleBatch, batches_of
from busigen.runtime.execution.factory import generate
from busigen.runtime.sampling import graphs as graphs_module
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import WINDOW_BATCHES, Sampler
from tests.harness.hashing import hashes
from tests.harness.quick_engine import QuickEngine, quick_sampler

SEED = 5
SHARDS = [range(first, first + 5) for first in range(0, 40, 5)]


def streamed(sampler: Sampler) -> list[SampleBatch]:
    return list(batches_of(sampler, SEED, SHARDS, lambda accepted: None, lambda: False))


@pytest.fixture(scope="module")
def alone() -> tuple[QuickEngine, list[SampleBatch]]:
    """Every shard drawn with nothing ahead of it."""
    engine = QuickEngine()
    sampler = quick_sampler(engine)
    return engine, [sampler.draw(SEED, indices, lambda accepted: None) for indices in SHARDS]


def assert_same(found: list[SampleBatch], expected: list[SampleBatch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.rejections == other.rejections
        for a, b in zip(one.samples, other.samples, strict=True):
            assert (a.index, a.attempt, a.label, a.row) == (b.index, b.attempt, b.label, b.row)
            assert np.array_equal(a.image, b.image)
            assert np.array_equal(a.mask, b.mask)


def test_the_same_samples_come_in_fuller_batches(alone: tuple[QuickEngine, list[SampleBatch]]) -> None:
    engine = QuickEngine()
    generated = streamed(quick_sampler(engine))
    assert_same(generated, alone[1])
    assert any(one.rejections for one in generated), "redraws are what leaves small tails"
    for stage in ("mask", "lesion@128"):
        calls, before = ([rows for name, rows in e.calls if name == stage] for e in (engine, alone[0]))
        # Batches of four, of which a shard of five fills one per class at the most.
        assert len(calls) < 0.75 * len(before), stage
        assert sum(calls) <= sum(before), stage


def test_shards_of_any_size_from_batches_of_any_size_are_the_same_bytes(tmp_path: Path) -> None:
    found = []
    for batch_size in (2, 16):
        out = tmp_path / str(batch_size)
        generate(quick_sampler(QuickEngine(), batch_size=batch_size), out, count=13, seed=SEED, shard_size=3)
        found.append(hashes(out))
    assert found[0] == found[1]


def test_no_draw_is_further_ahead_than_the_window() -> None:
    # Ones of a rare class wait long for company, and all that is drawn meanwhile has to wait with them.
    asked: list[int] = []

    def requests() -> Iterator[range]:
        for first in range(120):
            asked.append(first)
            yield range(first, first + 1)

    sampler = quick_sampler(QuickEngine(), classes={"benign": 0.97, "malignant": 0.03}, batch_size=2)
    ahead = []
    for number, generated in enumerate(batches_of(sampler, SEED, requests(), lambda accepted: None, lambda: False)):
        assert [sample.index for sample in generated.samples] == [number]
        ahead.append(len(asked) - number)
    assert len(ahead) == 120
    assert 2 < max(ahead) <= 2 * WINDOW_BATCHES


def test_a_stop_finishes_the_oldest_shard_alone(alone: tuple[QuickEngine, list[SampleBatch]]) -> None:
    accepted: list[int] = []
    sampler = quick_sampler(QuickEngine())
    found = list(batches_of(sampler, SEED, SHARDS, accepted.append, lambda: sum(accepted) > 0))
    # The batch with the first accepted sample may have finished the first shard; the next one is then the oldest.
    assert 1 <= len(found) <= 2
    assert_same(found, alone[1][: len(found)])


def test_tokens_of_a_healthy_image_are_computed_once(synthetic_busi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = HealthyFolder(synthetic_busi / "normal")
    engine = QuickEngine()
    generated = streamed(quick_sampler(engine, healthy=healthy))
    assert len({image.tobytes() for image in engine.whole}) <= len(healthy) < 40
    # Every call has two rows at least, and two batches may need one image at the same time.
    assert len(engine.whole) <= 3 * len(healthy)
    monkeypatch.setattr(graphs_module, "CACHED_TOKENS", 0)
    engine = QuickEngine()
    assert_same(streamed(quick_sampler(engine, healthy=healthy)), generated)
    assert len(engine.whole) >= 40


def test_what_goes_wrong_in_a_stage_ends_the_stream(synthetic_busi: Path) -> None:
    class Broken(QuickEngine):
        def run(self, graph, inputs):
            if graph.startswith("blend"):
                raise IntegrityError("the graph is broken.", fix="Mend it.")
            return super().run(graph, inputs)

    with pytest.raises(IntegrityError, match="the graph is broken"):
        streamed(quick_sampler(Broken()))
