"""One run of the factory, timed call by call: the backend is wrapped in one that notes when each call begins and ends.

Nothing else differs from a run of ``busigen generate`` into a folder that is thrown away afterwards.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from busigen.runtime.atomic import TEMPORARY_PREFIX
from busigen.runtime.backend import Backend, Feed
from busigen.runtime.factory import GenerateReport, generate
from busigen.runtime.layout import MANIFEST_FILE, SHARD_FOLDER, Plan
from busigen.runtime.machine import peak_memory, reset_peak_memory
from busigen.runtime.progress import Progress
from busigen.runtime.sampler import Sampler
from busigen.runtime.stage_times import TimedBackend
from busigen.runtime.stopping import GenerationInterrupted

WARM_SECONDS = 5.0
"""A warm-up takes all samples where that takes no longer than this, so that a fast engine has seen every shape."""


@dataclass(frozen=True)
class Call:
    """One engine call: the graph's name, the rows of its batch, and when it began and ended, in seconds."""

    graph: str
    rows: int
    began: float
    ended: float


class CallRecorder(TimedBackend):
    """A timed backend that keeps every call, so that all of them can be made again."""

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self.calls: list[Call] = []
        self._row_of: dict[str, dict[str, NDArray[Any]]] = {}

    def called(self, graph: str, inputs: Feed, output: Any, began: float, ended: float) -> None:
        """Keep the call."""
        self.calls.append(Call(graph, len(output), began, ended))
        if graph not in self._row_of:
            # One row, not the batch: what is kept must not show in the memory that is measured.
            self._row_of[graph] = {name: np.asarray(array)[-1:].copy() for name, array in inputs.items()}

    def alone(self, done: Callable[[float], None] = lambda share: None) -> float:
        """Seconds that the noted calls take when they are made again, in their order, with nothing beside them.

        What they took the first time is no measure of that: the thread that writes shards shares their cores.
        ``done`` is told after each call which share of them has been made, 0 to 1.
        """
        seconds = 0.0
        for number, call in enumerate(self.calls, start=1):
            inputs = {name: np.repeat(row, call.rows, axis=0) for name, row in self._row_of[call.graph].items()}
            began = time.perf_counter()
            self.backend.run(call.graph, inputs)
            seconds += time.perf_counter() - began
            done(number / len(self.calls))
        return seconds


@dataclass(frozen=True)
class Stage:
    """All engine calls of one stage in a run: how many, the rows of their batches, and the seconds they took."""

    calls: int
    rows: int
    seconds: float


@dataclass(frozen=True)
class Run:
    """One measured run.

    Attributes:
        seconds: wall-clock time of ``generate``, from an empty folder to a finished dataset.
        engine_seconds: sum over all engine calls, which is the sum over ``stages``.
        busy_seconds: time in which at least one engine call ran.
        alone_seconds: what the same engine calls take with nothing beside them.
        draws: accepted and refused.
        size: bytes of shards and manifest.
        peak_memory: most bytes of memory held during the run; ``None`` where the system does not tell.
        stages: by name (:func:`stage_of`), in the order in which they first ran.
    """

    seconds: float
    engine_seconds: float
    busy_seconds: float
    alone_seconds: float
    draws: int
    size: int
    peak_memory: int | None
    stages: dict[str, Stage]


def measure(samplers: Sequence[Sampler], plan: Plan, repeat: int, folder: Path, progress: Progress) -> list[list[Run]]:
    """Make the same run ``repeat`` times per sampler, each into a temporary folder in ``folder``, engines warmed up.

    Samplers take turns, so that other work on the machine hits all of them alike.

    Args:
        samplers: each on a :class:`CallRecorder` of its own.
        plan: of every run.
        repeat: runs per sampler.
        folder: where the temporary folders are made.
        progress: told of every sample of :func:`samples_to_make`.

    Returns:
        The runs of each sampler, in their order.
    """
    runs: list[list[Run]] = [[] for _ in samplers]
    for _ in range(repeat):
        for sampler, mine in zip(samplers, runs, strict=True):
            if not mine:
                _warm_up(sampler, plan, folder, progress)
            mine.append(_run(sampler, plan, folder, progress))
    return runs


def samples_to_make(sampler: Sampler, plan: Plan, repeat: int) -> int:
    """Samples that :func:`measure` counts: the warm-up's, and each run's twice, because its calls are replayed."""
    return _warm_count(sampler, plan) + repeat * 2 * plan.count


def stage_of(graph: str) -> str:
    """A graph's stage, with the window's side where it works on windows: ``lesion-benign@128`` is ``lesion@128``."""
    component, at, side = graph.partition("@")
    return f"{component.partition('-')[0]}{at}{side}"


def _warm_count(sampler: Sampler, plan: Plan) -> int:
    return min(plan.count, 2 * sampler.batch_size)


def _warm_up(sampler: Sampler, plan: Plan, folder: Path, progress: Progress) -> None:
    warm = Plan(count=_warm_count(sampler, plan), seed=plan.seed, shard_size=plan.shard_size)
    seconds = _generate(sampler, warm, folder, progress).seconds
    if seconds / warm.count * plan.count <= WARM_SECONDS and warm.count < plan.count:
        _generate(sampler, plan, folder, Progress())


class _Part(Progress):
    """Passes on what one run of many counts, so that all of them have one bar and one remaining time."""

    def __init__(self, whole: Progress) -> None:
        super().__init__()
        self._whole = whole

    def advance(self, samples: int) -> None:
        self._whole.advance(samples)

    def rejected(self, draws: int) -> None:
        self._whole.rejected(draws)


@dataclass(frozen=True)
class _Made:
    """One call of ``generate``: its report, and what :class:`Run` says of the whole."""

    report: GenerateReport
    seconds: float
    size: int
    peak_memory: int | None


def _generate(sampler: Sampler, plan: Plan, folder: Path, progress: Progress) -> _Made:
    with tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=folder) as temporary:
        out = Path(temporary) / "dataset"
        reset_peak_memory()
        began = time.perf_counter()
        try:
            report = generate(
                sampler, out, count=plan.count, seed=plan.seed, shard_size=plan.shard_size, progress=_Part(progress)
            )
        except GenerationInterrupted as error:
            # Its advice is to continue in a folder that is about to be removed.
            raise KeyboardInterrupt from error
        seconds, peak = time.perf_counter() - began, peak_memory()
        files = [out / MANIFEST_FILE, *(out / SHARD_FOLDER).iterdir()]
        return _Made(report, seconds, sum(path.stat().st_size for path in files), peak)


def _run(sampler: Sampler, plan: Plan, folder: Path, progress: Progress) -> Run:
    backend = sampler.backend
    assert isinstance(backend, CallRecorder)
    backend.calls.clear()
    made = _generate(sampler, plan, folder, progress)
    told = 0

    def replayed(share: float) -> None:
        nonlocal told
        whole = int(share * plan.count)
        if whole > told:
            progress.advance(whole - told)
            told = whole

    stages: dict[str, list[Call]] = {}
    for call in backend.calls:
        stages.setdefault(stage_of(call.graph), []).append(call)
    return Run(
        seconds=made.seconds,
        engine_seconds=sum(call.ended - call.began for call in backend.calls),
        busy_seconds=covered((call.began, call.ended) for call in backend.calls),
        alone_seconds=backend.alone(replayed),
        draws=plan.count + sum(made.report.rejected.values()),
        size=made.size,
        peak_memory=made.peak_memory,
        stages={
            name: Stage(len(calls), sum(call.rows for call in calls), sum(call.ended - call.began for call in calls))
            for name, calls in stages.items()
        },
    )


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total
