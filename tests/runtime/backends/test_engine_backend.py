"""Engines on the card: the same numbers as ONNX Runtime's, whatever the batch, the slot and the replay."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from busigen.errors import BusigenError, MissingDependencyError
from busigen.registry import ENGINE_TARGETS, PROVIDERS, RESOLUTION
from busigen.runtime.backends.base import EngineOptions
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.onnxruntime import OnnxBackend
from busigen.runtime.backends.probe import driver_cuda
from busigen.runtime.backends.tensorrt.backend import ENGINE, EngineBackend
from busigen.runtime.backends.tensorrt.engine_builder import Cache
from busigen.runtime.backends.tensorrt.library import Library

GRAPHS = Bundle.recorded(default_bundle()).graph_names

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(driver_cuda() is None, reason="this machine has no NVIDIA driver"),
]

SIZES = (4, 2)


@pytest.fixture(scope="module", params=list(ENGINE_TARGETS))
def backend(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EngineBackend:
    try:
        Library.load(request.param)
    except MissingDependencyError as error:
        pytest.skip(str(error))
    cache = Cache(tmp_path_factory.mktemp("cache"))
    return EngineBackend(
        Bundle.open(default_bundle()), PROVIDERS[request.param], EngineOptions(batch_sizes=SIZES), cache
    )


def inputs_of(bundle: Bundle, graph: str, rows: int) -> dict[str, np.ndarray]:
    """Random inputs of a graph, in the ranges that the sampler gives it."""
    rng = np.random.default_rng(rows)
    side = int(graph.partition("@")[2] or RESOLUTION)
    latents = bundle.latent_shape(side)
    tokens = (RESOLUTION // bundle.patch) ** 2
    component = graph.partition("@")[0].partition("-")[0]
    shapes = {
        "image": (1, side, side),
        "pixels": (1, side, side),
        "mask": (1, side, side),
        "edit": (1, side, side),
        "ring": (1, side, side),
        "keep": (tokens,),
        "tokens": (tokens, 128),
        "asked": (12,),
        "frame": (4,),
        **{name: latents for name in ("known", "painted", "latents")},
        "noise": (bundle.code_length,)
        if component == "mask"
        else (1, side, side)
        if component == "decoder"
        else latents,
    }
    flat = {"keep": 1.0, "asked": 0.0, "frame": float(RESOLUTION), "mask": 1.0, "edit": 1.0, "ring": 1.0}
    return {
        name: np.full((rows, *shapes[name]), flat[name], np.float32)
        if name in flat
        else rng.standard_normal((rows, *shapes[name])).clip(-1, 1).astype(np.float32)
        for name in bundle.info["graphs"][graph]["inputs"]
    }


@pytest.mark.parametrize("graph", GRAPHS)
def test_every_graph_yields_what_onnx_runtime_does(backend: EngineBackend, graph: str) -> None:
    """Rows 2 to 9: padded, full, and several calls; each batch twice, so that the second replays a CUDA graph."""
    bundle = Bundle.open(default_bundle())
    reference = OnnxBackend(bundle)
    for rows in (2, 3, 4, 9):
        inputs = inputs_of(bundle, graph, rows)
        expected = reference.run(graph, inputs)
        first, second = backend.run(graph, inputs), backend.run(graph, inputs)
        # fp32 on both sides: ten steps of sums in another order cost about 1e-5 of the largest value.
        np.testing.assert_allclose(first, expected, atol=1e-3 * np.abs(expected).max())
        np.testing.assert_array_equal(first, second)


def test_two_calls_at_once_do_not_disturb_each_other(backend: EngineBackend) -> None:
    bundle = Bundle.open(default_bundle())
    work = [(graph, inputs_of(bundle, graph, 2 + number % 7)) for number in range(24) for graph in ("context", "prior")]
    alone = [backend.run(*job) for job in work]
    with ThreadPoolExecutor(backend.max_concurrent_calls) as pool:
        together = list(pool.map(lambda job: backend.run(*job), work))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_probe_runs_a_network(backend: EngineBackend) -> None:
    assert backend.name in ENGINE.probe(PROVIDERS[backend.name])


def test_a_batch_that_cannot_fit_is_refused_with_one_that_does(backend: EngineBackend, tmp_path: Path) -> None:
    with pytest.raises(BusigenError, match="batch"):
        EngineBackend(
            Bundle.open(default_bundle()), PROVIDERS[backend.name], EngineOptions(batch_sizes=(4096,)), Cache(tmp_path)
        )
