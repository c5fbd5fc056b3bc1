"""The tasks of a recipe, each with its data, loss, validation and sheet; here, what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from torch import Generator, Tensor, nn

from busigen.data.prepared import Prepared
from busigen.errors import InputError
from busigen.training.examples import Frame, Frames, Healed, Progress, select
from busigen.training.networks.inference import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import Drawer

VALIDATION_BATCHES = 6


@dataclass
class TaskContext:
    """What every task is built from: ``healed`` after the heal step, ``drawer`` for tasks that need drawings."""

    prepared: Prepared
    networks: Networks
    device: torch.device
    seed: int
    report: Callable[[str], Progress]
    cache: Path
    max_images: int | None = None
    healed: Healed | None = None
    drawer: Drawer | None = None

    def frames(self, split: str, spec: TaskSpec) -> Frames:
        """The task's rows of a split.

        For small sets: without a training image of its class, the wanted sources become all sources, and a split
        without such rows becomes the training split.

        Raises:
            InputError: there is no row to train on.
        """

        def rows(name: str, sources: tuple[str, ...]) -> pl.DataFrame:
            return select(self.prepared, name, limit=self.max_images, sources=sources, label=spec.label)

        sources = spec.sources if rows("train", spec.sources).height else ()
        for name in (split, "train"):
            found = rows(name, sources)
            if found.height:
                return Frames(self.prepared, found)
        raise nothing_to_train_on(spec)


def nothing_to_train_on(spec: TaskSpec) -> InputError:
    """The error of a task without images."""
    what = f"{spec.label} image" if spec.label else "image"
    return InputError(f"task {spec.name} finds no {what} to train on.", fix="Prepare more images of that class.")


class BaseTask:
    """A task with one loss, on batches of training and of held-out data; see :class:`busigen.training.trainer.Task`."""

    module: nn.Module

    def __init__(self, spec: TaskSpec, context: TaskContext) -> None:
        self.spec, self.context, self.device = spec, context, context.device
        self.train, self.held_out = self._data("train"), self._data("val")

    def _data(self, split: str) -> Any:
        """What is learnt from a split: its images, unless a subclass encodes them."""
        return self.context.frames(split, self.spec)

    def _loss(self, data: Any, generator: Generator) -> Tensor:
        """Loss of one batch."""
        raise NotImplementedError

    def loss(self, generator: Generator) -> Tensor:
        """Loss of one training batch."""
        return self._loss(self.train, generator)

    def validate(self) -> float:
        """Mean loss of fixed held-out batches."""
        return mean_loss(lambda generator: self._loss(self.held_out, generator))

    def findings(self) -> dict[str, Any]:
        """Nothing, unless a subclass measures the trained module."""
        return {}


def random_frames(frames: Frames, size: int, generator: Generator) -> Iterator[tuple[Frame, np.random.Generator]]:
    """Random frames, varied, each with the generator of its batch."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    for position in rng.integers(0, len(frames), size):
        yield frames[int(position)].varied(rng), rng


@torch.no_grad()
def mean_loss(loss: Callable[[Generator], Tensor]) -> float:
    """Mean of a loss over ``VALIDATION_BATCHES`` batches, the same ones every time."""
    values = [loss(Generator().manual_seed(1000 + k)) for k in range(VALIDATION_BATCHES)]
    return float(torch.stack(values).mean())


Picture = NDArray[np.uint8]


def to_picture(pixels: Tensor) -> Picture:
    """``(1, H, W)`` or ``(H, W)`` in [-1, 1] as uint8."""
    array = pixels.detach().float().cpu().numpy()
    return np.clip(np.rint((array.reshape(array.shape[-2:]) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def to_pictures(batch: Tensor) -> list[Picture]:
    """The items of ``(B, 1, H, W)`` in [-1, 1] as uint8."""
    return [to_picture(pixels) for pixels in batch]


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
