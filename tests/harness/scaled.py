"""The factory with a source that costs nothing, as one of several tasks or with a pool of workers.

``python -m tests.harness.scaled OUT COUNT SHARD_SIZE SECONDS_PER_SAMPLE HOW``, where HOW is ``K/N``, ``first:end``, or
``local:N`` and ``ray:N`` for N workers, or ``ray@ADDRESS`` for a worker per GPU of a Ray cluster that runs.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

from busigen.errors import BusigenError
from busigen.runtime.dataset.format import Plan
from busigen.runtime.execution.events import supervised
from busigen.runtime.execution.factory import generate, parse_range, parse_task, part_of
from busigen.runtime.execution.launchers import launcher
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.execution.workers import Coordinator
from tests.harness.noise_source import NoiseSource, noise
from tests.harness.processes import ROOT, Hold, listening

SEED = 7


def started(
    out: Path, count: int, shard_size: int, seconds: float, how: str, hold: Hold | None = None
) -> subprocess.Popen[str]:
    arguments = map(str, (out, count, shard_size, seconds, how))
    return subprocess.Popen(
        [sys.executable, "-m", "tests.harness.scaled", *arguments],
        cwd=ROOT,
        env=hold and hold.environment,
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
            described = {"progress": progress, "stop": stop}
            if name in ("local", "ray"):
                make = partial(noise, seconds=seconds)
                wanted = (
                    GenerateOptions(out=out, threads=1, provider="cuda", ray_address=address)
                    if address
                    else GenerateOptions(out=out, threads=1, provider="cpu", workers=int(number))
                )
                with launcher(name).worker_pool(lambda threads: make, wanted) as worker_pool:
                    coordinator = Coordinator(worker_pool, progress)
                    report = generate(coordinator.source(), out, **numbers, **described, make=coordinator.make)
            else:
                plan = Plan(**numbers)
                part = part_of(plan, task=parse_task(how)) if "/" in how else part_of(plan, parse_range(how))
                report = generate(NoiseSource(seconds), out, **numbers, **described, part=part)
    except BusigenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(report, file=sys.stderr)
    return 0


if __name__ == "__main__":
    place, *rest, way = sys.argv[1:]
    sys.exit(main(Path(place), int(rest[0]), int(rest[1]), float(rest[2]), way))
