"""What only a card can show. `pytest -m gpu` runs these; where there is no driver they say so."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from busigen.errors import CapacityError
from busigen.registry import PROVIDERS
from busigen.runtime.backends.base import EngineOptions, open_backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.probe import choose, driver_cuda, probe
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.command import run
from tests.harness.hashing import hashes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(driver_cuda() is None, reason="this machine has no NVIDIA driver"),
]

GPU = [provider.name for provider in PROVIDERS.values() if provider.gpu]
TOLERANCE = {"cuda": 1e-3}
"""Root mean square error over the signal's. fp32 sums in another order differ by 1e-6 a layer, and the chain has some
hundred of them; TF32 and TensorRT's own choices keep 10 bits of mantissa, 5e-4 a product."""


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return Bundle.open(default_bundle())


def working(name: str) -> None:
    found = probe(PROVIDERS[name])
    if not found.works:
        pytest.skip(f"{name}: {found.described}")


def test_auto_takes_the_card() -> None:
    working("cuda")
    assert PROVIDERS[choose().provider].gpu


@pytest.mark.parametrize("name", GPU)
def test_a_graph_gives_what_it_gives_on_the_processor(bundle: Bundle, name: str) -> None:
    working(name)
    noise = np.random.default_rng(0).standard_normal((8, *bundle.background_shape), np.float32)
    asked = {"noise": noise, "frame": np.array([[0, 0, 180, 256], [0, 40, 256, 176]] * 4, np.float32)[:8]}
    expected = open_backend(bundle).run("prior", asked)
    found = open_backend(bundle, name).run("prior", asked)
    error = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    assert error < TOLERANCE.get(name, 2e-2)


@pytest.mark.parametrize("name", GPU)
def test_runs_repeat_to_the_byte_whatever_the_batch_is(bundle: Bundle, name: str) -> None:
    working(name)

    def draw(batch_size: int) -> list[bytes]:
        sampler = Sampler(bundle, open_backend(bundle, name), classes={"benign": 1.0}, batch_size=batch_size)
        return [sample.image.tobytes() for sample in sampler.attempt(5, [(index, 0) for index in range(6)])[0]]

    first = draw(8)
    assert first and draw(8) == first


def test_buffers_and_cuda_graphs_change_no_byte(bundle: Bundle) -> None:
    working("cuda")
    pixels = {"pixels": np.random.default_rng(0).uniform(-1, 1, (4, 1, 128, 128)).astype(np.float32)}
    plain, bound = (open_backend(bundle, "cuda", EngineOptions(bound=bound)) for bound in (False, True))
    expected = plain.run("encoder@128", pixels)
    for _ in range(3):  # The first run of a shape records, the later ones replay.
        assert (bound.run("encoder@128", pixels) == expected).all()


def test_generate_runs_on_the_card_and_says_so(tmp_path: Path) -> None:
    working("cuda")
    for out in ("one", "two"):
        done = run("generate", "--count", 8, "--out", tmp_path / out, "--provider", "cuda")
        assert done.returncode == 0, done.stderr
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")


def test_a_batch_that_does_not_fit_names_one_that_does(bundle: Bundle) -> None:
    working("cuda")
    backend = open_backend(bundle, "cuda")
    rows = 2
    try:
        while rows < 1 << 16:
            backend.run("decoder@256", _decoder_inputs(bundle, rows))
            rows *= 2
    except CapacityError as error:
        assert 0 < error.fits < error.rows == rows
        backend.run("decoder@256", _decoder_inputs(bundle, error.fits))
        return
    pytest.skip("this card holds every batch that was tried")


def _decoder_inputs(bundle: Bundle, rows: int) -> dict[str, np.ndarray]:
    latents = np.zeros((rows, *bundle.background_shape), np.float32)
    noise = np.zeros((rows, 1, 256, 256), np.float32)
    return {"latents": latents, "noise": noise, "mask": np.zeros_like(noise)}
