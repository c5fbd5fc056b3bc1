"""A finished checkpoint to a bundle: trace, lay out, write, prove; nothing is left behind where a proof fails."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from busigen import __version__
from busigen.errors import BusigenError, IntegrityError, OutputError, UsageError
from busigen.export.bundle_writer import write_graphs
from busigen.export.card import card
from busigen.export.checks import check_finite, check_layout, check_opset, runs
from busigen.export.choosing import Choice, ModelBackend, choose, raised
from busigen.export.components import COMPONENTS, Component, components
from busigen.export.counts import fused
from busigen.export.options import Options
from busigen.export.parity import LIMITS, PARITY_SEED, Reference, failures, refused
from busigen.export.precision import TYPES
from busigen.registry import BACKGROUND_SPECKLE, ENGINE_TARGETS, LESION_CLASSES, PRECISIONS, PROVIDERS, RESOLUTION
from busigen.runtime.atomic import atomic_folder, sha256_of
from busigen.runtime.backend import Backend, EngineOptions, engine_of, open_backend
from busigen.runtime.batches import DEFAULT_BATCH
from busigen.runtime.bundle import RECORD, SCHEMA, Bundle
from busigen.runtime.progress import Progress
from busigen.training.checkpoint import RECORD as CHECKPOINT_RECORD
from busigen.training.checkpoint import load_networks, read_record
from busigen.training.networks import Networks
from busigen.training.state import write_json

log = logging.getLogger("busigen.export")

CARD = "MODEL_CARD.md"


def export(
    checkpoint: Path,
    out: Path,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    last: Callable[[Bundle], object] = lambda bundle: None,
) -> Bundle:
    """Export a checkpoint.

    Args:
        checkpoint: what ``busigen train`` finished.
        out: the bundle's folder; it must not exist, or be empty.
        options: how; the defaults where none are given.
        progress: shows how far it is.
        last: given the finished bundle before it appears at ``out``, where it does not appear if this fails.

    Returns:
        The written bundle.

    Raises:
        UsageError: this machine cannot run, and so not prove, what is asked for.
        InputError: ``checkpoint`` is not finished, not readable, lacks a component, has one too many, has adapters that
            were not merged, or weights that are no numbers.
        IntegrityError: its weights are not those that training recorded.
        OutputError: ``out`` is taken or cannot be written.
        ParityError: the graphs do not reproduce the checkpoint; nothing is left at ``out``.
    """
    options = options or Options()
    check_opset(options.opset)
    providers, unproved = _provers(options.precision), _unproved(options.engines)
    read_record(checkpoint)
    check_layout(checkpoint)
    networks, record = load_networks(checkpoint)
    check_finite(networks)
    with _appearing(out) as folder:
        exporter = _Exporter(folder, networks, options, providers, unproved, progress or Progress())
        info = exporter.run(_info(networks, record, checkpoint, options))
        (folder / CARD).write_text(card(record, info), encoding="utf-8")
        write_json(folder / RECORD, info)
        last(Bundle.open(folder))
    return Bundle.open(out)


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder that becomes ``out`` where all goes well, and is removed where it does not."""
    try:
        with atomic_folder(out) as folder:
            yield folder
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}.", fix="Use a folder that you may write to."
        ) from error


def _provers(precision: str) -> list[str]:
    """ONNX Runtime's providers of this machine that can run graphs of a precision.

    Raises:
        UsageError: there is none, so that nothing could be proved.
    """
    reasons = {
        name: runs(provider.onnxruntime, precision) for name, provider in PROVIDERS.items() if provider.onnxruntime
    }
    able = [name for name, reason in reasons.items() if not reason]
    if not able:
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UsageError(
            f"--precision {precision} cannot be proved on this machine, so it is not exported ({told}).",
            fix="Export on a machine with an NVIDIA GPU, or with another --precision.",
        )
    return able


def _unproved(asked: Sequence[str]) -> dict[str, str]:
    """Engine targets that the bundle will not be compared on, each with the reason."""
    found = {}
    for name in ENGINE_TARGETS:
        if name not in asked:
            found[name] = "it was not asked for with --target"
            continue
        try:
            engine_of(PROVIDERS[name]).probe(PROVIDERS[name])
        except BusigenError as error:
            # Its engines may still be built here, for cards elsewhere.
            found[name] = error.problem.removeprefix(f"--provider {name}: ").rstrip(".")
    return found


class _Exporter:
    """One export in its folder."""

    def __init__(
        self,
        folder: Path,
        networks: Networks,
        options: Options,
        providers: Sequence[str],
        unproved: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.folder, self.networks, self.options = folder, networks, options
        self.providers, self.unproved, self.progress = providers, unproved, progress
        self.choices: dict[str, Choice] = {}
        self.graphs: dict[str, dict[str, Any]] = {}

    def run(self, info: dict[str, Any]) -> dict[str, Any]:
        """Fill the folder and return the record with all that was found."""
        with self.progress:
            self.progress.start("drawing with PyTorch", len(LESION_CLASSES) * self.options.draws, unit="draw")
            self.reference = Reference(
                self.networks, Bundle(self.folder, info, ""), draws=self.options.draws, progress=self.progress
            )
            self.progress.start("tracing", len(COMPONENTS), unit="component")
            for component in components(self.networks, opset=self.options.opset, loop=self.options.loop):
                self._lay_out(component)
                self.progress.advance(1)
            parity = self._prove(info)
        first = next(iter(parity.values()))
        return self._record(info) | {
            "fused": {name: fused(self.folder / graph["file"]) for name, graph in self._runnable()},
            "parity": {
                "seed": PARITY_SEED,
                "draws": self.options.draws,
                "thresholds": {name: limit.value for name, limit in LIMITS.items()},
                **first,
                "targets": parity,
                "unproved": dict(self.unproved),
            },
        }

    def _lay_out(self, component: Component) -> None:
        started = time.monotonic()
        self._take(choose(component, self.options.precision, self.reference.asked))
        log.info(
            "%s: %d graph(s) in %s written in %.1f s",
            component.name,
            len(component.parts),
            self.choices[component.name].precision,
            time.monotonic() - started,
        )

    def _take(self, choice: Choice) -> None:
        name = choice.component.name
        for graph in choice.graphs:
            for file in self.graphs.pop(graph, {"files": {}})["files"]:
                (self.folder / file).unlink(missing_ok=True)
        self.choices[name] = choice
        for graph, written in write_graphs(self.folder, name, choice.graphs).items():
            self.graphs[graph] = {**written, "precision": choice.precision}

    def _record(self, info: Mapping[str, Any]) -> dict[str, Any]:
        tried = {
            name: {"precision": choice.precision, "tried": [attempt.to_dict() for attempt in choice.tried]}
            for name, choice in self.choices.items()
        }
        return {**info, "graphs": self.graphs, "components": tried}

    def _prove(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Compare every target over the whole trajectory, with ever more components in fp32 until all hold."""
        while True:
            write_json(self.folder / RECORD, self._record(info))
            bundle = Bundle.open(self.folder)
            found: dict[str, Any] = {}
            missed: list[str] = []
            for target, backend in self._targets(bundle):
                # Each draw twice: with its own outline, and with PyTorch's.
                total = 2 * len(LESION_CLASSES) * self.options.draws
                self.progress.start(f"comparing on {target}", total, unit="draw")
                try:
                    found[target] = self.reference.compare(bundle, backend)
                    missed = failures(found[target])
                except IntegrityError as error:  # NaN or infinity, which a lower precision may be the cause of.
                    missed = [error.problem]
                if missed:
                    break
            else:
                return found
            lowest = [choice for choice in self.choices.values() if PRECISIONS[choice.precision].above]
            if not lowest:
                raise refused(target, missed)
            worst = max(lowest, key=lambda choice: choice.tried[-1].error)
            self._take(raised(worst, f"over the whole trajectory, {target}: {missed[0]}", self.reference.asked))

    def _targets(self, bundle: Bundle) -> Iterator[tuple[str, Backend]]:
        """What the bundle is proved on, by name, each opened when its turn comes."""
        for provider in self.providers:
            yield provider, open_backend(bundle, provider)
        if any(choice.precision in TYPES for choice in self.choices.values()):
            rounded = {name: graph for choice in self.choices.values() for name, graph in choice.rounded.items()}
            yield ModelBackend.name, ModelBackend(rounded)
        # Last, because engines take minutes to build. Those of what holds are in the cache when they are asked for.
        sizes = tuple(sorted(self.options.batch_sizes, reverse=True)) or (DEFAULT_BATCH,)
        for name in ENGINE_TARGETS:
            if name not in self.unproved:
                yield name, open_backend(bundle, name, EngineOptions(batch_sizes=sizes))

    def _runnable(self) -> list[tuple[str, dict[str, Any]]]:
        """Graphs whose fused nodes the CPU provider can count."""
        return [(name, graph) for name, graph in self.graphs.items() if graph["precision"] != "bf16"]


def _info(networks: Networks, record: Mapping[str, Any], checkpoint: Path, options: Options) -> dict[str, Any]:
    """What a bundle's record says before any graph is written."""
    return {
        "schema": SCHEMA,
        "preset": record["preset"],
        "classes": list(LESION_CLASSES),
        "latent_channels": networks.preset.latent_channels,
        "code_length": networks.denoiser("mask", LESION_CLASSES[0]).length,
        "patch": networks.preset.patch,
        "frames": record.get("frames", [[RESOLUTION, RESOLUTION]]),
        "styles": record.get("styles", []),
        "background_speckle": BACKGROUND_SPECKLE,
        "transfer": record.get("transfer"),
        "solver_steps": dict(networks.steps),
        "split_hash": record["data"]["split_hash"],
        "checkpoint": sha256_of(checkpoint / CHECKPOINT_RECORD),
        "training": {key: record[key] for key in ("recipe", "data", "tasks", "device")},
        "target": options.target,
        "precision": options.precision,
        "opset": options.opset,
        "loop": options.loop,
        "batch_sizes": list(options.batch_sizes),
        "versions": {
            **record["versions"],
            "busigen": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
