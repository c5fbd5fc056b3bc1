"""Two samples of the shipped bundle, drawn as by ``generate``.

``python -m busigen.runtime.diagnostics.rehearsal PROVIDER`` prints what came of it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from busigen.registry import LESION_CLASSES, Provider
from busigen.runtime.backends.probe import answer
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.progress import Progress
from busigen.text import counted


def draw(provider: Provider) -> str:
    """Draw a sample of each class with the shipped bundle, and say in a few words how that went.

    Raises:
        BusigenError: as for ``generate``.
    """
    count = len(LESION_CLASSES)
    options = GenerateOptions(out=Path(), classes=",".join(LESION_CLASSES), batch_size=count, provider=provider.name)
    started = time.perf_counter()
    generated = options.source(Progress()).draw(0, range(count), lambda number: None)
    return f"{counted(len(generated.samples), 'sample')} drawn in {time.perf_counter() - started:.1f} s"


if __name__ == "__main__":
    answer(sys.argv[1], draw)
