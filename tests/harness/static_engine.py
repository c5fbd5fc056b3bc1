"""A provider whose calls have a fixed size, as TensorRT's engines have, and which needs no card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from busigen.registry import Provider
from busigen.runtime.backends.base import ENGINES, Arrays, Backend, EngineOptions
from busigen.runtime.backends.bundle import Bundle
from busigen.runtime.backends.tensorrt.profiles import Batches, calls
from tests.harness.quick_engine import QuickEngine

NAME = "tensorrt-rtx"

Inner = Callable[[Bundle], Backend]


class StaticBackend(Backend):
    """Pads and cuts batches as engines for ``batches`` do, and says these in its version."""

    def __init__(self, bundle: Bundle, inner: Backend, batches: Batches) -> None:
        self.name, self.version = NAME, f"0 on no card, {batches}"
        self.providers = ("static",)
        self.asked: list[tuple[str, int]] = []
        self.batches, self._bundle, self._inner = batches, bundle, inner

    def run(self, graph: str, inputs: Arrays) -> NDArray[np.float32]:
        count = len(next(iter(inputs.values())))
        self.asked.append((graph, count))
        parts = []
        for call in calls(count, self.batches.profiles(self._bundle.call_side(graph))):
            rows = np.minimum(np.arange(call.first, call.first + call.rows), call.end - 1)
            found = self._inner.run(graph, {name: array[rows] for name, array in inputs.items()})
            parts.append(found[: call.end - call.first])
        return np.concatenate(parts)


class _Engine:
    """What the registry finds here (:class:`busigen.runtime.backends.base.Engine`)."""

    def __init__(self) -> None:
        self.inner: Inner = lambda bundle: QuickEngine()
        self.opened: list[StaticBackend] = []

    def open(self, bundle: Bundle, provider: Provider, options: EngineOptions) -> StaticBackend:
        batches = options.exact_batches or Batches(options.batch_sizes)
        self.opened.append(StaticBackend(bundle, self.inner(bundle), batches))
        return self.opened[-1]

    def probe(self, provider: Provider) -> str:
        return "no card"


ENGINE = _Engine()


@contextmanager
def static_engines(inner: Inner = lambda bundle: QuickEngine()) -> Iterator[list[StaticBackend]]:
    """Let this module be what runs ``--provider tensorrt-rtx``.

    Args:
        inner: what computes; by default the quick engine, whose images are crude.

    Yields:
        What was opened since.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENGINES, NAME, lambda: ENGINE)
        patch.setattr(ENGINE, "inner", inner)
        patch.setattr(ENGINE, "opened", [])
        yield ENGINE.opened
