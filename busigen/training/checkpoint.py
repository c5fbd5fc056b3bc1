"""The checkpoint: a run's folder as training leaves it and export reads it.

::

    base/<component>/            diffusers layout: config.json + safetensors
    adapters/<stage>-<class>/    peft layout, beside the merged weights
    merged/<stage>-<class>/      what is exported
    busigen.json                 recipe, split hash, latent statistics, figures, sha256 of every weight file;
                                 ``base`` where the base comes from another checkpoint (busigen.training.base)
"""

from __future__ import annotations

import hashlib
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError

from busigen import __version__
from busigen.errors import InputError, IntegrityError
from busigen.foreign import open_file
from busigen.registry import LESION_CLASSES, PRESETS, SOLVER_SPREAD, STAGES
from busigen.training.models import model_class
from busigen.training.networks import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.state import MAX_WEIGHTS_BYTES, fresh_folder, write_json

RECORD = "busigen.json"
SCHEMA = 1
BASE, ADAPTERS, MERGED = "base", "adapters", "merged"

LATER = ("spectrum.", "decoder.outlines.")
"""Weights that components saved by an earlier busigen may lack: measured spreads, and what is told of masks."""

MAX_RECORD_BYTES = 64 << 20
"""Largest other file of a component's folder that is read."""

_TRAIN = "Run 'busigen train' to its end first."


def place_of(task: TaskSpec) -> str:
    """The folder that a task's network ends up in, relative to the checkpoint."""
    return f"{MERGED}/{task.name}" if task.kind == "adapter" else f"{BASE}/{task.component}"


def save_component(model: ModelMixin, folder: Path) -> None:
    """Save a component in diffusers' layout, by rename."""
    with fresh_folder(folder) as temporary:
        model.save_pretrained(str(temporary), safe_serialization=True)


def load_component(component: str, folder: Path) -> ModelMixin:
    """Load a component in evaluation mode.

    One that was saved before its solver's steps knew a spread takes steps with the spread that was assumed then, and a
    decoder from before it was told masks does not heed them.

    Raises:
        InputError: the folder holds no such component, or one whose weights do not fit its configuration.
    """
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} holds no {component}.", fix=_TRAIN)
    try:
        # The library opens what it likes of the folder by its names, and would wait for a pipe.
        for path in folder.iterdir():
            if path.is_dir():
                continue
            limit = MAX_WEIGHTS_BYTES if path.suffix == ".safetensors" else MAX_RECORD_BYTES
            open_file(path, limit=limit).close()
        # What a file lacks is then as its constructor leaves it, and not without any value.
        model, found = model_class(component).from_pretrained(
            str(folder),
            use_safetensors=True,
            local_files_only=True,
            low_cpu_mem_usage=False,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be loaded: {error}.", fix=_TRAIN) from error
    missing = found["missing_keys"]
    if lost := [name for name in missing if not name.startswith(LATER)]:
        raise InputError(f"{folder} cannot be loaded: it lacks the weight {lost[0]}.", fix=_TRAIN)
    if any(name.startswith("spectrum.spread") for name in missing):
        model.spectrum.assume(SOLVER_SPREAD[component])
    return model.eval()


def weight_hashes(folder: Path, below: tuple[str, ...] = (BASE, ADAPTERS, MERGED)) -> dict[str, str]:
    """The sha256 of every safetensors file in some folders of a checkpoint, by path relative to the checkpoint.

    Raises:
        InputError: a file cannot be read, is no regular one, or is larger than ``MAX_WEIGHTS_BYTES``.
    """
    files = sorted(path for place in below for path in (folder / place).rglob("*.safetensors"))
    found = {}
    for path in files:
        try:
            with open_file(path, limit=MAX_WEIGHTS_BYTES) as stream:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.", fix=_TRAIN) from error
    return found


def versions() -> dict[str, str]:
    """What the weights were made with."""
    libraries = {name: metadata.version(name) for name in ("torch", "diffusers", "peft")}
    return {"busigen": __version__, "python": platform.python_version(), **libraries}


def write_record(folder: Path, content: dict[str, Any]) -> None:
    """Write ``busigen.json``; its presence means that the checkpoint is complete."""
    write_json(folder / RECORD, {"schema": SCHEMA, "weights": weight_hashes(folder), **content})


def read_record(folder: Path) -> dict[str, Any]:
    """Read and check ``busigen.json``.

    Raises:
        InputError: no complete checkpoint is there, or it has an unknown schema or preset.
        IntegrityError: a weight file is missing, extra or not the one that was recorded.
    """
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder} is no finished checkpoint: it has no {RECORD}.", fix=_TRAIN) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}.", fix=_TRAIN) from error
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise InputError(f"{path} does not have schema {SCHEMA}.", fix="Train again with this busigen.")
    if record.get("preset") not in PRESETS:
        raise InputError(f"{path} names preset {record.get('preset')!r}.", fix=f"Known: {', '.join(PRESETS)}.")
    found, recorded = weight_hashes(folder), record.get("weights", {})
    for name in sorted(set(found) | set(recorded)):
        if found.get(name) != recorded.get(name):
            state = "missing" if name not in found else "not recorded" if name not in recorded else "changed"
            raise IntegrityError(f"{folder / name} is {state} since training.", fix="Train again, or restore the file.")
    return record


def load_networks(folder: Path) -> tuple[Networks, dict[str, Any]]:
    """Load a finished checkpoint: autoencoder, context, prior and the merged stages, with its record."""
    record = read_record(folder)
    denoisers = {"prior": load_component("prior", folder / BASE / "prior")}
    for stage in STAGES:
        for label in LESION_CLASSES:
            name = f"{stage}-{label}"
            denoisers[name] = load_component(stage, folder / MERGED / name)
    networks = Networks(
        preset=PRESETS[record["preset"]],
        autoencoder=load_component("autoencoder", folder / BASE / "autoencoder"),
        latents_mean=torch.tensor(record["latents"]["mean"]),
        latents_std=torch.tensor(record["latents"]["std"]),
        context=load_component("context", folder / BASE / "context"),
        denoisers=denoisers,
    )
    return networks, record
