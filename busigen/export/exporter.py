"""A checkpoint to a bundle: what may be asked for, what a checkpoint must hold, and the export itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open

from busigen import __version__
from busigen.errors import BusigenError, InputError, IntegrityError, OutputError, UsageError
from busigen.export.components import COMPONENTS, components
from busigen.export.graph_rewrites import TYPES
from busigen.export.parity import LIMITS, PARITY_SEED, Reference, failures, refused
from busigen.export.precision_search import Choice, GraphsBackend, check_opset, choose, escalate, runs, scratch
from busigen.export.report import fused, model_card
from busigen.export.weights import WeightFiles, emptied, write_graphs
from busigen.files import sha256_of
from busigen.registry import (
    BACKGROUND_SPECKLE,
    DEFAULT_BATCH,
    ENGINE_TARGETS,
    LATENT_FACTOR,
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
from busigen.runtime.backends.bundle_record import DEFAULT_WINDOWS, WHOLE_DECODER
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
        known = {"target": TARGETS, "precision": PRECISIONS, "opset": OPSETS, "loop": LOOPS}
        for name, allowed in known.items():
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
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise UsageError(f"--batch-size {text!r} holds {part!r}.", fix="Give whole numbers, such as 4,16.")
    return tuple(dict.fromkeys(map(int, parts)))


_TRAIN = "Run 'busigen train' to its end, or take the checkpoint that it wrote as it is."

_MERGED = tuple(f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES)
_NEEDED = {BASE: ("autoencoder", "context", "prior"), MERGED: _MERGED}
"""What is exported; the stages' bases and adapters are in what was merged."""
_EXPECTED = {BASE: (*_NEEDED[BASE], *STAGES), ADAPTERS: _MERGED, MERGED: _MERGED}


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
        for path in sorted(path for path in (checkpoint / place).glob("*") if path.is_dir()):
            if path.name not in expected:
                problem = f"{path} is no component; known: {', '.join(expected)}."
                raise InputError(problem, fix="Move it out of the checkpoint.")
    for path in sorted(checkpoint.glob(f"{MERGED}/*/*.safetensors")):  # `read_record` has hashed them.
        try:
            with safe_open(path, "pt") as file:
                adapted = next((name for name in file.keys() if "lora_" in name), None)  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is no safetensors file.", fix=_TRAIN) from error
        if adapted is not None:
            raise InputError(f"{path} holds an adapter that was not merged: {adapted}.", fix=_TRAIN)


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


def empty(networks: Networks, checkpoint: Path) -> None:
    """Leave networks their shapes alone: their weights are read one by one from now on, as they are written."""
    for name, module in _modules(networks).items():
        emptied(module, checkpoint / (MERGED if name in _MERGED else BASE) / name)


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
    options, progress = options or Options(), progress or Progress()
    check_opset(options.opset)
    providers, unproved = _provers(options.precision), _unproved(options.engines)
    read_record(checkpoint)
    check_layout(checkpoint)
    networks, record = load_networks(checkpoint)
    check_finite(networks)
    info = _info(networks, record, checkpoint, options)
    with _appearing(out) as folder:
        with progress:
            progress.start("drawing with PyTorch", len(LESION_CLASSES) * options.draws, unit="draw")
            reference = Reference(networks, Bundle(folder, info, ""), draws=options.draws, progress=progress)
            empty(networks, checkpoint)
            progress.start("tracing", len(COMPONENTS), unit="component")
            choices: dict[str, Choice] = {}
            for component in components(networks, opset=options.opset, loop=options.loop):
                started = time.monotonic()
                choice = choices[component.name] = choose(component, options.precision, reference.calls)
                seconds = time.monotonic() - started
                log.info("%s: %d graph(s) in %s in %.1f s", choice.name, len(choice.graphs), choice.precision, seconds)
                progress.advance(1)
            bundle, parity = _proved(folder, info, choices, reference, providers, unproved, options, progress)
        first = next(iter(parity.values()))
        info = bundle.info | {
            # The CPU provider, which counts them, has no kernels for bf16.
            "fused": {
                name: fused(bundle.graph(name))
                for name, graph in bundle.info["graphs"].items()
                if graph["precision"] != "bf16"
            },
            "parity": {
                "seed": PARITY_SEED,
                "draws": options.draws,
                "thresholds": {name: limit.value for name, limit in LIMITS.items()},
                **first,
                "targets": parity,
                "unproved": unproved,
            },
        }
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
    known = {name: provider.onnxruntime for name, provider in PROVIDERS.items() if provider.onnxruntime}
    reasons = {name: runs(provider, precision) for name, provider in known.items()}
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


def _proved(
    folder: Path,
    info: Mapping[str, Any],
    choices: dict[str, Choice],
    reference: Reference,
    providers: Sequence[str],
    unproved: Mapping[str, str],
    options: Options,
    progress: Progress,
) -> tuple[Bundle, dict[str, Any]]:
    """Write the bundle and compare every target over the whole trajectory, with ever more in fp32 until all hold.

    Returns:
        The bundle, with all in its record but what was found of it, and the figures of each target.
    """
    while True:
        bundle = _written(folder, info, choices)
        found: dict[str, Any] = {}
        missed: list[str] = []
        for target, backend in _targets(bundle, choices.values(), providers, unproved, options):
            # Each draw twice: with its own outline, and with PyTorch's.
            progress.start(f"comparing on {target}", 2 * len(LESION_CLASSES) * options.draws, unit="draw")
            try:
                found[target] = reference.compare(bundle, backend)
                missed = failures(found[target])
            except IntegrityError as error:  # NaN or infinity, which a lower precision may be the cause of.
                missed = [error.problem]
            if missed:
                break
        else:
            return bundle, found
        lowest = [choice for choice in choices.values() if PRECISIONS[choice.precision].above]
        if not lowest:
            raise refused(target, missed)
        worst = max(lowest, key=lambda choice: choice.tried[-1].error)
        choices[worst.name] = escalate(worst, f"over the whole trajectory, {target}: {missed[0]}", reference.calls)


def _written(folder: Path, info: Mapping[str, Any], choices: Mapping[str, Choice]) -> Bundle:
    """The graphs of all components as a bundle, in place of what is in the folder."""
    for path in folder.iterdir():
        path.unlink()
    files = WeightFiles(folder)
    graphs = {
        graph: {**written, "precision": choice.precision}
        for name, choice in choices.items()
        for graph, written in write_graphs(name, choice.graphs, folder, files).items()
    }
    tried = {
        name: {"precision": choice.precision, "tried": [attempt.to_dict() for attempt in choice.tried]}
        for name, choice in choices.items()
    }
    write_json(folder / RECORD, {**info, "graphs": graphs, "components": tried})
    return Bundle.open(folder)


def _targets(
    bundle: Bundle,
    choices: Collection[Choice],
    providers: Sequence[str],
    unproved: Mapping[str, str],
    options: Options,
) -> Iterator[tuple[str, Backend]]:
    """What the bundle is proved on, by name, each opened when its turn comes."""
    for provider in providers:
        yield provider, open_backend(bundle, provider)
    if any(choice.precision in TYPES for choice in choices):
        with scratch() as folder:
            yield GraphsBackend.name, GraphsBackend(folder, {choice.name: choice.rounded for choice in choices})
    # Last, because engines take minutes to build. Those of what holds are in the cache when they are asked for.
    sizes = tuple(sorted(options.batch_sizes, reverse=True)) or (DEFAULT_BATCH,)
    for name in ENGINE_TARGETS:
        if name not in unproved:
            yield name, open_backend(bundle, name, EngineOptions(batch_sizes=sizes))


def _info(networks: Networks, record: Mapping[str, Any], checkpoint: Path, options: Options) -> dict[str, Any]:
    """What a bundle's record says before any graph is written."""
    return {
        "schema": SCHEMA,
        "preset": record["preset"],
        "resolution": RESOLUTION,
        "latent_factor": LATENT_FACTOR,
        "windows": DEFAULT_WINDOWS,
        "background": {"decoder": WHOLE_DECODER, "latent_channels": networks.preset.latent_channels},
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
