"""The tasks of a recipe, each with its data, loss, validation and sheet; here, what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Generator, Tensor

from busigen.data.prepared import Prepared
from busigen.errors import InputError
from busigen.training.examples import (
    Frame,
    Frames,
    Healed,
    Progress,
    WindowExamples,
    load_examples,
    save_examples,
    select,
)
from busigen.training.networks.inference import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import Drawer

VALIDATION_BATCHES = 6

Buckets = dict[int, WindowExamples]


@dataclass
class TaskContext:
    """What every task is built from: ``healed`` after the heal step, ``drawer`` for tasks that need drawings.

    ``scanners`` are the names of those that networks are told.
    """

    prepared: Prepared
    networks: Networks
    device: torch.device
    seed: int
    report: Callable[[str], Progress]
    cache: Path
    max_images: int | None = None
    healed: Healed | None = None
    drawer: Drawer | None = None
    scanners: Sequence[str] = ()

    def images(self, split: str, *, sources: tuple[str, ...] = (), label: str | None = None) -> Frames:
        """The images of a split, or those of some sources and a class."""
        rows = select(self.prepared, split, limit=self.max_images, sources=sources, label=label)
        return Frames(self.prepared, rows, self.scanners)

    def frames(self, split: str, spec: TaskSpec) -> Frames:
        """The task's images of a split.

        For small sets, sources without a training image become all sources, and a split without images becomes the
        training split; an InputError if that is empty, too.
        """
        sources = spec.sources if len(self.images("train", sources=spec.sources, label=spec.label)) else ()
        for name in (split, "train"):
            if len(found := self.images(name, sources=sources, label=spec.label)):
                return found
        raise nothing_to_train_on(spec)

    def examples(self, name: str, split: str, variants: int, encode: Callable[..., Buckets]) -> Buckets:
        """All encoded examples of a split, from the run's cache; those of training with so many ``variants``."""
        variants = variants if split == "train" else 1
        path = self.cache / f"{name}-{split}-{variants}.safetensors"
        if not path.exists():
            frames = self.images(split)
            progress = self.report(f"{name}: encoding {len(frames)} {split} images")
            options = {"networks": self.networks, "variants": variants, "seed": self.seed}
            save_examples(path, encode(frames, progress=progress, **options) if len(frames) else {})
        return load_examples(path)


def nothing_to_train_on(spec: TaskSpec) -> InputError:
    """The error of a task without images."""
    what = f"{spec.label} image" if spec.label else "image"
    return InputError(f"task {spec.name} finds no {what} to train on.", fix="Prepare more images of that class.")


class Task:
    """What a :class:`busigen.training.trainer.Trainer` trains: a module with a loss on a split's images or examples."""

    module: Any  # A torch module; its own attributes are not typed.
    fused_attention = False  # Whether its attention matrices are too large to be kept.

    def __init__(self, spec: TaskSpec, context: TaskContext) -> None:
        self.spec, self.context, self.device = spec, context, context.device
        self.train, self.held_out = self._data("train"), self._data("val")

    def _data(self, split: str) -> Any:
        return self.context.frames(split, self.spec)

    def _loss(self, data: Any, generator: Generator) -> Tensor:
        raise NotImplementedError

    def loss(self, generator: Generator) -> Tensor:
        """Loss of one training batch, which is a pure function of the generator."""
        return self._loss(self.train, generator)

    @torch.no_grad()
    def validate(self) -> float:
        """Mean loss of ``VALIDATION_BATCHES`` held-out batches, the same ones every time."""
        generators = [Generator().manual_seed(1000 + k) for k in range(VALIDATION_BATCHES)]
        return float(torch.stack([self._loss(self.held_out, generator) for generator in generators]).mean())

    def sheet(self) -> Image.Image:
        """Pictures of what the module does now."""
        raise NotImplementedError

    def findings(self) -> dict[str, Any]:
        """Further figures of the trained module, as JSON types, whose measurement may set its buffers."""
        return {}


def random_frames(frames: Frames, size: int, generator: Generator) -> Iterator[tuple[Frame, np.random.Generator]]:
    """Random frames, varied, each with the generator of its batch."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    for position in rng.integers(0, len(frames), size):
        yield frames[int(position)].varied(rng), rng


Picture = NDArray[np.uint8]


def to_pictures(batch: Tensor) -> list[Picture]:
    """The items of ``(B, 1, H, W)`` in [-1, 1] as uint8."""
    pixels = batch.detach().float().cpu().numpy()[:, 0]
    return list(np.clip(np.rint((pixels + 1.0) * 127.5), 0, 255).astype(np.uint8))


def outlined(picture: Picture, mask: NDArray[np.bool_]) -> Picture:
    """A picture with a white line one pixel outside the mask."""
    rim = ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_dilation(mask)
    return np.where(rim, 255, picture).astype(np.uint8)


def grid(rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """Pictures of one size in rows, two pixels apart."""
    height, width = rows[0][0].shape
    sheet = Image.new("L", (max(map(len, rows)) * (width + 2), len(rows) * (height + 2)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * (width + 2), y * (height + 2)))
    return sheet
