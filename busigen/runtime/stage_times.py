"""Where an engine's time goes: seconds per stage, over whatever backend runs the graphs."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.runtime.backend import Backend, Feed, resident


class TimedBackend:
    """A :class:`busigen.runtime.backend.Backend` that runs another one and keeps count of the time.

    A graph's first call includes what loading it takes. It takes as many calls at once as the backend that it wraps.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend, self.name, self.version = backend, backend.name, backend.version
        self.lanes: int = getattr(backend, "lanes", 1)
        self._resident = resident(backend)
        self._seconds: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backend.Backend`."""
        output: NDArray[np.float32] = self._timed(self.backend.run, graph, inputs)
        return output

    def keep(self, graph: str, inputs: Feed) -> Any:
        """See :class:`busigen.runtime.backend.Resident`."""
        return self._timed(self._resident.keep, graph, inputs)

    def select(self, where: NDArray[np.bool_], chosen: Any, other: Any) -> Any:
        """See :class:`busigen.runtime.backend.Resident`."""
        return self._resident.select(where, chosen, other)

    def _timed(self, run: Callable[[str, Feed], Any], graph: str, inputs: Feed) -> Any:
        began = time.perf_counter()
        output = run(graph, inputs)
        self.called(graph, inputs, output, began, time.perf_counter())
        return output

    def called(self, graph: str, inputs: Feed, output: Any, began: float, ended: float) -> None:
        """Take note of a call that ended; may come from any thread."""
        with self._lock:
            # Counter's type knows whole numbers only; its arithmetic takes seconds just as well.
            self._seconds[stage_of(graph)] += ended - began  # type: ignore[assignment]

    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far, the longest first."""
        with self._lock:
            return dict(self._seconds.most_common())


def stage_of(graph: str) -> str:
    """A graph's stage, over all classes and window sizes: ``lesion`` for ``lesion-benign@128``."""
    return graph.partition("@")[0].partition("-")[0]
