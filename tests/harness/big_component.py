"""Exports a component in a process of its own, and prints the most memory that it took before and after, in MiB.

``python -m tests.harness.big_component layers|denoiser FOLDER``
"""

from __future__ import annotations

import json
import math
import os
import resource
import struct
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from onnx import ModelProto
from torch import Tensor, nn

from busigen.export.assembly import with_solver, with_weights
from busigen.export.components import Component, Part, denoiser_weights
from busigen.export.trace import Tracer, traced
from busigen.export.weights import WeightFiles, emptied, write_graphs
from busigen.registry import CLASSES, LESION_CLASSES, MASK_CHANNELS, OPSETS
from busigen.solver import solver_steps
from busigen.training.networks.build import WindowUNet
from busigen.training.networks.variance import Wavelets

WIDTH, LAYERS = 2048, 20
CHANNELS = 4


class Layers(nn.Module):
    """Products and hyperbolic tangents in turns."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, width)`` to the same."""
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def random_file(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """A safetensors file of small random numbers, which are never in memory together."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            file.write((0.02 * torch.randn(shape)).numpy().tobytes())


def layers(folder: Path) -> float:
    """Write ``layers.onnx`` and its weights; before, the same on a small scale."""
    for name, width, count in (("small", 64, 2), ("layers", WIDTH, LAYERS)):
        before = peak()
        (folder / name).mkdir()
        with torch.device("meta"):
            module = Layers(width, count)
        random_file(
            folder / name / f"{name}.safetensors", {key: tuple(v.shape) for key, v in module.named_parameters()}
        )
        emptied(module, folder / name)
        graph = traced(module, {"x": torch.zeros(2, width)}, ["y"], OPSETS[0])
        files = WeightFiles(folder / "bundle")
        for precision in ("fp16", "fp32"):
            write_graphs(name, Component(name, {name: Part(graph)}).graphs(precision), folder / "bundle", files)
    return before


def denoiser(folder: Path) -> float:
    """Write stage 2 of both classes with a network of the size of Stable Diffusion 1.5's."""
    before, parts, step = peak(), {}, None
    conditions, cells = (CHANNELS, MASK_CHANNELS, 1), 32
    tracer = Tracer(OPSETS[0])
    for label in LESION_CLASSES:
        with torch.device("meta"):
            unet = WindowUNet(
                sample_size=cells,
                in_channels=2 * CHANNELS + MASK_CHANNELS + 1,
                out_channels=CHANNELS,
                cross_attention_dim=768,
                num_class_embeds=len(CLASSES),
            )
        unet.spectrum = Wavelets(CHANNELS, [cells])
        shapes = {name: tuple(value.shape) for name, value in unet.named_parameters()}
        own = {name: shape for name, shape in shapes.items() if ".attn" in name and ".norm" not in name}
        random_file(folder / f"{label}.safetensors", own)
        if step is None:
            random_file(folder / "base.safetensors", {name: shapes[name] for name in shapes.keys() - own.keys()})
        (folder / label).mkdir()
        for name in ("base", label):
            os.link(folder / f"{name}.safetensors", folder / label / f"{name}.safetensors")
        emptied(unet, folder / label)
        step = step or tracer.step(unet, cells, 77, conditions)
        update = tracer.update(unet.spectrum, CHANNELS, cells, cells, conditions=conditions)

        def finish(evaluation: ModelProto, loop: str, label: str = label, update: ModelProto = update) -> ModelProto:
            times, number = solver_steps("lesion", 4), CLASSES.index(label)
            return with_solver(evaluation, [times], number, loop=loop, name=label, output="latents", update=update)

        parts[f"lesion-{label}"] = Part(with_weights(step, denoiser_weights(unet)), finish)
    graphs = Component("lesion", parts).graphs("fp16")
    write_graphs("lesion", graphs, folder / "bundle", WeightFiles(folder / "bundle"))
    return before


def peak() -> float:
    """The most memory that this process has taken so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


if __name__ == "__main__":
    kind, place = sys.argv[1], Path(sys.argv[2])
    (place / "bundle").mkdir()
    print({"layers": layers, "denoiser": denoiser}[kind](place), peak())
