"""A checkpoint to a bundle: what may be asked for, what a checkpoint must hold, and the export itself."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from busigen import __version__
from busigen.errors import BusigenError, IntegrityError, UsageError
from busigen.export.components import components, components_of, painter_graphs
from busigen.export.graph_rewrites import TYPES
from busigen.export.parity import LIMITS, PARITY_SEED, Reference, failures, refused
from busigen.export.precision_search import Choice, GraphsBackend, check_opset, choose, escalate, runs, scratch
from busigen.export.report import fused, model_card
from busigen.export.request import Options, check_finite, empty, opened
from busigen.export.weights import WeightFiles, write_graphs
from busigen.files import sha256_of
from busigen.registry import (
    BACKGROUND_SPECKLE,
    DEFAULT_BATCH,
    ENGINE_TARGETS,
    GRAIN_FADE,
    LATENT_FACTOR,
    LESION_CLASSES,
    OUTLINES,
    PRECISIONS,
    PROVIDERS,
    RESOLUTION,
)
from busigen.runtime.backends.base import Backend, EngineOptions, engine_of, open_backend
from busigen.runtime.backends.bundle import RECORD, SCHEMA, SCHEMA_OF_PHANTOMS, SCHEMA_OF_SCANNERS, Bundle
from busigen.runtime.backends.bundle_record import BACKGROUND_DECODER, DEFAULT_WINDOWS, WHOLE_DECODER
from busigen.runtime.backends.memory import LARGE
from busigen.runtime.progress import Progress
from busigen.runtime.storage.files import atomic_folder
from busigen.training.checkpoint import RECORD as CHECKPOINT_RECORD
from busigen.training.checkpoint import writing
from busigen.training.networks.inference import Networks
from busigen.training.stable_diffusion.lora import files_of
from busigen.training.stable_diffusion.painter import BASES, OWN, chosen_decoder
from busigen.training.stable_diffusion.room import require_disk
from busigen.training.trainer import write_json

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
    """Export what ``busigen train`` finished as a bundle in ``out``, which must not exist, or be empty.

    ``last`` is given the finished bundle before it appears at ``out``, where it does not appear if this fails.

    Raises:
        UsageError: this machine cannot run, and so not prove, what is asked for.
        InputError: ``checkpoint`` is not finished, not readable, lacks a component, has one too many, has adapters that
            were not merged, or weights that are no numbers.
        IntegrityError: its weights are not those that training recorded.
        OutputError: ``out`` is taken or cannot be written, or the disk has no room.
        CapacityError: a Stable Diffusion does not fit into memory.
        ParityError: the graphs do not reproduce the checkpoint; nothing is left at ``out``.
    """
    options, progress = options or Options(), progress or Progress()
    check_opset(options.opset)
    providers, unproved = _provers(options.precision), _unproved(options.engines)
    if options.base_model is not None:
        require_disk(options.base_model, out)
    networks, record = opened(checkpoint, options)
    check_finite(networks)
    info = _info(networks, record, checkpoint, options)
    with writing(out), atomic_folder(out) as folder, scratch() as beside:
        with progress:
            progress.start("drawing with PyTorch", len(LESION_CLASSES) * options.draws, unit="draw")
            reference = Reference(networks, Bundle(folder, info, ""), draws=options.draws, progress=progress)
            empty(networks, checkpoint, beside)
            progress.start("tracing", len(components_of(networks)), unit="component")
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
            "fused": _fused(bundle),
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


def _provers(precision: str) -> list[str]:
    """ONNX Runtime's providers of this machine that can run graphs of a precision; a UsageError if there is none."""
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

    Gives the bundle, with all in its record but what was found of it, and the figures of each target.
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
    for choice in choices.values():
        for name, constants in choice.component.constants.items():
            graphs[name] |= {"constants": constants}
    for name, stub in info["graphs"].items():
        graphs[name] |= {key: stub[key] for key in ("fresh",) if key in stub}
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


def _fused(bundle: Bundle) -> dict[str, Any]:
    """What ONNX Runtime makes of the graphs, but for those in bf16, which its CPU provider has no kernels for.

    A graph is written with all weights in fp32 to count its nodes: those of Stable Diffusion are not worth that.
    """
    found = {}
    for name, graph in bundle.info["graphs"].items():
        weights = sum((bundle.folder / file).stat().st_size for file in graph["files"])
        if graph["precision"] != "bf16" and weights < LARGE:
            found[name] = fused(bundle.graph(name))
    return found


def _schema(record: Mapping[str, Any]) -> int:
    """The least schema that says what the bundle has, so that earlier versions go on reading what they can."""
    if record.get("scanners"):
        return SCHEMA_OF_SCANNERS
    return SCHEMA if record.get("phantoms") is None else SCHEMA_OF_PHANTOMS


def _info(networks: Networks, record: Mapping[str, Any], checkpoint: Path, options: Options) -> dict[str, Any]:
    """What a bundle's record says before any graph is written."""
    return {
        "schema": _schema(record),
        "preset": record["preset"],
        "resolution": RESOLUTION,
        "latent_factor": LATENT_FACTOR,
        "windows": {side: networks.shown_at or shown for side, shown in DEFAULT_WINDOWS.items()},
        "background": {
            "decoder": WHOLE_DECODER if networks.prior_decoder is None else BACKGROUND_DECODER,
            "latent_channels": networks.preset.latent_channels,
        },
        "classes": list(LESION_CLASSES),
        "latent_channels": networks.channels,
        "code_length": networks.denoiser("mask", LESION_CLASSES[0]).length,
        "patch": networks.preset.patch,
        "frames": record.get("frames", [[RESOLUTION, RESOLUTION]]),
        **({"scanner_frames": record["scanner_frames"]} if record.get("scanner_frames") else {}),
        "styles": record.get("styles", []),
        "background_speckle": BACKGROUND_SPECKLE,
        "outlines": OUTLINES,
        "grain_fade": GRAIN_FADE,
        "transfer": record.get("transfer"),
        **({} if record.get("phantoms") is None else {"phantoms": record["phantoms"]}),
        **({"scanners": record["scanners"]} if record.get("scanners") else {}),
        "solver_steps": dict(networks.steps),
        "graphs": painter_graphs(networks) if networks.shown_at else {},
        **_painting(record, checkpoint, options),
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


def _painting(record: Mapping[str, Any], checkpoint: Path, options: Options) -> dict[str, Any]:
    """What a bundle says of its Stable Diffusion."""
    if options.base_model is None:
        return {}
    asked = options.painting
    loras = [
        {"for": where, "sha256": sha256_of(files_of(path)[0]), "weight": weight} for where, path, weight in asked.loras
    ]
    names = {OWN: "busigen's", BASES: "Stable Diffusion's"}
    return {
        "painting": {
            **record["painting"],
            "guidance": asked.guidance,
            "fresh_noise": asked.fresh_noise,
            "loras": loras,
            "decoder": names.get(chosen_decoder(asked.decoder, checkpoint), "TAESD"),
        }
    }
