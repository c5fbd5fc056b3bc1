"""The factory with a source that costs nothing, as one of several tasks or with a crew.

``python -m tests.runtime.scaled OUT COUNT SHARD_SIZE SECONDS_PER_SAMPLE HOW``, where HOW is ``K/N``, ``first:end``, or
``local:N`` and ``ray:N`` for N workers, or ``ray@ADDRESS`` for a worker per GPU of a Ray cluster that runs.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from busigen.errors import BusigenError
from busigen.runtime.factory import generate
from busigen.runtime.launch import Crewing, launcher
from busigen.runtime.launch.crew import Foreman
from busigen.runtime.share import Share, parse_range, parse_task
from busigen.runtime.supervise import supervised
from tests.runtime.noise_source import NoiseSource, noise
from tests.runtime.processes import ROOT, listening

SEED = 7


def started(out: Path, count: int, shard_size: int, seconds: float, how: str) -> subprocess.Popen[str]:
    arguments = map(str, (out, count, shard_size, seconds, how))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.runtime.scaled", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=listening,
    )


def main(out: Path, count: int, shard_size: int, seconds: float, how: str) -> int:
    way, _, address = how.partition("@")
    name, _, number = way.partition(":")
    numbers = {"count": count, "seed": SEED, "shard_size": shard_size}
    try:
        with supervised(out, None) as (progress, stop):
            told = {"progress": progress, "stop": stop}
            if name in ("local", "ray"):
                make = partial(noise, seconds=seconds)
                wanted = Crewing(None, 1, "cuda", address) if address else Crewing(workers=int(number), threads=1)
                with launcher(name).crew(lambda threads: make, wanted) as crew:
                    foreman = Foreman(crew, progress)
                    report = generate(foreman.source(), out, **numbers, **told, make=foreman.make)
            else:
                share = Share(task=parse_task(how)) if "/" in how else Share(parse_range(how))
                report = generate(NoiseSource(seconds), out, **numbers, **told, share=share)
    except BusigenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(report, file=sys.stderr)
    return 0


if __name__ == "__main__":
    place, *rest, way = sys.argv[1:]
    sys.exit(main(Path(place), int(rest[0]), int(rest[1]), float(rest[2]), way))
