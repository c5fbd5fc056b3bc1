"""A checkpoint to a bundle: what may be asked for, what a checkpoint must hold, and the export itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from diffusers import ModelMixin

from busigen import __version__
from busigen.errors import BusigenError, InputError, IntegrityError, OutputError, UsageError
from busigen.export.bundle_writer import write_graphs
from busigen.export.components import COMPONENTS, components
from busigen.export.graph_rewrites import TYPES
from busigen.export.parity import LIMITS, PARITY_SEED, Reference, failures, refused
from busigen.export.precision_search import Choice, GraphsBackend, check_opset, choose, escalate, runs, scratch
from busigen.export.report import fused, model_card
from busigen.export.weights import WeightFiles, emptied
from busigen.files import sha256_of
from busigen.foreign import open_file
from busigen.records import parse_json
from busigen.registry import (
    BACKGROUND_SPECKLE,
    DEFAULT_BATCH,
    ENGINE_TARGETS,
    LESION_CLASSES,
    LOOPS,
    OPSETS,
    PARITY_DRAWS,
    PRECISIONS,
    PROVIDERS,
    RESOLUTION,
    STAGES,
)
from busigen.runtime.backends.base import Backend, EngineOptions, engine_of, open_backend
from busigen.runtime.backends.bundle import RECORD, SCHEMA, Bundle
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import atomic_folder
from busigen.training import trainer
from busigen.training.checkpoint import ADAPTERS, BASE, MERGED, load_networks, read_record
from busigen.training.checkpoint import RECORD as CHECKPOINT_RECORD
from busigen.training.networks.inference import Networks
from busigen.training.trainer import write_json

TARGETS = ("onnx",)
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Options:
    """How a checkpoint is exported.

    Attributes:
        target: a name in ``TARGETS``.
        precision: a name in ``registry.PRECISIONS``; components that fail in it get the next higher one.
        opset: one of ``registry.OPSETS``.
        loop: a name in ``registry.LOOPS``.
        batch_sizes: batches, 1 to ``LARGEST_BATCH``, that the bundle is made for: engines with static shapes are built
            for these. The ONNX graphs take any batch.
        draws: draws per class over which every target is compared with PyTorch.
        engines: names in ``registry.ENGINE_TARGETS``, on which the bundle is proved, too, where this machine can.

    Raises:
        UsageError: a value is not one of these.
    """

    target: str = "onnx"
    precision: str = next(iter(PRECISIONS))
    opset: int = OPSETS[0]
    loop: str = next(iter(LOOPS))
    batch_sizes: tuple[int, ...] = ()
    draws: int = PARITY_DRAWS
    engines: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        for name, allowed in (
            ("target", TARGETS),
            ("precision", tuple(PRECISIONS)),
            ("opset", OPSETS),
            ("loop", tuple(LOOPS)),
        ):
            value = getattr(self, name)
            if value not in allowed:
                raise UsageError(f"unknown {name} {value!r}.", fix=f"Choose one of: {', '.join(map(str, allowed))}.")
        for name in self.engines:
            if name not in ENGINE_TARGETS:
                raise UsageError(f"unknown target {name!r}.", fix=f"Choose from: onnx, {', '.join(ENGINE_TARGETS)}.")
        for size in self.batch_sizes:
            if not 1 <= size <= LARGEST_BATCH:
                raise UsageError(f"--batch-size {size}.", fix=f"Give whole numbers from 1 to {LARGEST_BATCH}.")
        if self.draws < 1:
            raise UsageError(f"--draws is {self.draws}.", fix="Give 1 or more.")


def batch_sizes(text: str | None) -> tuple[int, ...]:
    """Batches as a person lists them, ``4,16``; none where nothing is said.

    Raises:
        UsageError: a part is no whole number.
    """
    parts = [part.strip() for part in (text or "").split(",")] if text is not None else []
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise UsageError(f"--batch-size {text!r} holds {part!r}.", fix="Give whole numbers, such as 4,16.")
    return tuple(dict.fromkeys(map(int, parts)))


_TRAIN = "Run 'busigen train' to its end, or take the checkpoint that it wrote as it is."

_MERGED = tuple(f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES)
_EXPECTED = {
    BASE: ("autoencoder", "context", "prior", *STAGES),
    ADAPTERS: _MERGED,
    MERGED: _MERGED,
}
_NEEDED = {BASE: ("autoencoder", "context", "prior"), MERGED: _MERGED}
"""What is exported; the stages' bases and adapters are in what was merged."""

_MAX_HEADER_BYTES = 16 << 20
"""Largest header of a safetensors file that is read; it takes some 100 bytes for each weight."""


def check_layout(checkpoint: Path) -> None:
    """Refuse a checkpoint that lacks a component, has one too many, or has adapters that were not merged.

    Raises:
        InputError: the message names the folder.
    """
    for place, needed in _NEEDED.items():
        for name in needed:
            if not (checkpoint / place / name / "config.json").is_file():
                unmerged = place == MERGED and (checkpoint / ADAPTERS / name).is_dir()
                problem = "has an adapter that was not merged" if unmerged else "is missing"
                raise InputError(f"{checkpoint / place / name} {problem}.", fix=_TRAIN)
    for place, expected in _EXPECTED.items():
        found = sorted(path.name for path in (checkpoint / place).glob("*") if path.is_dir())
        for name in found:
            if name not in expected:
                raise InputError(
                    f"{checkpoint / place / name} is no component; known: {', '.join(expected)}.",
                    fix="Move it out of the checkpoint.",
                )
    for path in sorted(checkpoint.glob(f"{MERGED}/*/*.safetensors")):
        adapted = next((name for name in _names(path) if "lora_" in name), None)
        if adapted is not None:
            raise InputError(f"{path} holds an adapter that was not merged: {adapted}.", fix=_TRAIN)


def _names(weights: Path) -> list[str]:
    """The names in a safetensors file: its header is JSON, after eight bytes that say how long it is."""
    try:
        with open_file(weights) as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError("its header is too long")
            return list(parse_json(stream.read(length), "the header"))
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{weights} is no safetensors file.", fix=_TRAIN) from error


def check_finite(networks: Networks) -> None:
    """Refuse weights that are no numbers: every image would be NaN, or refused by a gate that says nothing of why.

    Raises:
        InputError: names component and weight.
    """
    for component, module in _modules(networks).items():
        trainer.check_finite(component, module)
    for name in ("latents_mean", "latents_std"):
        value = getattr(networks, name)
        if not bool(torch.isfinite(value).all()) or (name == "latents_std" and not bool((value > 0).all())):
            raise InputError(f"the checkpoint's {name} is {value.tolist()}.", fix=_TRAIN)


def _modules(networks: Networks) -> dict[str, ModelMixin]:
    """Every trained network of a checkpoint, by the name of the folder that it is saved in."""
    assert networks.context is not None
    return {"autoencoder": networks.autoencoder, "context": networks.context, **networks.denoisers}


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
        exporter = _Exporter(folder, checkpoint, networks, options, providers, unproved, progress or Progress())
        info = exporter.run(_info(networks, record, checkpoint, options))
        (folder / CARD).write_text(model_card(record, info), encoding="utf-8")
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
        described = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise UsageError(
            f"--precision {precision} cannot be proved on this machine, so it is not exported ({described}).",
            fix="Export on a machine with an NVIDIA GPU, or with another --precision.",
        )
    return able


def _unproved(requested: Sequence[str]) -> dict[str, str]:
    """Engine targets that the bundle will not be compared on, each with the reason."""
    found = {}
    for name in ENGINE_TARGETS:
        if name not in requested:
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
        checkpoint: Path,
        networks: Networks,
        options: Options,
        providers: Sequence[str],
        unproved: Mapping[str, str],
        progress: Progress,
    ) -> None:
        self.folder, self.checkpoint, self.networks, self.options = folder, checkpoint, networks, options
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
            # From here on, weights are read one by one, as they are written.
            for name, module in _modules(self.networks).items():
                emptied(module, self.checkpoint / (MERGED if name in _MERGED else BASE) / name)
            self.progress.start("tracing", len(COMPONENTS), unit="component")
            for component in components(self.networks, opset=self.options.opset, loop=self.options.loop):
                started = time.monotonic()
                choice = choose(component, self.options.precision, self.reference.calls)
                self.choices[component.name] = choice
                seconds = time.monotonic() - started
                log.info(
                    "%s: %d graph(s) in %s after %.1f s", component.name, len(choice.graphs), choice.precision, seconds
                )
                self.progress.advance(1)
            parity = self._prove(info)
        first = next(iter(parity.values()))
        return self._record(info) | {
            # The CPU provider, which counts them, has no kernels for bf16.
            "fused": {
                name: fused(self.folder / graph["file"])
                for name, graph in self.graphs.items()
                if graph["precision"] != "bf16"
            },
            "parity": {
                "seed": PARITY_SEED,
                "draws": self.options.draws,
                "thresholds": {name: limit.value for name, limit in LIMITS.items()},
                **first,
                "targets": parity,
                "unproved": dict(self.unproved),
            },
        }

    def _write(self) -> None:
        """Write the graphs of all components in place of those that are there."""
        for file in {file for graph in self.graphs.values() for file in graph["files"]}:
            (self.folder / file).unlink()
        files = WeightFiles(self.folder)
        self.graphs = {
            graph: {**written, "precision": choice.precision}
            for name, choice in self.choices.items()
            for graph, written in write_graphs(name, choice.graphs, self.folder, files).items()
        }

    def _record(self, info: Mapping[str, Any]) -> dict[str, Any]:
        tried = {
            name: {"precision": choice.precision, "tried": [attempt.to_dict() for attempt in choice.tried]}
            for name, choice in self.choices.items()
        }
        return {**info, "graphs": self.graphs, "components": tried}

    def _prove(self, info: Mapping[str, Any]) -> dict[str, Any]:
        """Compare every target over the whole trajectory, with ever more components in fp32 until all hold."""
        while True:
            self._write()
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
            reason = f"over the whole trajectory, {target}: {missed[0]}"
            self.choices[worst.component.name] = escalate(worst, reason, self.reference.calls)

    def _targets(self, bundle: Bundle) -> Iterator[tuple[str, Backend]]:
        """What the bundle is proved on, by name, each opened when its turn comes."""
        for provider in self.providers:
            yield provider, open_backend(bundle, provider)
        if any(choice.precision in TYPES for choice in self.choices.values()):
            with scratch() as folder:
                rounded = {name: choice.rounded for name, choice in self.choices.items()}
                yield GraphsBackend.name, GraphsBackend(folder, rounded)
        # Last, because engines take minutes to build. Those of what holds are in the cache when they are asked for.
        sizes = tuple(sorted(self.options.batch_sizes, reverse=True)) or (DEFAULT_BATCH,)
        for name in ENGINE_TARGETS:
            if name not in self.unproved:
                yield name, open_backend(bundle, name, EngineOptions(batch_sizes=sizes))


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
