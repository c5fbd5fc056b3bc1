"""A small, real source of samples: speckle and a dark ellipse, a pure function of seed and index.

``python -m tests.harness.noise_source OUT COUNT SHARD_SIZE [SEED] [SECONDS_PER_SAMPLE] [LOG]`` runs the factory with
it, supervised like ``busigen generate``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from busigen.errors import BusigenError
from busigen.runtime.dataset.format import Rejection, Sample, SampleBatch
from busigen.runtime.execution.events import supervised
from busigen.runtime.execution.factory import generate
from busigen.runtime.progress import Progress
from tests.harness.processes import wait_at_hold

ROWS, COLUMNS = np.mgrid[0:256, 0:256]


class NoiseSource:
    """Every seventh index refuses its first draw; ``never`` is always None and ``rarely`` is None in most shards."""

    def __init__(self, seconds: float = 0.0, **fingerprint: Any) -> None:
        self.seconds = seconds
        self.extra = fingerprint

    def fingerprint(self) -> dict[str, Any]:
        return {"source": {"name": "noise", "sizes": (12, 60)}, **self.extra}

    def options(self) -> Mapping[str, str | None]:
        return {}

    def row_types(self) -> Mapping[str, type]:
        return {"healthy_sha256": str, "score": float, "whole": float, "rarely": int, "never": float, "flipped": bool}

    def draw(self, seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
        samples, rejections = [], []
        for index in indices:
            attempt = int(index % 7 == 3)
            sample = noise_sample(seed, index, attempt)
            rejections += [Rejection(index, n, sample.label, "too dark") for n in range(attempt)]
            samples.append(sample)
            wait_at_hold(index)
            time.sleep(self.seconds)
            done(1)
        return SampleBatch(samples, rejections)


def noise_sample(seed: int, index: int, attempt: int = 0) -> Sample:
    rng = np.random.Generator(np.random.Philox(key=seed, counter=[index, attempt, 0, 0]))
    image = rng.integers(60, 200, (256, 256), dtype=np.uint8)
    row, column = rng.uniform(80, 176, 2)
    height, width = rng.uniform(12, 60, 2)
    mask = ((ROWS - row) / height) ** 2 + ((COLUMNS - column) / width) ** 2 <= 1
    image[mask] //= 3
    return Sample(
        index=index,
        attempt=attempt,
        label="benign" if rng.random() < 0.6 else "malignant",
        image=image,
        mask=mask,
        row={
            "healthy_sha256": None,
            "score": np.float32(rng.random()),
            "whole": index,
            "rarely": index if index % 50 == 0 else None,
            "never": None,
            "flipped": bool(index % 2),
        },
    )


def noise(progress: Progress, seconds: float = 0.0) -> NoiseSource:
    """What a worker opens."""
    return NoiseSource(seconds)


def main(arguments: list[str]) -> int:
    out, count, shard_size, *rest = arguments
    seed, seconds = int(rest[0]) if rest else 7, float(rest[1]) if len(rest) > 1 else 0.0
    numbers = {"count": int(count), "seed": seed, "shard_size": int(shard_size)}
    try:
        with supervised(Path(out), rest[2] if len(rest) > 2 else None) as (progress, stop):
            report = generate(NoiseSource(seconds), Path(out), **numbers, progress=progress, stop=stop)
    except BusigenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(report, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
