"""Commands on a dataset of which this process cannot look at some file.

``python -m tests.harness.blind DATASET NAME...`` takes away all rights to each name in turn and prints, for each of
what may be done to a dataset, the kind of error and its text.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from busigen.errors import BusigenError
from busigen.runtime.dataset.reader import Dataset
from busigen.runtime.execution.factory import generate
from busigen.runtime.maintenance.explain import read_recorded
from busigen.runtime.maintenance.merge import merge
from busigen.runtime.maintenance.repair import repair
from busigen.runtime.maintenance.verify import verify
from tests.harness.noise_source import NoiseSource
from tests.harness.replaying import NoiseInputs


def commands(folder: Path, other: Path) -> dict[str, Callable[[], object]]:
    return {
        "verify": lambda: verify(folder).problems,
        "repair": lambda: repair(folder, inputs=NoiseInputs()).repaired,
        "explain": lambda: read_recorded(folder, "4").problems,
        "generate": lambda: generate(NoiseSource(), folder, count=8, seed=7, shard_size=3).written,
        "merge": lambda: merge(folder.parent / "merged", [folder, other]),
        "read": lambda: (Dataset.open(folder).manifest().height, len(Dataset.open(folder).samples([4]))),
    }


def main(folder: Path, *names: str) -> None:
    other = folder.parent / "other"
    generate(NoiseSource(), other, count=8, seed=8, shard_size=3)
    for name in names:
        path = folder / name
        mode = path.stat().st_mode
        for command, call in commands(folder, other).items():
            path.chmod(0)
            try:
                print(f"{name} {command}: done: {call()}")
            except BusigenError as error:
                print(f"{name} {command}: {type(error).__name__}: {error}")
            finally:
                path.chmod(mode)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
