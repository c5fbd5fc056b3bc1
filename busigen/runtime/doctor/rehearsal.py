"""Two samples of the shipped bundle as ``generate`` draws them: ``python -m busigen.runtime.doctor.rehearsal cpu``."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from busigen.registry import LESION_CLASSES, SYNTHETIC, Provider
from busigen.runtime.job import Job
from busigen.runtime.probing import answer
from busigen.runtime.progress import Progress
from busigen.runtime.wording import counted


def draw(provider: Provider) -> str:
    """Draw a sample of each class with the shipped bundle, and say in a few words how that went.

    Raises:
        BusigenError: as for ``generate``.
    """
    count = len(LESION_CLASSES)
    job = Job(
        count=count,
        out=Path(),
        bundle=None,
        healthy=SYNTHETIC,
        classes=",".join(LESION_CLASSES),
        seed=0,
        batch_size=count,
        shard_size=count,
        provider=provider.name,
        threads=None,
    )
    started = time.perf_counter()
    drawn = job.source(Progress()).draw(0, range(count), lambda number: None)
    return f"{counted(len(drawn.samples), 'sample')} drawn in {time.perf_counter() - started:.1f} s"


if __name__ == "__main__":
    answer(sys.argv[1], draw)
