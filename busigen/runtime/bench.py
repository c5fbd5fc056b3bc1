"""``busigen bench``: where a run's time goes, measured through the sampler and the factory that ``generate`` uses."""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import busigen
from busigen.errors import UsageError
from busigen.registry import AUTO, ENGINE_TARGETS, LESION_CLASSES, SYNTHETIC
from busigen.runtime.atomic import output_errors
from busigen.runtime.backend import EngineOptions, OpenedBackend, open_backend, usable_cores
from busigen.runtime.bench_report import write
from busigen.runtime.bundle import Bundle, default_bundle
from busigen.runtime.healthy import HealthyFolder
from busigen.runtime.layout import DEFAULT_SHARD_SIZE, MAX_COUNT, Plan
from busigen.runtime.machine import machine
from busigen.runtime.probing import choose
from busigen.runtime.progress import Progress
from busigen.runtime.sampler import Sampler
from busigen.runtime.timing import CallRecorder, Run, Stage, measure, samples_to_make

SCHEMA = 1
"""Version of ``bench.json`` and of the ledger's lines."""

_BUSY = 0.25
"""Load per core from which on the machine counts as busy with other work."""


@dataclass(frozen=True)
class Bench:
    """The options of ``busigen bench``, unchecked and as they were typed.

    Attributes:
        out: folder for what is written; runs go into a temporary folder in it, so that it is this disk that counts.
        ledger: file that a line is appended to.
        bundle: a bundle's folder; ``None`` for the shipped one.
        providers: names in ``registry.PROVIDERS`` or ``auto``, separated by commas.
        batch_sizes: images per engine call, separated by commas.
        count: accepted samples per run.
        count_for: number of samples to predict time and size for.
        repeat: runs per provider and batch size.
        healthy: a folder of healthy images, or ``synthetic``.
        threads: compute threads; ``None`` for one per core.
        allow_fallback: where a provider cannot be used, measure the processor.
    """

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
        """Measure, and write the results.

        Returns:
            The content of ``bench.json``: date, machine, bundle, options, one entry of ``results`` per provider and
            batch size (medians, shares from 0 to 1, times in seconds unless named ``ms``, sizes in bytes), ``notes``.

        Raises:
            UsageError: an option's value is out of range, or a provider cannot be used here.
            InputError: the bundle or the healthy images cannot be used.
            IntegrityError: a file of the bundle is not the one that was exported.
            OutputError: ``out`` or the ledger cannot be written.
            AcceptanceError: the gates refuse too much.
            KeyboardInterrupt: on Ctrl-C; no result is kept.
        """
        for option, value in (("--count-for", self.count_for), ("--repeat", self.repeat)):
            if not 1 <= value <= MAX_COUNT:
                raise UsageError(f"{option} is {value}.", fix=f"Give a whole number from 1 to {MAX_COUNT}.")
        plan = Plan(count=self.count, seed=0, shard_size=DEFAULT_SHARD_SIZE)
        # Ascending, for the sake of the memory that is measured: see summary.
        batch_sizes = sorted({_whole_number("--batch-sizes", text) for text in _listed(self.batch_sizes)})
        classes = dict.fromkeys(LESION_CLASSES, 1 / len(LESION_CLASSES))
        bundle = Bundle.open(self.bundle or default_bundle())
        backends = self._backends(bundle, batch_sizes, progress)
        samplers = [
            Sampler(bundle, CallRecorder(backend), classes=classes, batch_size=size)
            for (_, size), backend in backends.items()
        ]
        if self.healthy != SYNTHETIC:
            healthy = HealthyFolder(Path(self.healthy), progress)
            for sampler in samplers:
                sampler.healthy = healthy
        _writable(self.out, self.ledger)
        about = machine()
        progress.start("measuring", sum(samples_to_make(s, plan, self.repeat) for s in samplers), unit="image")
        measured = measure(samplers, plan, self.repeat, self.out, progress)
        results = [
            summary(sampler, self.count, self.count_for, runs) for sampler, runs in zip(samplers, measured, strict=True)
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
    ) -> dict[tuple[str, int], OpenedBackend]:
        """By name and batch size: one per provider that really runs, as several may come down to the same.

        Engines are built for a batch, so their providers have one for each, as a run with that ``--batch-size`` would.
        """
        opened: dict[tuple[str, int], OpenedBackend] = {}
        for name in _listed(self.providers):
            if name == AUTO:
                choice = choose()
                progress.note(f"provider: {choice.provider} ({choice.why})")
                name = choice.provider
            backend: OpenedBackend | None = None
            for size in batch_sizes:
                if backend is None or backend.name in ENGINE_TARGETS:
                    options = EngineOptions(self.threads, batch_sizes=(size,))
                    backend = open_backend(bundle, name, options, allow_fallback=self.allow_fallback)
                opened.setdefault((backend.name, size), backend)
        return opened


def summary(sampler: Sampler, count: int, count_for: int, runs: Sequence[Run]) -> dict[str, Any]:
    """Medians over the runs of one provider and batch size, what they predict, and the runs themselves."""
    seconds = statistics.median(run.seconds for run in runs)
    per_image = statistics.median(run.size for run in runs) / count
    return {
        "provider": sampler.backend.name,
        "batch_size": sampler.batch_size,
        "images_per_second": count / seconds,
        "engines_alone_images_per_second": count / statistics.median(run.alone_seconds for run in runs),
        "ms_per_image": 1000 * seconds / count,
        "engine_ms_per_image": 1000 * statistics.median(run.engine_seconds for run in runs) / count,
        "idle_share": statistics.median(1 - run.busy_seconds / run.seconds for run in runs),
        "acceptance": count / statistics.median(run.draws for run in runs),
        # Later runs come after those with larger batches, whose memory the engines' arena keeps.
        "peak_memory": runs[0].peak_memory,
        "bytes_per_image": per_image,
        "stages": {name: _stage_medians(name, count, runs) for name in _names(runs)},
        "predicted": {"count": count_for, "seconds": count_for * seconds / count, "bytes": count_for * per_image},
        "runs": [asdict(run) for run in runs],
    }


def _stage_medians(name: str, count: int, runs: Sequence[Run]) -> dict[str, float | int]:
    found = [(run, run.stages.get(name, Stage(0, 0, 0.0))) for run in runs]
    return {
        "ms_per_image": 1000 * statistics.median(stage.seconds for _, stage in found) / count,
        "ms_per_row": 1000 * statistics.median(stage.seconds / max(stage.rows, 1) for _, stage in found),
        "share": statistics.median(stage.seconds / run.seconds for run, stage in found),
        "calls": found[0][1].calls,
        "rows": found[0][1].rows,
    }


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(name for run in runs for name in run.stages))


def _listed(text: str) -> list[str]:
    """Entries of a comma-separated option, each once."""
    return list(dict.fromkeys(part.strip() for part in text.split(",")))


def _whole_number(option: str, text: str) -> int:
    if not text.isdecimal():
        raise UsageError(f"{option} names {text!r}.", fix=f"Give whole numbers separated by commas: {option} 4,16.")
    return int(text)


def _writable(out: Path, ledger: Path) -> None:
    """Find out now, not after the measurement, whether the results can be kept."""
    for folder in (out, ledger.parent):
        with output_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with output_errors(out):
        tempfile.TemporaryFile(dir=out).close()
    with output_errors(ledger):
        os.close(os.open(ledger, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644))


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
