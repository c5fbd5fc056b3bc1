"""What every task is built from and judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import torch
from numpy.typing import NDArray
from torch import Generator, Tensor

from busigen.data.prepared import Prepared
from busigen.errors import InputError
from busigen.training.drawn import Drawer
from busigen.training.examples import Frames, Progress, select
from busigen.training.networks import Networks
from busigen.training.recipe import TaskSpec

VALIDATION_BATCHES = 6


@dataclass
class Setting:
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


@torch.no_grad()
def mean_loss(loss: Callable[[Generator], Tensor]) -> float:
    """Mean of a loss over ``VALIDATION_BATCHES`` batches, the same ones whenever it is asked for."""
    values = [loss(Generator().manual_seed(1000 + k)) for k in range(VALIDATION_BATCHES)]
    return float(torch.stack(values).mean())
