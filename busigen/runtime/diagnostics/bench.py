"""``busigen bench``: times ``generate`` as a whole and stage by stage, and predicts a long run."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import busigen
from busigen.errors import UsageError
from busigen.files import TEMPORARY_PREFIX
from busigen.registry import AUTO, ENGINE_TARGETS, LESION_CLASSES, SHARD_SIZE, SYNTHETIC
from busigen.runtime.backends.base import Backend, EngineOptions, Feed, TimedBackend, open_backend, usable_cores
from busigen.runtime.backends.bundle import Bundle, default_bundle
from busigen.runtime.backends.probe import choose, machine, peak_memory, reset_peak_memory
from busigen.runtime.dataset.format import MANIFEST_FILE, MAX_COUNT, SHARD_FOLDER, Plan
from busigen.runtime.diagnostics.bench_report import write
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.signals import GenerationInterrupted
from busigen.runtime.progress import Progress
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from busigen.runtime.storage.files import output_errors

SCHEMA = 1  # version of `bench.json` and of the ledger's lines
WARM_SECONDS = 5.0  # a warm-up that takes no longer has all samples, so that a fast engine has seen every shape
_BUSY = 0.25  # load per core from which on the machine counts as busy with other work


@dataclass(frozen=True)
class Call:
    """One engine call: the graph's name, the rows of its batch, and when it began and ended, in seconds."""

    graph: str
    rows: int
    began: float
    ended: float


class ReplayBackend(TimedBackend):
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

    def replay(self, count: int, progress: Progress) -> float:
        """Seconds that the kept calls, which drew ``count`` samples, take with nothing beside them."""
        # What they took the first time is no measure of that: the thread that writes shards shares their cores.
        seconds, counted = 0.0, 0
        for number, call in enumerate(self.calls, start=1):
            inputs = {name: np.repeat(row, call.rows, axis=0) for name, row in self._row_of[call.graph].items()}
            began = time.perf_counter()
            self.backend.run(call.graph, inputs)
            seconds += time.perf_counter() - began
            if (due := number * count // len(self.calls)) > counted:
                progress.advance(due - counted)
                counted = due
        return seconds


Run = dict[str, Any]
"""One measured run, as it stands in ``bench.json``: ``busy_seconds`` is the time in which at least one engine call ran,
``alone_seconds`` what all take with nothing beside them, ``size`` the bytes of shards and manifest."""


class _Part(Progress):
    """Passes on what one run of many counts, so that all of them have one bar and one remaining time."""

    def __init__(self, whole: Progress) -> None:
        super().__init__()
        self._whole = whole

    def advance(self, samples: int) -> None:
        self._whole.advance(samples)

    def rejected(self, draws: int) -> None:
        self._whole.rejected(draws)


def stage_of(graph: str) -> str:
    """A graph's stage, with the window's side where it works on windows: ``lesion-benign@128`` is ``lesion@128``."""
    component, at, side = graph.partition("@")
    return f"{component.partition('-')[0]}{at}{side}"


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union of spans."""
    total, reached = 0.0, float("-inf")
    for began, ended in sorted(spans):
        total += max(0.0, ended - max(began, reached))
        reached = max(reached, ended)
    return total


def measure(
    samplers: Sequence[tuple[Sampler, ReplayBackend]], plan: Plan, repeat: int, folder: Path, progress: Progress
) -> list[list[Run]]:
    """Runs of each sampler: the same one ``repeat`` times, into temporary folders in ``folder``, after a warm-up."""
    warm = [replace(plan, count=min(plan.count, 2 * sampler.batch_size)) for sampler, _ in samplers]
    # Each run counts twice, because its calls are replayed.
    total = sum(few.count for few in warm) + len(samplers) * repeat * 2 * plan.count
    progress.start("measuring", total, unit="image")
    runs: list[list[Run]] = [[] for _ in samplers]
    # Samplers take turns, so that other work on the machine hits all of them alike.
    for _ in range(repeat):
        for (sampler, backend), few, mine in zip(samplers, warm, runs, strict=True):
            if not mine:
                seconds = _run(sampler, backend, few, folder, progress)["seconds"]
                if seconds / few.count * plan.count <= WARM_SECONDS and few.count < plan.count:
                    _run(sampler, backend, plan, folder, Progress())
            run = _run(sampler, backend, plan, folder, progress)
            mine.append({**run, "alone_seconds": backend.replay(plan.count, progress)})
    return runs


def _run(sampler: Sampler, backend: ReplayBackend, plan: Plan, folder: Path, progress: Progress) -> Run:
    """Generate into a temporary folder in ``folder``; the calls are kept, and not yet replayed."""
    backend.calls.clear()
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
        size = sum(path.stat().st_size for path in (out / MANIFEST_FILE, *(out / SHARD_FOLDER).iterdir()))
    stages: dict[str, dict[str, Any]] = {}
    for call in backend.calls:
        stage = stages.setdefault(stage_of(call.graph), {"calls": 0, "rows": 0, "seconds": 0.0})
        stage["calls"] += 1
        stage["rows"] += call.rows
        stage["seconds"] += call.ended - call.began
    return {
        "seconds": seconds,
        "engine_seconds": sum(call.ended - call.began for call in backend.calls),
        "busy_seconds": covered((call.began, call.ended) for call in backend.calls),
        "alone_seconds": 0.0,
        "draws": plan.count + sum(report.rejected.values()),
        "size": size,
        "peak_memory": peak,
        "stages": stages,
    }


@dataclass(frozen=True)
class Bench:
    """The options of ``busigen bench``, unchecked and as they were typed; its ``--help`` says what they mean."""

    out: Path
    ledger: Path
    bundle: Path | None
    providers: str
    batch_sizes: str
    count: int
    count_for: int
    repeat: int
    healthy: str
    threads: int | None
    allow_fallback: bool = False

    def run(self, progress: Progress) -> dict[str, Any]:
        """Measure, write the results and return them, the content of ``bench.json``; Ctrl-C keeps none.

        There is one entry of ``results`` per provider and batch size: medians, shares from 0 to 1, times in seconds
        unless named ``ms``, sizes in bytes.
        """
        for option, value in (("--count-for", self.count_for), ("--repeat", self.repeat)):
            if not 1 <= value <= MAX_COUNT:
                raise UsageError(f"{option} is {value}.", fix=f"Give a whole number from 1 to {MAX_COUNT}.")
        plan = Plan(count=self.count, seed=0, shard_size=SHARD_SIZE)
        sizes = _listed(self.batch_sizes)
        if wrong := [text for text in sizes if not text.isdecimal()]:
            fix = "Give whole numbers separated by commas: --batch-sizes 4,16."
            raise UsageError(f"--batch-sizes names {wrong[0]!r}.", fix=fix)
        # Ascending, for the sake of the memory that is measured: see summary.
        batch_sizes = sorted({int(text) for text in sizes})
        classes = dict.fromkeys(LESION_CLASSES, 1 / len(LESION_CLASSES))
        bundle = Bundle.open(self.bundle or default_bundle())
        backends = self._backends(bundle, batch_sizes, progress)
        samplers = []
        for (_, size), backend in backends.items():
            recorder = ReplayBackend(backend)
            samplers.append((Sampler(bundle, recorder, classes=classes, batch_size=size), recorder))
        if self.healthy != SYNTHETIC:
            healthy = HealthyFolder(Path(self.healthy), progress)
            for sampler, _ in samplers:
                sampler.plan.healthy = healthy
        _refuse_unwritable(self.out, self.ledger)
        about = machine()
        measured = measure(samplers, plan, self.repeat, self.out, progress)
        results = [
            summary(sampler, self.count, self.count_for, runs)
            for (sampler, _), runs in zip(samplers, measured, strict=True)
        ]
        record = {
            "schema": SCHEMA,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "busigen": busigen.__version__,
            "machine": about,
            "bundle": {"sha256": bundle.sha256, "preset": bundle.info.get("preset")},
            "providers": {backend.name: list(backend.providers) for backend in backends.values()},
            "options": {
                "count": self.count,
                "count_for": self.count_for,
                "repeat": self.repeat,
                "batch_sizes": batch_sizes,
                "threads": self.threads or usable_cores(),
                "backgrounds": SYNTHETIC if self.healthy == SYNTHETIC else "real",
                "shard_size": plan.shard_size,
            },
            "results": results,
            "notes": list(_notes(plan, about, results)),
        }
        write(record, self.out, self.ledger)
        return record

    def _backends(
        self, bundle: Bundle, batch_sizes: Sequence[int], progress: Progress
    ) -> dict[tuple[str, int], Backend]:
        """By name and batch size: one per provider that really runs, as several may come down to the same."""
        # Engines are built for a batch, so their providers have one for each, as a run with that size would.
        opened: dict[tuple[str, int], Backend] = {}
        for name in _listed(self.providers):
            if name == AUTO:
                choice = choose()
                progress.note(f"provider: {choice.provider} ({choice.why})")
                name = choice.provider
            backend: Backend | None = None
            for size in batch_sizes:
                if backend is None or backend.name in ENGINE_TARGETS:
                    options = EngineOptions(self.threads, batch_sizes=(size,))
                    backend = open_backend(bundle, name, options, allow_fallback=self.allow_fallback)
                opened.setdefault((backend.name, size), backend)
        return opened


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _refuse_unwritable(out: Path, ledger: Path) -> None:
    """Find out now, not after the measurement, whether the results can be kept."""
    for folder in (out, ledger.parent):
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with output_errors(out):
        tempfile.TemporaryFile(dir=out).close()
    with output_errors(ledger):
        os.close(os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))


def summary(sampler: Sampler, count: int, count_for: int, runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over the runs of one provider and batch size, what they predict, and the runs themselves."""

    def median(name: str) -> float:
        return float(statistics.median(run[name] for run in runs))

    stages = {}
    for name in dict.fromkeys(name for run in runs for name in run["stages"]):
        found = [run["stages"].get(name, {"calls": 0, "rows": 0, "seconds": 0.0}) for run in runs]
        shares = [stage["seconds"] / run["seconds"] for stage, run in zip(found, runs, strict=True)]
        stages[name] = {
            "ms_per_image": 1000 * statistics.median(stage["seconds"] for stage in found) / count,
            "ms_per_row": 1000 * statistics.median(stage["seconds"] / max(stage["rows"], 1) for stage in found),
            "share": statistics.median(shares),
            "calls": found[0]["calls"],
            "rows": found[0]["rows"],
        }
    seconds, per_image = median("seconds"), median("size") / count
    return {
        "provider": sampler.backend.name,
        "batch_size": sampler.batch_size,
        "images_per_second": count / seconds,
        "engines_alone_images_per_second": count / median("alone_seconds"),
        "ms_per_image": 1000 * seconds / count,
        "engine_ms_per_image": 1000 * median("engine_seconds") / count,
        "idle_share": statistics.median(1 - run["busy_seconds"] / run["seconds"] for run in runs),
        "acceptance": count / median("draws"),
        # Later runs come after those with larger batches, whose memory the engines' arena keeps.
        "peak_memory": runs[0]["peak_memory"],
        "bytes_per_image": per_image,
        "stages": stages,
        "predicted": {"count": count_for, "seconds": count_for * seconds / count, "bytes": count_for * per_image},
        "runs": list(runs),
    }


def _notes(plan: Plan, about: dict[str, Any], results: Sequence[dict[str, Any]]) -> Iterable[str]:
    if about["load"] is not None and about["load"] > _BUSY * about["cores"]:
        yield (
            f"The machine was busy when this began (load {about['load']:.1f} on {about['cores']} cores): the same "
            "without other work is faster."
        )
    if any(result["images_per_second"] > result["engines_alone_images_per_second"] for result in results):
        yield (
            "A pipeline was faster than its engines alone, which is noise: measure on an idle machine, or with a "
            "larger --repeat."
        )
    if plan.shards == 1:
        yield (
            f"All {plan.count} samples fit in one shard, so none was written while another was drawn, and what a run "
            f"does once weighs more: a --count above {plan.shard_size} predicts a long run better."
        )
