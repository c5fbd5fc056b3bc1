"""Datasets whose images have one to three lesions, drawn crudely, and how they are opened again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.replay import Inputs, recorded_conditions
from busigen.runtime.sampling.conditions import parse_conditions, parse_lesions
from busigen.runtime.sampling.inputs.healthy_images import HealthyFolder
from busigen.runtime.sampling.sampler import Sampler
from tests.harness.quick_engine import quick_sampler
from tests.runtime.sampling.inputs.test_given_masks import save_image
from tests.runtime.sampling.test_grid import Placed

SMALL = {"size": "0.01:0.03", "depth": "0.2:0.7", "across": "0.15:0.85", "height_width": "0.7"}
MIX = "1:0.5,2:0.25,3:0.25"


@dataclass(frozen=True)
class QuickInputs(Inputs):
    """Opens what a run recorded, on an engine that draws crude lesions."""

    def open(self, run: Mapping[str, Any], *, other_bundle: bool = False) -> Sampler:
        """See `Inputs.open`."""
        healthy = HealthyFolder(self.healthy) if self.healthy else None
        return quick_sampler(Placed(), healthy=healthy, **recorded_conditions(run))


def healthy_images(folder: Path) -> Path:
    """A folder of five images of different shapes."""
    for number in range(5):
        save_image(folder / f"{number}.png", (400, 300 + 30 * number), seed=number)
    return folder


def source(mix: str | None = MIX, healthy: Path | None = None, **options: Any) -> Sampler:
    """A sampler of images with so many lesions."""
    folder = HealthyFolder(healthy) if healthy else None
    options = {"asked": parse_conditions(**SMALL), "lesions": parse_lesions(mix), **options}
    return quick_sampler(Placed(), healthy=folder, **options)


def written(out: Path, healthy: Path | None = None, *, seed: int = 1, count: int = 10, **options: Any) -> Path:
    """A dataset of ten samples in two shards, every fifth without a lesion."""
    generate(source(healthy=healthy, **{"normals": 0.2, **options}), out, count=count, seed=seed, shard_size=5)
    return out
