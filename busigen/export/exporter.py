"""A finished checkpoint to a bundle: trace, loop, write, prove; nothing is left behind where a proof fails."""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from diffusers import ModelMixin
from onnx import ModelProto

from busigen import __version__
from busigen.errors import OutputError, UsageError
from busigen.export import trace
from busigen.export.assembly import with_solver, with_weights
from busigen.export.bundle_writer import write_graphs
from busigen.export.parity import compare
from busigen.registry import (
    BUCKETS,
    CLASSES,
    LATENT_FACTOR,
    LESION_CLASSES,
    MASK_CHANNELS,
    PLACE_CHANNELS,
    RESOLUTION,
    SOLVER_STEPS,
)
from busigen.runtime.bundle import RECORD, SCHEMA, Bundle, graphs_of
from busigen.solver import solver_steps
from busigen.training.checkpoint import RECORD as CHECKPOINT_RECORD
from busigen.training.checkpoint import load_networks
from busigen.training.networks import Networks
from busigen.training.state import write_json

log = logging.getLogger("busigen.export")

TARGETS = ("onnx",)
CARD = "MODEL_CARD.md"

Graphs = dict[str, ModelProto]


def export(checkpoint: Path, out: Path, *, target: str = "onnx") -> Bundle:
    """Export a checkpoint.

    Args:
        checkpoint: what ``busigen train`` finished.
        out: the bundle's folder; it must not exist, or be empty.
        target: a name in ``TARGETS``.

    Returns:
        The written bundle.

    Raises:
        UsageError: unknown target.
        InputError: ``checkpoint`` is not finished or not readable.
        IntegrityError: its weights are not those that training recorded.
        OutputError: ``out`` is taken or cannot be written.
        ParityError: the graphs do not reproduce the checkpoint; nothing is left at ``out``.
    """
    if target not in TARGETS:
        raise UsageError(f"unknown target {target!r}.", fix=f"Choose one of: {', '.join(TARGETS)}.")
    networks, record = load_networks(checkpoint)
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} exists and is not empty.", fix="Use another --out, or delete it first.")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        try:
            _fill(temporary, networks, record, checkpoint)
            if out.exists():
                out.rmdir()
            os.replace(temporary, out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise OutputError(
            f"{out} cannot be written: {error.strerror}.", fix="Use a folder that you may write to."
        ) from error
    return Bundle.open(out)


def _fill(folder: Path, networks: Networks, record: Mapping[str, Any], checkpoint: Path) -> None:
    graphs: dict[str, Any] = {}
    for component, models in _components(networks):
        started = time.monotonic()
        graphs |= write_graphs(folder, component, models)
        log.info("%s: %d graph(s) written in %.1f s", component, len(models), time.monotonic() - started)
    info: dict[str, Any] = {
        "schema": SCHEMA,
        "preset": record["preset"],
        "classes": list(LESION_CLASSES),
        "latent_channels": networks.preset.latent_channels,
        "code_length": networks.denoiser("mask", LESION_CLASSES[0]).length,
        "patch": networks.preset.patch,
        "frames": record.get("frames", [[RESOLUTION, RESOLUTION]]),
        "solver_steps": SOLVER_STEPS,
        "split_hash": record["data"]["split_hash"],
        "checkpoint": hashlib.sha256((checkpoint / CHECKPOINT_RECORD).read_bytes()).hexdigest(),
        "training": {key: record[key] for key in ("recipe", "data", "tasks", "device")},
        "graphs": graphs,
        "opset": trace.OPSET,
        "versions": {
            **record["versions"],
            "busigen": __version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
            "onnxruntime": onnxruntime.__version__,
        },
    }
    write_json(folder / RECORD, info)
    log.info("comparing PyTorch and ONNX Runtime over the whole trajectory")
    info["parity"] = compare(networks, Bundle.open(folder))
    for label in LESION_CLASSES:
        log.info("parity, %s: %s", label, info["parity"][label])
    (folder / CARD).write_text(_card(record, info), encoding="utf-8")
    write_json(folder / RECORD, info)


def _components(networks: Networks) -> Iterator[tuple[str, Graphs]]:
    """Yield the graphs that share a file of weights.

    A network is traced once per window size and gets each class's weights; what adapters leave alone is the same in
    both classes and stored once.
    """
    yield "context", {"context": trace.trace_context(networks)}
    yield "encoder", {f"encoder@{side}": trace.trace_encoder(networks, side) for side in BUCKETS}
    yield "decoder", {f"decoder@{side}": trace.trace_decoder(networks, side) for side in BUCKETS}
    yield "prior", {"prior": _prior(networks)}
    yield from _outlines(networks)
    window_cells = [side // LATENT_FACTOR for side in BUCKETS]
    yield from _staged(networks, "lesion", window_cells, (trace.LesionCondition(), ["known", "mask", "edit"]))
    yield from _staged(
        networks, "blend", window_cells, (trace.BlendCondition(), ["known", "painted", "mask", "edit", "ring"])
    )


def _prior(networks: Networks) -> ModelProto:
    cells = RESOLUTION // LATENT_FACTOR
    return with_solver(
        trace.trace_step(trace.without_context(networks.denoisers["prior"]), cells, 1, (PLACE_CHANNELS,)),
        solver_steps("prior", SOLVER_STEPS["prior"]),
        CLASSES.index("normal"),
        name="prior",
        output="latents",
        before=trace.trace_prior_condition(networks, cells),
        update=trace.trace_spectrum(networks.denoisers["prior"].spectrum),
    )


def _outlines(networks: Networks) -> Iterator[tuple[str, Graphs]]:
    """Stage 1 of each class; the classes' adapters share the base's outline space."""
    first = networks.denoiser("mask", LESION_CLASSES[0])
    step = trace.trace_outline_step(first, networks.preset.tokens)
    before, after = trace.trace_asked(first.space), trace.trace_distance(first.space, first.length)
    graphs = {}
    for label in LESION_CLASSES:
        component = f"mask-{label}"
        graphs[component] = with_solver(
            with_weights(step, _weights(networks.denoisers[component])),
            solver_steps("mask", SOLVER_STEPS["mask"]),
            CLASSES.index(label),
            name=component,
            output="distance",
            before=before,
            after=after,
        )
    yield "mask", graphs


def _staged(
    networks: Networks, stage: str, cells: list[int], condition: tuple[torch.nn.Module, list[str]]
) -> Iterator[tuple[str, Graphs]]:
    channels = networks.preset.latent_channels
    first = networks.denoisers[f"{stage}-{LESION_CLASSES[0]}"]
    conditions = (channels, MASK_CHANNELS, 1)
    steps = [trace.trace_step(first, size, networks.preset.tokens, conditions) for size in cells]
    before = [trace.trace_condition(*condition, channels, size * LATENT_FACTOR) for size in cells]
    graphs = {}
    for label in LESION_CLASSES:
        component = f"{stage}-{label}"
        weights = _weights(networks.denoisers[component])
        for name, step, known in zip(graphs_of(component), steps, before, strict=True):
            graphs[name] = with_solver(
                with_weights(step, weights),
                solver_steps(stage, SOLVER_STEPS[stage]),
                CLASSES.index(label),
                name=component,
                output="latents",
                before=known,
            )
    yield stage, graphs


def _weights(unet: ModelMixin) -> dict[str, Any]:
    """What training changes; buffers (stage 1's outline space) are no part of a traced evaluation."""
    return {f"velocity.unet.{name}": value.detach().cpu().numpy() for name, value in unet.named_parameters()}


def _card(record: Mapping[str, Any], info: Mapping[str, Any]) -> str:
    """The part of a model card that a machine can write: what it was trained on, for how long, and its figures."""
    tasks = "\n".join(
        f"| {name} | {task.get('steps', '')} | {_held_out(task)} | {task['seconds']:.0f} |"
        for name, task in record["tasks"].items()
    )
    rows = ((label, info["parity"][label]) for label in LESION_CLASSES)
    parity = "\n".join(
        f"| {name} | {p['images_compared']} | {p['dice']:.4f} | {p['psnr']:.1f} | {p['max_grey_difference']} |"
        for name, p in rows
    )
    return f"""# Model card

Preset `{info["preset"]}`, trained on {record["device"]} on the training split of {record["data"]["images"]} images
(split hash `{info["split_hash"]}`).
{_origin(record.get("base"))}
Solver steps per stage: {", ".join(f"{k} {v}" for k, v in info["solver_steps"].items())}.

| task | steps | held-out loss | seconds (of the last sitting) |
| --- | --- | --- | --- |
{tasks}

PyTorch against ONNX Runtime over the whole trajectory, same draws:

| class | images compared | smallest Dice | smallest PSNR (dB) | largest grey difference |
| --- | --- | --- | --- | --- |
{parity}

Not for diagnosis. Lesions painted into a patient's image still hold that patient's pixels.
"""


def _held_out(task: Mapping[str, Any]) -> str:
    """The loss of the weights that were kept; nothing for a task that trains none."""
    losses = [loss for _, loss in task.get("validation", ())]
    return f"{min(losses):.4f}" if losses else ""


def _origin(base: Mapping[str, str] | None) -> str:
    """Where the base comes from, if not from the same run: what its images taught it is in the bundle, too."""
    if base is None:
        return ""
    return f"""
These images trained the tasks below. All else is the base's, unchanged: it was trained on the training split with hash
`{base["split_hash"]}`, and its weights have the digest `{base["weights"]}`.
"""
