"""A drawn source in the place of a bundle, and ways to damage a dataset: for tests of explain and repair."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from busigen.runtime.dataset.format import SampleBatch
from busigen.runtime.maintenance.replay import Inputs
from tests.harness.noise_source import NoiseSource


@dataclass(frozen=True)
class NoiseInputs(Inputs):
    """Opens ``source`` for any run and remembers which indices it was asked for."""

    source: NoiseSource = field(default_factory=NoiseSource)
    asked: list[list[int]] = field(default_factory=list)

    def open(self, run: Any, *, other_bundle: bool = False) -> NoiseSource:
        draw = self.source.draw

        def described(seed: int, indices: Sequence[int], done: Callable[[int], None]) -> SampleBatch:
            self.asked.append(list(indices))
            return draw(seed, indices, done)

        self.source.draw = described
        return self.source


def flip(path: Path) -> None:
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def reseal(folder: Path, number: int) -> None:
    """Make the shard's record fit its files, as someone who tampers would."""
    path = folder / f"shards/{number:06d}.json"
    record = json.loads(path.read_text())
    for kind in ("tar", "parquet"):
        data = (folder / record[kind]["file"]).read_bytes()
        record[kind] |= {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    path.write_text(json.dumps(record, indent=2) + "\n")
