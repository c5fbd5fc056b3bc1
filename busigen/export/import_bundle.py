"""A bundle back to a checkpoint: what ships can be trained on, measured, and exported with other settings.

Graphs keep their parameters under the names that PyTorch gave them (:mod:`busigen.export.trace`), so the weights are
read off the graphs, with the precision that the bundle stores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, numpy_helper
from onnx.external_data_helper import load_external_data_for_tensor
from torch import Tensor

from busigen.errors import InputError, IntegrityError, OutputError
from busigen.export.graph_rewrites import TYPES
from busigen.export.weights import weights_of
from busigen.registry import BUCKETS, LESION_CLASSES, PRESETS, STABLE_DIFFUSION, STAGES
from busigen.runtime.backends.bundle import RECORD, Bundle, default_bundle, openable
from busigen.runtime.backends.bundle_record import WHOLE_DECODER, graphs_of, names_of_graphs
from busigen.training import checkpoint
from busigen.training.checkpoint import Base
from busigen.training.networks.build import build, lacks_scanners, widened
from busigen.training.recipe import recipe_for

_EXPORT = "Use a bundle that this busigen exported, or train again."

VELOCITY = "velocity.unet."  # What a traced evaluation puts before its denoiser's names.

UPDATE = "update/"
"""What a graph puts before the names of what the solver steps of a denoiser with a spread are made of."""

SPREAD = "spectrum.spread"
"""What of them every bundle has; without the others, a network works with those that it is built with."""

Weights = dict[str, Tensor]

DEFAULT = "default"  # The ``train --base`` that stands for the shipped bundle, unless a folder has that name.


@contextmanager
def opened_base(folder: Path | None) -> Iterator[Base | None]:
    """The base to train on: a checkpoint, or a bundle, which is restored for as long as it is needed.

    An InputError says that ``folder`` is neither, an IntegrityError that a file is not the one that was recorded.
    """
    if folder is not None and not folder.exists() and str(folder) == DEFAULT:
        folder = default_bundle()
    if folder is None:
        yield None
    elif (folder / RECORD).is_file():
        with tempfile.TemporaryDirectory(prefix="busigen-") as place:
            restore(Bundle.open(folder), Path(place))
            yield Base.open(Path(place))
    else:
        yield Base.open(folder)


def restore(bundle: Bundle, out: Path) -> dict[str, Any]:
    """Write the checkpoint whose merged stages are those of a bundle.

    A bundle holds each class's merged weights, not base and adapters apart. The mean of the two classes' weights takes
    the base's place: it is the base plus the mean of the two adapters. Exported again, the checkpoint gives the same
    weights. Returns the content of its ``busigen.json``, in which ``restored`` names the bundle by its sha256.

    Raises:
        InputError: the bundle has a preset that this busigen does not know, or draws with a Stable Diffusion.
        IntegrityError: its graphs do not hold the weights of that preset's networks.
        OutputError: ``out`` is taken or cannot be written.
    """
    preset = bundle.info.get("preset")
    if preset == STABLE_DIFFUSION:
        problem = (
            f"{bundle.folder} draws with a Stable Diffusion, whose LoRAs cannot be told from its weights any more."
        )
        raise InputError(problem, fix="Take the checkpoint that it was exported from.")
    if preset not in PRESETS:
        raise InputError(f"{bundle.folder} has preset {preset!r}.", fix=f"Known: {', '.join(PRESETS)}.")
    if bundle.graph_names != names_of_graphs(LESION_CLASSES, BUCKETS, WHOLE_DECODER):
        problem = f"{bundle.folder} has other classes, windows or decoders than a checkpoint of preset {preset}."
        raise InputError(problem, fix=_EXPORT)
    with checkpoint.writing(out):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise OutputError(f"{out} exists and is not empty.", fix="Use another --out, or delete it first.")
        latents = _write_components(bundle, preset, out)
        return checkpoint.write_record(out, {**_origin(bundle, preset), "latents": latents})


def _write_components(bundle: Bundle, preset: str, out: Path) -> dict[str, list[float]]:
    """Save every component, and return the latents' mean and deviation per channel."""
    encoder, decoder = (_weights(bundle, graphs_of(half)[0]) for half in ("encoder", "decoder"))
    autoencoder = {
        name.replace("network.", f"{half}.", 1): value
        for half, weights in (("encoder", encoder), ("decoder", decoder))
        for name, value in weights.items()
        if name.startswith("network.")
    }
    base: dict[str, Weights] = {
        "autoencoder": autoencoder,
        "context": _weights(bundle, "context"),
        "prior": _prior(_weights(bundle, "prior")),
    }
    for stage in STAGES:
        classes = []
        for label in LESION_CLASSES:
            name = f"{stage}-{label}"
            # All of a stage's graphs hold the same weights, but each has solver steps for windows of its own size.
            weights = {key: v for graph in graphs_of(name) for key, v in _denoiser(_weights(bundle, graph)).items()}
            _save(stage, preset, weights, out / checkpoint.MERGED / name)
            classes.append(weights)
        base[stage] = _between(classes)
    for name, weights in base.items():
        _save(name, preset, weights, out / checkpoint.BASE / name)
    return {key: _found(encoder, f"latents_{key}").flatten().tolist() for key in ("mean", "std")}


def _between(classes: Sequence[Weights]) -> Weights:
    """What stands for a stage's base, which a bundle does not hold: the mean of its classes' weights.

    What the solver's steps know of the spread is measured and not trained, and is the first class's: it holds axes,
    and the mean of two sets of axes is none.
    """
    first, *_ = classes
    return {
        name: value if name.startswith("spectrum.") else torch.stack([weights[name] for weights in classes]).mean(0)
        for name, value in first.items()
    }


def _denoiser(weights: Mapping[str, Tensor]) -> Weights:
    """A denoiser's parameters as traced, and from around the loop its outline space and its spread, by its names."""
    own = {name.removeprefix(VELOCITY): value for name, value in weights.items() if name.startswith(VELOCITY)}
    space = {name.removeprefix("after/"): v for name, v in weights.items() if name.startswith("after/space.")}
    spectrum = {name.replace(UPDATE, "spectrum.", 1): v for name, v in weights.items() if name.startswith(UPDATE)}
    return own | space | spectrum


def _prior(weights: Mapping[str, Tensor]) -> Weights:
    """The prior's own names, with the bias that export folded its cross-attention into back in its place."""
    return {name.replace(".attn2.bias", ".attn2.to_out.0.bias"): v for name, v in _denoiser(weights).items()}


def _save(component: str, preset: str, weights: Mapping[str, Tensor], folder: Path) -> None:
    model = build(component, PRESETS[preset])
    filled = {}
    for name, own in model.state_dict().items():
        if name in weights:
            filled[name] = weights[name]
            if name == "conv_in.weight" and lacks_scanners(
                component, {**model.config, "in_channels": filled[name].shape[1]}
            ):
                filled[name] = widened(filled[name], model.config.out_channels)
        elif ".scanners." in name or name.startswith("scanners."):
            filled[name] = own  # Of an earlier version, or not told which.
        elif component == "prior" and (".norm2." in name or ".attn2." in name):
            # What the prior attends to is zero, and so is its value: export leaves it out (trace.without_context).
            filled[name] = torch.zeros_like(own)
        else:
            filled[name] = own if name.startswith("spectrum.") and name != SPREAD else _found(weights, name)
        if filled[name].shape != own.shape:
            raise IntegrityError(
                f"weight {name} of the bundle's {component} has shape {tuple(filled[name].shape)}, "
                f"preset {preset} has {tuple(own.shape)}.",
                fix=_EXPORT,
            )
    model.load_state_dict(filled)
    checkpoint.save_component(model, folder)


def _weights(bundle: Bundle, graph: str) -> Weights:
    """A graph's initialisers by their traced names, in fp32; an InputError if they are quantised, and so too coarse."""
    path = bundle.graph(graph)
    if bundle.info["graphs"][graph].get("precision") == "int8":
        raise InputError(
            f"{path} is quantised to int8, which is not undone.", fix="Restore a bundle of the same model without int8."
        )
    found: Weights = {}
    # The bundle's check has refused graphs that read other files than the recorded ones.
    with openable(path, bundle.info["graphs"][graph]["files"]) as opened:
        for tensor in weights_of(onnx.load(str(opened), load_external_data=False)):
            if tensor.external_data:
                load_external_data_for_tensor(tensor, str(opened.parent))
            name = tensor.name
            for ending in ("/fp16", *(f"/as-{precision}" for precision in TYPES)):
                name = name.removesuffix(ending)
            # A weight that is read in two precisions is there twice.
            if tensor.data_type == TensorProto.FLOAT or (tensor.data_type in TYPES.values() and name not in found):
                found[name] = torch.from_numpy(numpy_helper.to_array(tensor).astype("float32"))
            tensor.Clear()
    return found


def _found(weights: Mapping[str, Tensor], name: str) -> Tensor:
    try:
        return weights[name]
    except KeyError as error:
        raise IntegrityError(f"the bundle's graphs do not hold the weight {name}.", fix=_EXPORT) from error


def _origin(bundle: Bundle, preset: str) -> dict[str, Any]:
    """What the record says of how the weights were trained: what the bundle knows of it."""
    known = bundle.info.get("training") or {}
    return {
        "restored": bundle.sha256,
        "preset": preset,
        "recipe": known.get("recipe", recipe_for(preset).to_dict()),
        "data": {"images": "unrecorded", **known.get("data", {}), "split_hash": bundle.info.get("split_hash")},
        "frames": [list(frame) for frame in bundle.frames()],
        "scanner_frames": bundle.info.get("scanner_frames", {}),
        "styles": bundle.info.get("styles", []),
        "transfer": bundle.info.get("transfer"),
        "scanners": bundle.info.get("scanners", []),
        "phantoms": bundle.info.get("phantoms"),
        "tasks": known.get("tasks", {}),
        "device": known.get("device", "unrecorded"),
        "versions": checkpoint.versions(),
    }
