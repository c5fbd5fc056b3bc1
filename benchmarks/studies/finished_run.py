"""A finished run of ``busigen train``, opened for experiments on its networks and held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin

from busigen.data.prepared import Prepared
from busigen.training.checkpoint import BASE, load_component, load_networks
from busigen.training.pipeline import CACHE, HEALED, KINDS
from busigen.training.recipe import TaskSpec, recipe_for
from busigen.training.rollouts import healed_reader
from busigen.training.tasks import TaskContext
from busigen.training.tasks.denoiser import DenoiserTask


class FinishedRun:
    """The run's networks, its recipe's tasks, and their data from its cache."""

    def __init__(self, folder: Path, data: Path) -> None:
        networks, record = load_networks(folder)
        self.folder, self.seed = folder, int(record["recipe"]["seed"])
        self.specs = {task.name: task for task in recipe_for(record["preset"]).tasks}
        self.setting = TaskContext(
            prepared=Prepared.open(data),
            networks=networks,
            device=torch.device("cpu"),
            seed=self.seed,
            report=lambda what: lambda done, total: None,
            cache=folder / CACHE,
            max_images=record["recipe"]["max_images"],
            # A checkpoint restored from a bundle has healed no image, and stages 2 and 3 need none.
            healed=healed_reader(folder / HEALED) if (folder / HEALED).exists() else None,
        )

    def base(self, component: str) -> ModelMixin:
        """A base component, without any adapter."""
        return load_component(component, self.folder / BASE / component)

    def task(self, spec: TaskSpec, module: Any) -> DenoiserTask:
        """A denoiser's task with the run's data; an adapter's task is of its stage's kind."""
        kind = self.specs[spec.component].kind if spec.kind == "adapter" else spec.kind
        task = KINDS[kind](spec, self.setting, module)
        assert isinstance(task, DenoiserTask)
        return task
