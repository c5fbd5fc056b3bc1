"""The precision of each component: the wanted one where it holds, the next higher one where it does not."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from busigen.export.components import Component, Graphs
from busigen.export.int8 import QUANTISED, quantised
from busigen.export.parity import refused
from busigen.export.precision import TYPES
from busigen.export.reference import Asked
from busigen.export.similarity import pixels_off, relative_error
from busigen.registry import PRECISIONS
from busigen.runtime.backend import usable_cores

log = logging.getLogger("busigen.export")

ERROR_LIMIT = 0.02
"""Largest error of a component's output, relative to the output's own size: four of these in a row (encoder, lesion,
blend, decoder), independent of each other, are 4 %, and 35 dB of an image whose values deviate by 0.35 are 10 %."""

PIXEL_LIMIT = 0.5
"""Largest error of stage 1's distances near the outline, in pixels: no pixel's centre is passed by a whole pixel."""

_TIMED_CALLS = 7


@dataclass(frozen=True)
class Tried:
    """One precision that was tried: the error as a multiple of its limit, and why it was not taken (empty: it was)."""

    precision: str
    error: float
    refused: str

    def to_dict(self) -> dict[str, Any]:
        """For a record; an error that is no number is ``None``, because JSON has none."""
        return {
            "precision": self.precision,
            "error": round(self.error, 4) if np.isfinite(self.error) else None,
            "refused": self.refused,
        }


@dataclass
class Choice:
    """A component's precision, its graphs, and what was tried."""

    component: Component
    precision: str
    graphs: Graphs
    tried: list[Tried] = field(default_factory=list)

    @property
    def rounded(self) -> Graphs:
        """The graphs for a processor without half precision."""
        if self.precision not in TYPES:
            return self.graphs
        return self.component.graphs(self.precision, rounded=True)


class ModelBackend:
    """Graphs in memory behind the runtime's interface."""

    name = "emulated"
    version = str(ort.__version__)

    def __init__(self, graphs: Mapping[str, ModelProto]) -> None:
        self._graphs = graphs
        self._sessions: dict[str, ort.InferenceSession] = {}

    def run(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        """See :class:`busigen.runtime.backend.Backend`."""
        if graph not in self._sessions:
            options = ort.SessionOptions()
            options.intra_op_num_threads = usable_cores()
            options.log_severity_level = 4
            model = self._graphs[graph].SerializeToString()
            self._sessions[graph] = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        wanted = {value.name for value in self._sessions[graph].get_inputs()}
        (output,) = self._sessions[graph].run(None, {name: inputs[name] for name in wanted})
        return np.asarray(output, dtype=np.float32)


def choose(component: Component, wanted: str, asked: Mapping[str, Sequence[Asked]]) -> Choice:
    """Lay a component out in the wanted precision, or in the next higher one that reproduces the checkpoint.

    Args:
        component: as traced.
        wanted: a name in ``registry.PRECISIONS``.
        asked: what each graph is asked and what PyTorch answers.

    Raises:
        ParityError: not even fp32 reproduces it.
    """
    tried: list[Tried] = []
    precision = wanted if wanted != "int8" or component.name in QUANTISED else PRECISIONS[wanted].above
    while precision:
        graphs, error, reason = _attempt(component, precision, asked)
        tried.append(Tried(precision, error, reason))
        if not reason:
            return Choice(component, precision, graphs, tried)
        _fall_back(component.name, tried)
        precision = PRECISIONS[precision].above
    raise refused(component.name, [f"{attempt.precision}: {attempt.refused}" for attempt in tried])


def raised(choice: Choice, reason: str, asked: Mapping[str, Sequence[Asked]]) -> Choice:
    """A component's choice once more, above the precision that failed for ``reason`` over the whole trajectory."""
    last = choice.tried[-1]
    tried = [*choice.tried[:-1], Tried(last.precision, last.error, reason)]
    _fall_back(choice.component.name, tried)
    again = choose(choice.component, PRECISIONS[choice.precision].above, asked)
    return Choice(again.component, again.precision, again.graphs, [*tried, *again.tried])


def _fall_back(component: str, tried: Sequence[Tried]) -> None:
    last = tried[-1]
    if above := PRECISIONS[last.precision].above:
        log.warning("%s: %s fails (%s); %s is tried", component, last.precision, last.refused, above)


def _attempt(component: Component, precision: str, asked: Mapping[str, Sequence[Asked]]) -> tuple[Graphs, float, str]:
    """The graphs, their error as a multiple of its limit, and why they cannot be taken."""
    whole = component.graphs("fp32" if precision == "int8" else precision)
    graphs = quantised(whole, asked) if precision == "int8" else whole
    proved = component.graphs(precision, rounded=True) if precision in TYPES else graphs
    backend = ModelBackend(proved)
    try:
        errors = {graph: _error(component.name, backend, graph, asked.get(graph, ())) for graph in proved}
    except Exception as problem:  # ONNX Runtime's exceptions share no public base class
        return graphs, float("inf"), f"cannot be run: {str(problem).splitlines()[0][:200]}"
    worst = max(errors, key=lambda graph: errors[graph])
    error = errors[worst]
    if not error <= 1.0:
        found = f"has {error:.3g} times the error allowed" if np.isfinite(error) else "yields NaN or infinity"
        found = found if asked.get(worst) else "was never asked in the draws: compare more of them"
        return graphs, error, f"{worst} {found}"
    if precision == "int8":
        slower = _slower(backend, ModelBackend(whole), asked)
        if slower >= 1.0:
            return graphs, error, f"it does not pay: {slower:.2f} times the time of fp32"
    return graphs, error, ""


def _error(component: str, backend: ModelBackend, graph: str, asked: Sequence[Asked]) -> float:
    measure, limit = (pixels_off, PIXEL_LIMIT) if component == "mask" else (relative_error, ERROR_LIMIT)
    return max((measure(backend.run(graph, call.inputs), call.output) / limit for call in asked), default=float("inf"))


def _slower(quick: ModelBackend, whole: ModelBackend, asked: Mapping[str, Sequence[Asked]]) -> float:
    """Time of one set of graphs as a multiple of the other's, taken in turns."""
    calls = [(graph, call.inputs) for graph in QUANTISED for call in asked.get(graph, ())]
    seconds: dict[str, list[float]] = {"quick": [], "whole": []}
    for turn in range(_TIMED_CALLS + 1):
        for name, backend in (("quick", quick), ("whole", whole)):
            started = time.perf_counter()
            for graph, inputs in calls:
                backend.run(graph, inputs)
            # The first turn opens sessions and takes memory.
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return statistics.median(seconds["quick"]) / statistics.median(seconds["whole"])
