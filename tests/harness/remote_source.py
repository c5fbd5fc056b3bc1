"""The factory with the noise source and a URL.

``python -m tests.harness.remote_source URL COUNT SHARD_SIZE`` takes ``--seed N``, ``--seconds S`` per sample,
``--spool DIR``, ``--retry S`` with a store out of reach, ``--beat S`` and ``--dead S`` of its lock, ``--workers N``.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from busigen.errors import BusigenError
from busigen.runtime.execution.events import supervised
from busigen.runtime.execution.factory import generate
from busigen.runtime.execution.launchers import launcher
from busigen.runtime.execution.run import GenerateOptions
from busigen.runtime.execution.workers import Coordinator
from busigen.runtime.output.ownership import Beat
from busigen.runtime.output.remote import RemoteOutput
from busigen.runtime.storage.object_store import RetryPolicy
from busigen.runtime.storage.url import Address
from tests.harness.noise_source import NoiseSource, noise


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("count", type=int)
    parser.add_argument("shard_size", type=int)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--spool", type=Path)
    parser.add_argument("--retry", type=float, default=300.0)
    parser.add_argument("--beat", type=float, default=10.0)
    parser.add_argument("--dead", type=float, default=60.0)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--log")
    asked = parser.parse_args(arguments)
    numbers = {"count": asked.count, "seed": asked.seed, "shard_size": asked.shard_size}
    beat = Beat(asked.beat, asked.dead, min(2.0, asked.beat))
    try:
        with supervised(Address(asked.url), asked.log) as (progress, stop):
            retry = RetryPolicy(asked.retry, first=min(1.0, asked.retry / 4))
            destination = RemoteOutput(Address(asked.url), asked.spool, progress=progress, retry=retry, beat=beat)
            run = partial(generate, out=destination, **numbers, progress=progress, stop=stop)
            worker_pool = launcher("local").worker_pool(
                lambda threads: partial(noise, seconds=asked.seconds),
                GenerateOptions(out=Address(asked.url), workers=asked.workers),
            )
            with worker_pool or nullcontext():
                coordinator = Coordinator(worker_pool, progress) if worker_pool else None
                report = (
                    run(coordinator.source(), make=coordinator.make) if coordinator else run(NoiseSource(asked.seconds))
                )
    except BusigenError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(report, file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
