"""What every task is built from and judged by."""

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
from busigen.training.examples import Frame, Frames, Progress, select
from busigen.training.networks.inference import Networks
from busigen.training.recipe import TaskSpec
from busigen.training.rollouts import Drawer

VALIDATION_BATCHES = 6


@dataclass
class TaskContext:
    """What every task is built from: ``healed`` once the heal step has run, ``drawer`` where drawings are needed."""

    prepared: Prepared
    networks: Networks
    device: torch.device
    seed: int
    report: Callable[[str], Progress]
    cache: Path
    max_images: int | None = None
    healed: Callable[[int, int], NDArray[np.uint8]] | None = None
    drawer: Drawer | None = None

    def frames(self, split: str, spec: TaskSpec) -> Frames:
        """The task's rows of a split.

        For small sets: a class of which the wanted sources have no training image falls back to all sources, and a
        split without any of the rows to the training ones.

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
    """The error of a task without an image."""
    what = f"{spec.label} image" if spec.label else "image"
    return InputError(f"task {spec.name} finds no {what} to train on.", fix="Prepare more images of that class.")


class PixelTask:
    """A task that learns from batches of images' pixels, of training and of held-out images."""

    module: nn.Module

    def __init__(self, spec: TaskSpec, setting: TaskContext) -> None:
        self.spec, self.device = spec, setting.device
        self.train, self.held_out = setting.frames("train", spec), setting.frames("val", spec)

    def _loss(self, frames: Frames, generator: Generator) -> Tensor:
        """Loss of one batch; supplied by the subclass."""
        raise NotImplementedError

    def loss(self, generator: Generator) -> Tensor:
        """See :class:`busigen.training.trainer.Task`."""
        return self._loss(self.train, generator)

    def validate(self) -> float:
        """Mean loss of fixed held-out batches."""
        return mean_loss(lambda g: self._loss(self.held_out, g))

    def findings(self) -> dict[str, Any]:
        """See :class:`busigen.training.trainer.Task`."""
        return {}


def random_frames(frames: Frames, size: int, generator: Generator) -> Iterator[tuple[Frame, np.random.Generator]]:
    """Random frames, flipped at random and with random gain, each with what further draws of its batch come from."""
    rng = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    for position in rng.integers(0, len(frames), size):
        frame = frames[int(position)]
        yield (frame.flipped() if rng.random() < 0.5 else frame).with_gain(rng), rng


@torch.no_grad()
def mean_loss(loss: Callable[[Generator], Tensor]) -> float:
    """Mean of a loss over ``VALIDATION_BATCHES`` batches, the same ones whenever it is asked for."""
    values = [loss(Generator().manual_seed(1000 + k)) for k in range(VALIDATION_BATCHES)]
    return float(torch.stack(values).mean())


Picture = NDArray[np.uint8]


def to_picture(pixels: Tensor) -> Picture:
    """``(1, H, W)`` or ``(H, W)`` in [-1, 1] as uint8."""
    array = pixels.detach().float().cpu().numpy()
    return np.clip(np.rint((array.reshape(array.shape[-2:]) + 1.0) * 127.5), 0, 255).astype(np.uint8)


def outlined(picture: Picture, mask: NDArray[np.bool_]) -> Picture:
    """A white line one pixel outside the mask, so that what is inside stays visible."""
    rim = ndimage.binary_dilation(mask, iterations=2) & ~ndimage.binary_dilation(mask)
    return np.where(rim, 255, picture).astype(np.uint8)


def grid(rows: Sequence[Sequence[Picture]]) -> Image.Image:
    """Pictures of one size in rows, two pixels apart; short rows are left open."""
    height, width = rows[0][0].shape
    sheet = Image.new("L", (max(map(len, rows)) * (width + 2), len(rows) * (height + 2)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (x * (width + 2), y * (height + 2)))
    return sheet
