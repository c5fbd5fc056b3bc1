"""``busigen generate`` from options to report: cheap checks first, so that nobody waits for a folder to be read."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import busigen
from busigen.registry import SYNTHETIC
from busigen.runtime.asking import parse_asked
from busigen.runtime.backend import OnnxBackend
from busigen.runtime.bundle import Bundle, default_bundle
from busigen.runtime.claim import refuse_other_run
from busigen.runtime.classes import parse_classes
from busigen.runtime.factory import GenerateReport, generate, refuse_small_disk
from busigen.runtime.healthy import HealthyFolder
from busigen.runtime.layout import Plan
from busigen.runtime.progress import Progress
from busigen.runtime.sampler import Sampler
from busigen.runtime.stage_times import TimedBackend
from busigen.runtime.stopping import Stopping


@dataclass(frozen=True)
class Job:
    """The options of ``busigen generate``, unchecked and as they were typed.

    Attributes:
        count: accepted samples to write.
        out: the dataset's folder.
        bundle: a bundle's folder; ``None`` for the shipped one.
        healthy: a folder of healthy images, or ``synthetic``.
        classes: class weights.
        seed: of the noise.
        batch_size: images per engine call.
        shard_size: samples per shard.
        provider: a name in ``registry.PROVIDERS``.
        threads: compute threads; ``None`` for one per core.
        size, depth, across, height_width: what outlines are asked to be, a number or ``low:high``.
        taller_than_wide: short for a ``height_width`` above 1.
        birads: BI-RADS category.
    """

    count: int
    out: Path
    bundle: Path | None
    healthy: str
    classes: str
    seed: int
    batch_size: int
    shard_size: int
    provider: str
    threads: int | None
    size: str | None = None
    depth: str | None = None
    across: str | None = None
    height_width: str | None = None
    taller_than_wide: bool = False
    birads: str | None = None

    def run(self, progress: Progress, stop: Stopping | None = None) -> GenerateReport:
        """Generate the dataset, or finish one that the same options began.

        Args:
            progress: told of all that happens.
            stop: asked after each shard whether to end here; None never ends early.

        Raises:
            BusigenError: as for what it calls: an option, an input or the output is not usable.
        """
        progress.began(self._facts())
        plan = Plan(count=self.count, seed=self.seed, shard_size=self.shard_size)
        classes = parse_classes(self.classes)
        asked = parse_asked(
            size=self.size,
            depth=self.depth,
            across=self.across,
            height_width=self.height_width,
            taller_than_wide=self.taller_than_wide,
            birads=self.birads,
        )
        refuse_small_disk(self.out, plan)
        bundle = Bundle.open(self.bundle or default_bundle())
        backend = TimedBackend(OnnxBackend(bundle, provider=self.provider, threads=self.threads))
        progress.engine(backend.seconds)
        sampler = Sampler(bundle, backend, classes=classes, asked=asked, batch_size=self.batch_size)
        if self.healthy != SYNTHETIC:
            # All but the healthy images is known already, and reading those may take minutes.
            refuse_other_run(self.out, sampler, plan, healthy=Path(self.healthy))
            sampler.healthy = HealthyFolder(Path(self.healthy), progress)
        return generate(
            sampler,
            self.out,
            count=self.count,
            seed=self.seed,
            shard_size=self.shard_size,
            progress=progress,
            stop=stop,
        )

    def _facts(self) -> dict[str, Any]:
        return {
            "busigen": busigen.__version__,
            "process": os.getpid(),
            "out": str(self.out.absolute()),
            "count": self.count,
            "seed": self.seed,
            "shard_size": self.shard_size,
            "provider": self.provider,
        }
