"""What of a checkpoint and a machine is refused before anything is traced."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from busigen.errors import InputError, UsageError
from busigen.export.precision import TYPES
from busigen.foreign import open_file
from busigen.records import parse_json
from busigen.registry import LESION_CLASSES, OPSETS, STAGES
from busigen.training import state
from busigen.training.checkpoint import ADAPTERS, BASE, MERGED
from busigen.training.networks import Networks

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
    for component, module in _modules(networks):
        state.check_finite(component, module)
    for name in ("latents_mean", "latents_std"):
        value = getattr(networks, name)
        if not bool(torch.isfinite(value).all()) or (name == "latents_std" and not bool((value > 0).all())):
            raise InputError(f"the checkpoint's {name} is {value.tolist()}.", fix=_TRAIN)


def _modules(networks: Networks) -> Iterator[tuple[str, nn.Module]]:
    yield "autoencoder", networks.autoencoder
    assert networks.context is not None
    yield "context", networks.context
    yield from networks.denoisers.items()


def runs(provider: str, precision: str, opset: int = OPSETS[0]) -> str:
    """Why an ONNX Runtime provider cannot run a convolution and a product in a precision; empty if it can.

    Args:
        provider: ONNX Runtime's name of it.
        precision: a name in ``registry.PRECISIONS``.
        opset: ONNX's.
    """
    kind, number = TYPES.get(precision, (TensorProto.FLOAT, np.dtype(np.float32)))
    opset = max(opset, 22) if precision == "bf16" else opset
    nodes = [
        helper.make_node("Cast", ["x"], ["low"], to=kind),
        helper.make_node("Conv", ["low", "kernel"], ["seen"]),
        helper.make_node("MatMul", ["seen", "matrix"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 1, 4, 4])],
        [
            numpy_helper.from_array(np.ones((1, 1, 1, 1)).astype(number), "kernel"),
            numpy_helper.from_array(np.ones((4, 4)).astype(number), "matrix"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    ort.set_default_logger_severity(4)
    options = ort.SessionOptions()
    # What cannot be loaded is said by the exception; ONNX Runtime would say it again on the terminal.
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider], enable_fallback=False)
        if provider not in session.get_providers():
            return f"{provider} cannot be loaded here"
        session.run(None, {"x": np.ones((1, 1, 4, 4), dtype=np.float32)})
    except Exception as error:  # ONNX Runtime's exceptions share no public base class
        return str(error).splitlines()[0][:200]
    return ""


def check_opset(opset: int) -> None:
    """Refuse an opset that this ONNX Runtime does not know.

    Raises:
        UsageError: it does not.
    """
    if problem := runs("CPUExecutionProvider", "fp32", opset):
        raise UsageError(
            f"ONNX Runtime {ort.__version__} cannot run opset {opset}: {problem}.",
            fix=f"Choose one of: {', '.join(map(str, OPSETS))}; or install a newer onnxruntime.",
        )
