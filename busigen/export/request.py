"""What may be asked of an export, and the checkpoint that is asked for: checked, loaded, emptied of its weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from busigen.errors import InputError, UsageError
from busigen.export.weights import emptied, save_in_parts
from busigen.phantoms.distribution import Phantoms
from busigen.records import read_json
from busigen.registry import (
    ENGINE_TARGETS,
    LESION_CLASSES,
    LOOPS,
    OPSETS,
    PAINTING,
    PARITY_DRAWS,
    PRECISIONS,
    SOLVER_STEPS,
    STABLE_DIFFUSION,
    STAGES,
)
from busigen.runtime.backends.bundle import MAX_TURNS
from busigen.runtime.backends.bundle_record import start_of
from busigen.training import trainer
from busigen.training.checkpoint import ADAPTERS, BASE, MERGED, Painting, load_networks, read_record
from busigen.training.networks.inference import ADAPTERS as PAINTED
from busigen.training.networks.inference import Networks
from busigen.training.stable_diffusion.base_model import BaseModel
from busigen.training.stable_diffusion.painter import PaintingOptions, with_painter
from busigen.training.stable_diffusion.room import require_memory

TARGETS = ("onnx",)
LARGEST_BATCH = 4096


@dataclass(frozen=True)
class Options:
    """How a checkpoint is exported; a UsageError for a value that cannot be."""

    target: str = "onnx"  # a name in ``TARGETS``
    precision: str = next(iter(PRECISIONS))  # of ``registry.PRECISIONS``; components that fail get the next higher one
    opset: int = OPSETS[0]
    loop: str = next(iter(LOOPS))
    batch_sizes: tuple[int, ...] = ()  # 1 to ``LARGEST_BATCH``, that engines with static shapes are built for
    draws: int = PARITY_DRAWS  # per class, over which every target is compared with PyTorch
    engines: tuple[str, ...] = ()  # of ``registry.ENGINE_TARGETS``, on which it is proved, too, where this machine can
    steps: Mapping[str, int] = field(default_factory=dict)  # evaluations of stages, where not the preset's
    base_model: BaseModel | None = None  # the Stable Diffusion that the checkpoint was trained on, if on any
    painting: PaintingOptions = field(default_factory=PaintingOptions)
    phantoms: Mapping[str, Any] | None = None  # as `fitted_phantoms` reads it; None for what the checkpoint records

    def __post_init__(self) -> None:
        """Look at each value."""
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
    """Batches as a person lists them, ``4,16``, none where nothing is said; a UsageError if one is no whole number."""
    parts = [] if text is None else [part.strip() for part in text.split(",")]
    for part in parts:
        if not part.isascii() or not part.isdigit():
            raise UsageError(f"--batch-size {text!r} holds {part!r}.", fix="Give whole numbers, such as 4,16.")
    return tuple(dict.fromkeys(map(int, parts)))


def solver_counts(given: Sequence[str]) -> dict[str, int]:
    """Steps as a person lists them, ``lesion=30``; a UsageError for another stage, or a number not from 1 to 1000."""
    found = {}
    for text in given:
        stage, _, count = text.partition("=")
        if stage not in SOLVER_STEPS or not count.isascii() or not count.isdigit() or not 1 <= int(count) <= MAX_TURNS:
            fix = f"Write STAGE=NUMBER, such as lesion=30, of {', '.join(SOLVER_STEPS)}; at most {MAX_TURNS}."
            raise UsageError(f"--steps {text!r} is no number of a stage's steps.", fix=fix)
        found[stage] = int(count)
    return found


def fitted_phantoms(path: Path, start: float) -> dict[str, Any]:
    """What a bundle holds of phantoms, from a file that `benchmarks/studies/phantom.py fit` wrote, or an InputError.

    ``start`` is the time from which the prior makes them images; a UsageError if it does not lie between 0 and 1, which
    would be noise alone.
    """
    if not 0.0 < start < 1.0:
        raise UsageError(f"--prior-start is {start:g}.", fix="Give a time between 0 and 1, such as 0.5.")
    try:
        return {**Phantoms.from_json(read_json(path)).to_json(), "start": float(start)}
    except FileNotFoundError as error:
        raise InputError(f"--phantoms {path} is not there.", fix=_FITTED) from error
    except (OSError, ValueError) as error:
        raise InputError(f"--phantoms {path} holds no fitted phantoms: {error}.", fix=_FITTED) from error


_FITTED = "Give a file that `python benchmarks/studies/phantom.py fit` wrote."

_TRAIN = "Run 'busigen train' to its end, or take the checkpoint that it wrote as it is."

_MERGED = tuple(f"{stage}-{label}" for stage in STAGES for label in LESION_CLASSES)


def _needed(preset: str) -> dict[str, tuple[str, ...]]:
    """What is exported, by folder; the bases and adapters of stages are in what was merged, but Stable Diffusion's."""
    painted = PAINTED if preset == STABLE_DIFFUSION else ()
    merged = tuple(name for name in _MERGED if name not in painted)
    return {BASE: ("autoencoder", "context", "prior"), MERGED: merged, ADAPTERS: painted}


def check_layout(checkpoint: Path, preset: str) -> None:
    """Raise an InputError for a checkpoint that lacks a component, has one too many, or adapters not merged."""
    needed = _needed(preset)
    own = ("decoder",) if preset == STABLE_DIFFUSION else ()
    expected = {BASE: (*needed[BASE], *own, *STAGES), ADAPTERS: _MERGED, MERGED: needed[MERGED]}
    for place, names in needed.items():
        for name in names:
            config = "adapter_config.json" if place == ADAPTERS else "config.json"
            if not (checkpoint / place / name / config).is_file():
                unmerged = place == MERGED and (checkpoint / ADAPTERS / name).is_dir()
                problem = "has an adapter that was not merged" if unmerged else "is missing"
                raise InputError(f"{checkpoint / place / name} {problem}.", fix=_TRAIN)
    for place, names in expected.items():
        for path in sorted(path for path in (checkpoint / place).glob("*") if path.is_dir()):
            if path.name not in names:
                problem = f"{path} is no component; known: {', '.join(names)}."
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
    """Raise an InputError for weights that are no numbers: gates would refuse every image and say nothing of why."""
    for component, module in _modules(networks).items():
        trainer.check_finite(component, module)
    for name in ("latents_mean", "latents_std"):
        value = getattr(networks, name)
        if not bool(torch.isfinite(value).all()) or (name == "latents_std" and not bool((value > 0).all())):
            raise InputError(f"the checkpoint's {name} is {value.tolist()}.", fix=_TRAIN)


def _modules(networks: Networks) -> dict[str, nn.Module]:
    """Every trained network of a checkpoint, by the name of the folder that it is saved in."""
    assert networks.context is not None
    return {"autoencoder": networks.autoencoder, "context": networks.context, **networks.denoisers}


def empty(networks: Networks, checkpoint: Path, scratch: Path) -> None:
    """Leave networks their shapes alone: their weights are read one by one from now on, as they are written.

    Those of a Stable Diffusion, which may be merged with LoRAs and lie in any layout, are written to ``scratch`` first.
    """
    modules = _modules(networks)
    if networks.shown_at is not None:
        painter: Any = modules[PAINTED[0]]
        modules = {name: module for name, module in modules.items() if name not in PAINTED}
        for name, module in (("unet", painter.unet), ("vae", modules.pop("autoencoder"))):
            save_in_parts(module, scratch / name)
            emptied(module, scratch / name)
        assert networks.prior_decoder is not None
        modules["autoencoder"] = nn.ModuleDict({"decoder": networks.prior_decoder.network})
    for name, module in modules.items():
        emptied(module, checkpoint / (MERGED if name in _MERGED else BASE) / name)


def opened(checkpoint: Path, options: Options) -> tuple[Networks, dict[str, Any]]:
    """A checkpoint's networks, with the Stable Diffusion that it may need, and its record."""
    found = read_record(checkpoint)
    preset = found["preset"]
    check_layout(checkpoint, preset)
    if (preset == STABLE_DIFFUSION) != (options.base_model is not None):
        raise UsageError(
            f"{checkpoint} has preset {preset}, {'and needs' if options.base_model is None else 'which takes no'} "
            "--base-model.",
            fix="Name the Stable Diffusion that it was trained on." if options.base_model is None else "Leave it out.",
        )
    if options.base_model is not None:
        painting = Painting.model_validate(found["painting"])
        options.base_model.refuse_other(painting.sha256, "the checkpoint")
        require_memory(options.base_model, painting.shown_at)
    networks, record = load_networks(checkpoint)
    if options.base_model is not None:
        networks = with_painter(networks, options.base_model, painting, checkpoint / ADAPTERS, options.painting)
    if options.phantoms is not None:
        record = {**record, "phantoms": options.phantoms}
        networks.start_prior(start_of(options.phantoms))
    if networks.prior_start is not None and networks.prior_decoder is not None:
        problem = f"{checkpoint} paints with a Stable Diffusion, whose encoder does not give the prior's latents"
        raise UsageError(f"{problem}, so no background can begin with a phantom.", fix="Leave --phantoms out.")
    networks.steps.update(options.steps)
    if options.loop != "loop" and len({networks.steps[stage] for stage in PAINTING}) > 1 and networks.shown_at:
        raise UsageError("--loop unrolled has one number of steps for both stages.", fix="Give them equal --steps.")
    return networks, record
