"""An engine that draws crude lesions at no cost: every output row is a pure function of the same row of the inputs."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.registry import LATENT_FACTOR
from busigen.runtime.backends.base import Backend
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.diagnostics.bench import stage_of
from busigen.runtime.sampling.sampler import Sampler

ROWS, COLUMNS = np.mgrid[0:256, 0:256].astype(np.float32)


class QuickEngine(Backend):
    """Remembers the stage, the rows and the whole images (``keep`` of ones) of every call; refuses none at a time."""

    name, version = "quick", "0"

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.whole: list[NDArray[np.float32]] = []
        self._busy = threading.Lock()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        assert self._busy.acquire(blocking=False), "engine calls must not overlap"
        try:
            rows = len(next(iter(inputs.values())))
            self.calls.append((stage_of(graph), rows))
            output = self._output(stage_of(graph).partition("@")[0], inputs)
            assert len(output) == rows
            return output
        finally:
            self._busy.release()

    def _output(self, stage: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        if stage == "context":
            if inputs["keep"].all():
                self.whole += list(inputs["image"])
            seen = inputs["image"].mean(axis=(1, 2, 3)) + inputs["keep"].mean(axis=1)
            return seen[:, None, None] * np.ones((1, 256, 8), dtype=np.float32)
        if stage == "mask":
            return np.stack([lesion(code, t) for code, t in zip(inputs["noise"], inputs["tokens"], strict=True)])
        if stage == "encoder":
            return np.repeat(inputs["pixels"][:, :, ::LATENT_FACTOR, ::LATENT_FACTOR], 8, axis=1)
        if stage == "decoder":
            coarse = inputs["latents"][:, :1].repeat(LATENT_FACTOR, axis=2).repeat(LATENT_FACTOR, axis=3)
            return np.clip(0.3 * inputs["noise"] + 0.3 * coarse, -1, 1).astype(np.float32)
        return inputs["noise"]


def lesion(code: NDArray[np.float32], tokens: NDArray[np.float32]) -> NDArray[np.float32]:
    """Signed distance to a disc; one in a few is too large or touches the border."""
    row, column = 128 + 40 * code[0], 128 + 50 * np.tanh(code[1])
    radius = 10 + 20 * abs(code[2]) + tokens.mean()
    return (radius - np.hypot(ROWS - row, COLUMNS - column))[None].astype(np.float32)


def quick_sampler(engine: QuickEngine, **options: Any) -> Sampler:
    """A sampler on the shipped bundle's record, none of whose graphs is read."""
    options = {"classes": {"benign": 0.5, "malignant": 0.5}, "batch_size": 4, **options}
    return Sampler(Bundle.recorded(default_bundle()), engine, **options)
